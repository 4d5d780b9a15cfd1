"""What the commands about caches print."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.text import Text

from lm_saes import display
from lm_saes.activations.cache import ActivationCache
from lm_saes.activations.cache_format import Manifest
from lm_saes.activations.cache_progress import finish_as_it_stands
from lm_saes.activations.shuffle_quality import shuffle_quality
from lm_saes.config.generation import GenerateActivationsSettings
from lm_saes.errors import CacheError
from lm_saes.estimate import duration, size
from lm_saes.generate import estimate_generation, generate_activations

DRY_RUN_SECONDS = 10.0
JUDGED_TOKENS = 20_000_000
"""Larger caches are not judged when they are shown: it reads where every token comes from."""


def generate(settings: GenerateActivationsSettings, *, dry_run: bool) -> None:
    """Write a cache, or say what it would need."""
    terminal = display.console()
    if dry_run:
        needed = estimate_generation(settings, seconds=DRY_RUN_SECONDS)
        terminal.print(display.rows_table(needed.rows()))
        verdict = "it fits" if needed.fits else 'it does not fit: free some space, lower total_tokens, or set override_dtype = "int8"'
        terminal.print(Text(f"\n{verdict}", style="bold green" if needed.fits else "bold red"), soft_wrap=True)
        return
    start = time.monotonic()

    def report(name: str, value: Any) -> None:
        if name == "estimate":
            terminal.print(display.rows_table(value.rows()))
            return
        tokens, n_bytes = value
        terminal.print(Text(f"{tokens:,} tokens, {size(n_bytes)}, {duration(time.monotonic() - start)}", style="dim"), soft_wrap=True)

    manifest = generate_activations(settings, report=report)
    if manifest is None:
        terminal.print(Text(f"part {settings.start_shard} of {settings.n_shards} is written; the others are not finished yet", style="bold"))
        return
    terminal.print(Text(f"\nfinished: {settings.output_dir}", style="bold"), soft_wrap=True)
    terminal.print(display.rows_table(_rows(manifest)))


def verify(folder: Path) -> None:
    """Say that all is well, or what is not.

    Raises:
        CacheError: something is damaged; the message names the first file.
    """
    terminal = display.console()
    cache = ActivationCache(folder, skip_damaged=True)
    damage = cache.verify()
    for item in damage:
        terminal.print(Text(f"{item.file}: {item.problem}", style="red"), soft_wrap=True)
    n = len(cache.manifest.shards)
    if damage:
        raise CacheError(
            f"{len(damage)} of {n} shards of {folder} are damaged or missing, first {damage[0].file}; write it again or set skip_damaged"
        )
    terminal.print(Text(f"{n} shards, {size(cache.manifest.bytes)}: all as they were written", style="bold green"), soft_wrap=True)


def show(folder: Path, buffer_size: int, batch_size: int) -> None:
    """A cache's manifest in a few lines, and its shuffling."""
    terminal = display.console()
    manifest = ActivationCache(folder, skip_damaged=True).manifest
    terminal.print(display.rows_table(_rows(manifest)))
    if not manifest.contexts:
        terminal.print(Text("\nshuffling is not judged: the cache does not record where its activations come from", style="dim"), soft_wrap=True)
    elif manifest.tokens > JUDGED_TOKENS:
        terminal.print(Text(f"\nshuffling is not judged: more than {JUDGED_TOKENS:,} tokens", style="dim"), soft_wrap=True)
    else:
        terminal.print(Text(f"\nshuffled with buffer_size = {buffer_size:,}, batch_size = {batch_size:,}", style="bold"), soft_wrap=True)
        terminal.print(display.rows_table(shuffle_quality(str(folder), buffer_size=buffer_size, batch_size=batch_size).rows()))


def finish(folder: Path) -> None:
    """Make a cache of what was written."""
    manifest = finish_as_it_stands(folder)
    terminal = display.console()
    terminal.print(Text(f"{folder} is a cache now", style="bold"), soft_wrap=True)
    terminal.print(display.rows_table(_rows(manifest)))


def _rows(manifest: Manifest) -> list[tuple[str, str]]:
    from_what = [str(manifest.provenance[name]) for name in ("model_name", "dataset_name") if manifest.provenance.get(name)]
    shards = f"{len(manifest.shards)} of {manifest.samples_per_shard:,} samples" + ("" if manifest.complete else " (ended early)")
    contexts = f"{manifest.context_size} positions" if manifest.context_size else "not recorded"
    return [
        ("from", ", ".join(from_what) or "unknown"),
        ("hook points", ", ".join(f"{hook} ({width})" for hook, width in manifest.hook_points.items())),
        ("holds", f"{manifest.tokens:,} tokens as {manifest.target} in {manifest.dtype}"),
        ("contexts", contexts),
        ("shards", shards),
        ("size", f"{size(manifest.bytes)}, {manifest.bytes / max(manifest.tokens, 1):,.0f} bytes per token"),
    ]
