"""Activations on disk → batches. What `factory.py` does where its sources are activations:

1. `foreign_cache.py` and `cache.py` open what is at each source's path (`stored.py`); samples are read in groups, each one piece of sequential reading.
2. `StoredSamples` (`cache_streams.py`, as what follows) reads the groups of a source, each once: in an order drawn from the seed where the stream is shuffled, else in their own.
   Threads read ahead; the state is a position, because the order is known.
3. `StoredFilters` applies what is still to be applied: tokens of `ignore_token_ids`, outliers where the cache was written unfiltered, the interceptor.
4. For single activations the positions of the mask are taken out of their sequences. `mix.py` takes from the source that is furthest
   behind its share of the tokens.
5. `shuffle.py` and `prefetch.py`, as for text.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lm_saes.activations.cache_streams import KeptRows, MixedActivations, StoredFilters, StoredSamples, Weighing
from lm_saes.activations.capture import Interceptor, KeptPositions
from lm_saes.activations.factory import ActivationStream
from lm_saes.activations.foreign_cache import open_activations
from lm_saes.activations.mix import Mix, Source
from lm_saes.activations.prefetch import Prefetch, automatic_depth
from lm_saes.activations.shuffle import Rebatch, ShuffleBuffer
from lm_saes.activations.stored import ORIGIN, StoredActivations
from lm_saes.config import ActivationFactoryActivationsSource, ActivationFactoryConfig, ActivationFactoryTarget
from lm_saes.devices import resolve_device
from lm_saes.errors import ConfigError, HookPointError

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel


class CachedActivationStream(ActivationStream):
    """Batches like those from text, read from the disk. `stored`: what is open, by source."""

    def __init__(
        self,
        cfg: ActivationFactoryConfig,
        batches: Rebatch | ShuffleBuffer,
        mix: Mix,
        filters: list[StoredFilters],
        *,
        context_size: int,
        hook_widths: dict[str, int],
        seed: int,
        device: torch.device,
    ) -> None:
        self.cfg, self.context_size, self.hook_widths, self.ended = cfg, context_size, hook_widths, False
        self.stored = {source.name: filtered.samples.stored for source, filtered in zip(cfg.sources, filters, strict=True)}
        self._batches, self._mix, self._filters = batches, mix, filters
        self._ahead = Prefetch(batches, automatic_depth(device) if cfg.prefetch is None else cfg.prefetch, device)
        decisive = cfg.model_dump(mode="json", exclude={"num_workers", "prefetch", "sources", "packing", "model_batch_size"})
        sources = [source.model_dump(mode="json", include={"name", "sample_weights", "dtype"}) for source in cfg.sources]
        self._settings = {"seed": seed, "sources": sources, **decisive}

    def counts(self) -> dict[str, Any]:
        """What has been read (also ahead of the batches that were given out), kept and dropped so far.

        `samples` read, `damaged` ones that were passed over; `tokens` = `kept` + the sum of `dropped`, whose reasons are `masked` (by the cache),
        `ignored`, `outlier`, `interceptor`; `padding`; `ended`; `sources`: the same for each source; `delivered` and `remainder` as for text.
        """
        with self._ahead.paused():
            sources = {}
            for source, filtered, ended in zip(self._mix.sources, self._filters, self._mix.ended, strict=True):
                counts = dict(filtered.counts)
                dropped = {reason: counts.pop(reason) for reason in ("masked", "ignored", "outlier", "interceptor")}
                sources[source.name] = {**filtered.samples.counts, **counts, "dropped": dropped, "ended": ended}
            delivered = self._batches.delivered - self._ahead.ahead * self.cfg.batch_size
        total: dict[str, Any] = {"ended": self.ended, "dropped": {}}
        for counts in sources.values():
            for key, value in counts.items():
                if key == "dropped":
                    total["dropped"] = {reason: total["dropped"].get(reason, 0) + number for reason, number in value.items()}
                elif key != "ended":
                    total[key] = total.get(key, 0) + value
        return {**total, "delivered": delivered, "remainder": self._batches.remainder if self.ended else 0, "sources": sources}

    def description(self) -> str:
        """What was kept, what was dropped and why, and which caches ended, in one line."""
        counts = self.counts()
        words = {
            "masked": "masked in the cache",
            "ignored": "tokens of ignore_token_ids",
            "outlier": "outliers by norm",
            "interceptor": "by the interceptor",
        }
        parts = [f"read {counts['samples']:,} samples from disk, kept {counts['kept']:,} of {counts['tokens']:,} tokens"]
        if dropped := [f"{counts['dropped'][reason]:,} {text}" for reason, text in words.items() if counts["dropped"][reason]]:
            parts.append(f"dropped {', '.join(dropped)}")
        if counts["damaged"]:
            parts.append(f"passed over {counts['damaged']:,} damaged samples")
        if ended := [name for name, source in counts["sources"].items() if source["ended"]]:
            parts.append(f"used up: {', '.join(ended)}")
        return "; ".join(parts)


def cached_stream(
    cfg: ActivationFactoryConfig, model: LanguageModel | None, seed: int, interceptor: Interceptor | None = None, *, origins_only: bool = False
) -> CachedActivationStream:
    """A stream from the beginning of the sources of `cfg`, all of them activations on disk. With `origins_only`, batches hold where
    each token comes from instead of its activations.

    Raises:
        CacheError: nothing is there, it is not finished or damaged. ConfigError, HookPointError: it does not go with `cfg` or `model`.
    """
    sources = [source for source in cfg.sources if isinstance(source, ActivationFactoryActivationsSource)]
    single = cfg.target is ActivationFactoryTarget.ACTIVATIONS_1D
    hooks = [] if cfg.target is ActivationFactoryTarget.TOKENS or origins_only else cfg.hook_points
    device = model.device if model is not None else resolve_device(sources[0].device)
    stored = [open_activations(source.path, cfg.hook_points, skip_damaged=source.skip_damaged) for source in sources]
    widths = _check(cfg, sources, stored, model, interceptor)
    keys = [*hooks, "tokens", "mask", *([ORIGIN] if origins_only else [])]
    filters: list[StoredFilters] = []
    items: list[Source] = []
    for index, (source, one) in enumerate(zip(sources, stored, strict=True)):
        samples = StoredSamples(
            one,
            hooks,
            seed=None if cfg.buffer_size is None else zlib.crc32(f"{seed} {source.name}".encode()),
            workers=source.num_workers,
            ahead=source.prefetch or 2,
            dtype=cfg.override_dtype or source.dtype,  # pyright: ignore[reportArgumentType]  # a torch.dtype when it is read
            device=device,
            origin=origins_only,
        )
        filtered = StoredFilters(
            samples,
            hooks,
            ignore_token_ids=cfg.ignore_token_ids,
            outlier_norm_factor=cfg.outlier_norm_factor,
            interceptor=interceptor,
            source=index,
        )
        filters.append(filtered)
        batches: Any = filtered
        if single:
            batches = KeptPositions(filtered, [key for key in keys if key not in ("tokens", "mask")]) if one.sequences else KeptRows(filtered, keys)
        weighed: Any = Weighing(batches)
        items.append(Source(source.name, source.sample_weights, weighed))
    mix = Mix(items)
    mixed = MixedActivations(mix)
    if cfg.buffer_size is None:
        out = Rebatch(mixed, cfg.batch_size, device=device)
    else:
        buffer_seed = seed if cfg.buffer_shuffle is None else cfg.buffer_shuffle.perm_seed
        repeatable = interceptor is None  # which may do anything
        out = ShuffleBuffer(
            mixed, cfg.batch_size, cfg.buffer_size, seed=buffer_seed, max_bytes=cfg.max_buffer_bytes, device=device, repeatable=repeatable
        )
    context_size = next((one.context_size for one in stored if one.context_size is not None), 0)
    return CachedActivationStream(cfg, out, mix, filters, context_size=context_size, hook_widths=widths if hooks else {}, seed=seed, device=device)


def _check(
    cfg: ActivationFactoryConfig,
    sources: Sequence[ActivationFactoryActivationsSource],
    stored: Sequence[StoredActivations],
    model: LanguageModel | None,
    interceptor: Interceptor | None,
) -> dict[str, int]:
    """What is on disk goes with what is asked for; the widths of the hook points."""
    widths = {hook: stored[0].hook_widths[hook] for hook in cfg.hook_points}
    sequences = cfg.target is not ActivationFactoryTarget.ACTIVATIONS_1D
    for source, one in zip(sources, stored, strict=True):
        here = {hook: one.hook_widths[hook] for hook in cfg.hook_points}
        if here != widths:
            raise HookPointError(f"source '{source.name}' has the widths {here}, '{sources[0].name}' {widths}")
        if source.device != sources[0].device:
            raise ConfigError(f"sources must name one device, got '{sources[0].device}' and '{source.device}'")
        if not one.sequences and (sequences or interceptor is not None):
            raise ConfigError(
                f"source '{source.name}' holds single activations, without their contexts: set target = \"activations-1d\""
                + (" and no interceptor" if interceptor is not None else "")
            )
        if sequences and one.context_size != stored[0].context_size:
            raise ConfigError(f"source '{source.name}' has contexts of {one.context_size} positions, '{sources[0].name}' of {stored[0].context_size}")
        if cfg.context_size is not None and one.context_size not in (None, cfg.context_size):
            raise ConfigError(
                f"source '{source.name}' has contexts of {one.context_size} positions, got context_size = {cfg.context_size}; leave it out"
            )
        if model is not None:
            _check_model(source.name, one, widths, model)
    return widths


def _check_model(name: str, stored: StoredActivations, widths: Mapping[str, int], model: LanguageModel) -> None:
    for hook, width in widths.items():
        if model.hook_width(hook) != width:
            raise HookPointError(
                f"'{hook}' is {model.hook_width(hook)} wide in the model and {width} in source '{name}': it comes from another model"
            )
    written = (stored.provenance.get("model_identity") or {}).get("tokenizer_hash")
    own = model.provenance().get("tokenizer_hash")
    if written and own and written != own:
        raise ConfigError(
            f"source '{name}' was written with another tokenizer than that of {model.cfg.model_name}; use the model that it was written with"
        )
