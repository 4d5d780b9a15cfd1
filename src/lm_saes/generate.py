"""The job that writes a cache: language model, text, estimate, and the writer.

What it needs is counted before the first byte, and its time is measured on the first batches; what does not fit is refused then.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_saes.activations.cache_format import MANIFEST_FILE, Manifest
from lm_saes.activations.cache_progress import RESERVE, Progress
from lm_saes.activations.cache_samples import tensor_bytes
from lm_saes.activations.documents import Documents
from lm_saes.activations.factory import ActivationFactory, ActivationStream
from lm_saes.activations.text import load_dataset, load_dataset_shard
from lm_saes.activations.writer import ActivationWriter
from lm_saes.config import ActivationFactoryConfig, ActivationFactoryDatasetSource, ActivationFactoryTarget, DatasetConfig
from lm_saes.config.generation import GenerateActivationsSettings
from lm_saes.devices import resolve_device
from lm_saes.errors import CacheError
from lm_saes.estimate import duration, size
from lm_saes.files import existing_part
from lm_saes.lm.language_model import LanguageModel, load_model

CALIBRATION_SECONDS = 2.0


@dataclass(frozen=True)
class GenerationEstimate:
    """What one process will write. Sizes in bytes, times in seconds; None where the text's length is not known."""

    tokens: int | None
    """Kept tokens."""
    bytes_per_token: float
    disk: int | None
    """What is still to be written."""
    disk_free: int
    tokens_per_second: float
    """Of the language model; the disk may be slower."""

    @property
    def fits(self) -> bool:
        """Whether there is room; unknown counts as yes."""
        return self.disk is None or self.disk + RESERVE <= self.disk_free

    @property
    def seconds(self) -> float | None:
        """Time that the language model takes."""
        return None if self.disk is None else self.disk / self.bytes_per_token / self.tokens_per_second

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, for printing."""
        unknown = "unknown: the text is streamed"
        return [
            ("tokens", unknown if self.tokens is None else f"about {self.tokens:,}"),
            ("bytes per token", f"{self.bytes_per_token:,.0f}"),
            ("disk", f"{unknown if self.disk is None else size(self.disk)} of {size(self.disk_free)} free"),
            ("time", f"{unknown if self.seconds is None else duration(self.seconds)} ({self.tokens_per_second:,.0f} tokens/s)"),
        ]


def generate_activations(settings: GenerateActivationsSettings, *, report: Callable[[str, Any], None] | None = None) -> Manifest | None:
    """Write a cache at `settings.output_dir`, or go on with one that is not finished.

    Args:
        report: called with a name and a value: "estimate" before the first byte, "written" with (tokens, bytes) after each shard.

    Returns:
        The manifest of the finished cache; None if other processes (`n_shards`) have not finished their parts.

    Raises:
        LmSaesError: whatever a user can mend; shards that were written are kept.
    """
    warn_without_effect(settings)
    report = report or (lambda _name, _value: None)
    folder = Path(settings.output_dir)
    model = _model(settings)
    if not (folder / MANIFEST_FILE).is_file():
        needed = estimate_generation(settings, model)
        report("estimate", needed)
        if not needed.fits:
            raise CacheError(
                f"{folder} needs {size(needed.disk or 0)}, {size(needed.disk_free)} are free: free some, lower total_tokens, "
                'or set override_dtype = "int8"'
            )
    record = settings.model_dump(mode="json", include={"model", "dataset", "dataset_name", "context_size", "ignore_token_ids", "outlier_norm_factor",
                                                       "packing"})  # fmt: skip
    record["model"].pop("device")
    identity = {**record, "text_seed": settings.seed, "tokenizer_hash": model.provenance().get("tokenizer_hash")}
    provenance = {"model_identity": model.provenance(), "model": record["model"], "model_name": settings.model_name or settings.model.model_name,
                  "dataset_name": settings.dataset_name, "dataset": _dataset(settings).as_dict()}  # fmt: skip
    return ActivationWriter(settings.writer()).process(
        _stream(settings, model),
        settings=identity,
        provenance=provenance,
        report=lambda tokens, n_bytes: report("written", (tokens, n_bytes)),
    )


def estimate_generation(
    settings: GenerateActivationsSettings, model: LanguageModel | None = None, seconds: float = CALIBRATION_SECONDS
) -> GenerationEstimate:
    """What this process will write and how long it will take, from its first `seconds` of work. Nothing is written.

    Raises:
        LmSaesError: whatever would stop the job itself.
    """
    model = model or _model(settings)
    stream = _stream(settings, model)
    start, kept, sequences = time.monotonic(), 0, 0
    for batch in stream:
        kept, sequences = kept + int(batch["mask"].sum()), sequences + len(batch["mask"])
        if time.monotonic() - start > seconds:
            break
    elapsed = time.monotonic() - start
    counts = stream.counts()
    stream.close()
    widths = {hook: model.hook_width(hook) for hook in settings.hook_points}
    dtype = str(settings.override_dtype or model.cfg.dtype).removeprefix("torch.")
    single = settings.target is ActivationFactoryTarget.ACTIVATIONS_1D
    per_sample = tensor_bytes(widths, dtype, settings.context_size, single)
    per_token = per_sample if single else per_sample * sequences / max(kept, 1)
    tokens = settings.total_tokens
    if tokens is None:
        documents = _documents(settings)
        if counts["ended"]:
            tokens = counts["kept"]
        elif isinstance(documents, Documents):
            tokens = int(counts["kept"] / max(counts["documents"], 1) * len(documents))
    folder = Path(settings.output_dir)
    progress = Progress.load(folder, settings.start_shard, settings.n_shards) if folder.is_dir() else None
    disk = None if tokens is None else int(max(tokens - (progress.tokens if progress else 0), 0) * per_token)
    return GenerationEstimate(tokens, per_token, disk, shutil.disk_usage(existing_part(folder)).free, max(kept, 1) / elapsed)


def _model(settings: GenerateActivationsSettings) -> LanguageModel:
    cfg = settings.model
    explicit = "device" in cfg.model_fields_set and cfg.device != "auto"
    return load_model(cfg if explicit else cfg.replace(device=str(resolve_device(settings.device_type))))


def _dataset(settings: GenerateActivationsSettings) -> DatasetConfig:
    return settings.dataset or DatasetConfig(dataset_name_or_path="demo")


def _documents(settings: GenerateActivationsSettings) -> Any:
    """The documents of this process."""
    if settings.n_shards == 1:
        return load_dataset(_dataset(settings))
    return load_dataset_shard(_dataset(settings), settings.start_shard, settings.n_shards)


def _stream(settings: GenerateActivationsSettings, model: LanguageModel) -> ActivationStream:
    """This process's text as sequences with their masks, `model_batch_size` at a time. The writer takes the kept positions out itself, because
    it records where they come from."""
    cfg = ActivationFactoryConfig(
        sources=[ActivationFactoryDatasetSource(name=settings.dataset_name)],
        target=ActivationFactoryTarget.ACTIVATIONS_2D,
        hook_points=settings.hook_points,
        batch_size=settings.model_batch_size,
        model_batch_size=settings.model_batch_size,
        context_size=settings.context_size,
        ignore_token_ids=settings.ignore_token_ids,
        outlier_norm_factor=settings.outlier_norm_factor,
        packing=settings.packing,
    )
    return ActivationFactory(cfg).process(model, settings.model_name, {settings.dataset_name: _documents(settings)}, settings.seed)


def warn_without_effect(settings: GenerateActivationsSettings) -> None:
    """Warn about fields that were set and do nothing."""
    given = [name for name in ("batch_size", "num_workers") if getattr(settings, name) is not None]
    if given:
        warnings.warn(f"without effect in generate: {', '.join(given)} (shards have n_samples_per_chunk samples, written in one go)", stacklevel=3)
