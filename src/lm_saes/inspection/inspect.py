"""Reading a stream for an inspection: one forward of the language model for all hook points, everything summed up while it passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lm_saes.activations.factory import ActivationFactory
from lm_saes.config import (
    ActivationFactoryConfig,
    ActivationFactoryDatasetSource,
    ActivationFactoryTarget,
    DatasetConfig,
    LanguageModelConfig,
    StreamSettings,
)
from lm_saes.config.base import validated
from lm_saes.devices import resolve_device
from lm_saes.errors import ConfigError, DataError, HookPointError
from lm_saes.inspection.report import ActivationReport, HookPointReport, describe
from lm_saes.inspection.statistics import HookPointSums, Positions
from lm_saes.lm.language_model import LanguageModel, load_model

KINDS = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")
"""What is inspected in every block when no hook point is named."""
TOKENS = 100_000
OUTLIER_NORM_FACTOR = 10.0
SAMPLE_TOKENS = 8192
"""Rows kept at each hook point for the geometric median."""
SAMPLE_BYTES = 512 * 2**20
"""Bytes of all samples together, which shortens them where there are many wide hook points."""
ROWS = 8
"""Contexts in one forward."""


def inspect_activations(
    model: LanguageModel | LanguageModelConfig | str = "demo",
    hook_points: Sequence[str] | None = None,
    text: DatasetConfig | Sequence[str] | str = "demo",
    *,
    tokens: int = TOKENS,
    context_size: int | None = None,
    device: str = "auto",
) -> ActivationReport:
    """What the activations of a language model are like at some hook points, and which settings follow from that.

    Args:
        model: a loaded model, its configuration or its name ("demo" is the one the package carries).
        hook_points: names; `*` stands for every block ("blocks.*.hook_attn_out"). None: attention output, MLP output and residual stream of
            every block.
        text: a dataset's name, file or configuration, or the documents themselves; "demo" is the Python standard library.
        tokens: tokens to look at; the batch with which they are reached is the last. A shorter text is read to its end.
        context_size: tokens in a context; None is the model's longest, at most 1024.
        device: where a model that is given by its name runs.

    Raises:
        LmSaesError: the model, the text or a hook point cannot be found; nothing is kept; NaN or infinity in the activations.
    """
    loaded = _load(model, device)
    source = validated(DatasetConfig, {"dataset_name_or_path": text}) if isinstance(text, str) else text
    table = {
        "sources": [ActivationFactoryDatasetSource(name="text")],
        "target": ActivationFactoryTarget.ACTIVATIONS_2D,
        "hook_points": expand(hook_points, loaded),
        "batch_size": ROWS,
        "model_batch_size": ROWS,
        "context_size": context_size,
    }
    factory = validated(ActivationFactoryConfig, table)
    return _inspect(loaded, factory, {"text": source}, tokens, _name(source))


def inspect_settings(
    settings: StreamSettings, hook_points: Sequence[str] | None = None, *, tokens: int = TOKENS, model: LanguageModel | None = None
) -> ActivationReport:
    """The same for the stream of a settings file, filters and context size included: what a dictionary trained on it would see.

    Args:
        settings: those of a training or of any other job on a stream of text.
        hook_points: instead of the settings' own.
        tokens: as for `inspect_activations`.
        model: the settings' language model, if it is loaded already.

    Raises:
        LmSaesError: as for `inspect_activations`; the settings read activations from disk.
    """
    if settings.model is None:
        raise ConfigError("inspection reads text with a language model: set `model` and a dataset source")
    loaded = model or _load(settings.model, settings.device_type)
    factory = settings.activation_factory.replace(
        target=ActivationFactoryTarget.ACTIVATIONS_2D,
        hook_points=expand(hook_points or settings.activation_factory.hook_points, loaded),
        batch_size=settings.activation_factory.model_batch_size,
        buffer_size=None,
        buffer_shuffle=None,
        max_buffer_bytes=None,
    )
    datasets = {source.name: settings.dataset(source.name) for source in factory.sources}
    return _inspect(loaded, factory, datasets, tokens, ", ".join(str(_name(dataset)) for dataset in datasets.values()))


def inspect_batches(
    batches: Iterable[Mapping[str, Any]],
    hook_points: Sequence[str],
    *,
    tokens: int | None = TOKENS,
    outlier_norm_factor: float = OUTLIER_NORM_FACTOR,
    token_texts: Callable[[Sequence[int]], list[str]] | None = None,
) -> dict[str, HookPointReport]:
    """The records of hook points from any batches, 1D or 2D, as `docs/architecture.md` describes them.

    Args:
        batches: read until `tokens` are reached.
        hook_points: keys of the batches.
        tokens: None reads all batches.
        outlier_norm_factor: tokens with norms above this many times the running median are left out and described; 0 leaves none out and
            describes those above 10 times the median.
        token_texts: what to print for token ids; the numbers if left out.

    Raises:
        DataError: the batches lack a hook point, or keep no token.
        NonFiniteError: NaN or infinity in the activations.
    """
    sums: dict[str, HookPointSums] = {}
    n_tokens = 0
    for batch in batches:
        if missing := [hook for hook in hook_points if hook not in batch]:
            raise DataError(f"the batches have no activations of {missing} (they have {sorted(batch)}); add them to the stream's hook_points")
        if not sums:
            widths = [batch[hook].shape[-1] for hook in hook_points]
            size = max(256, min(SAMPLE_TOKENS, SAMPLE_BYTES // (4 * sum(widths))))
            factor = outlier_norm_factor or OUTLIER_NORM_FACTOR
            sums = {hook: HookPointSums(hook, factor, outlier_norm_factor > 0, size) for hook in hook_points}
        positions = _positions(batch, batch[hook_points[0]])
        for hook in hook_points:
            sums[hook].update(batch[hook].flatten(0, -2), positions)
        n_tokens += int(positions.kept.sum())
        if tokens is not None and n_tokens >= tokens:
            break
    if not sums:
        raise DataError("nothing to inspect: the stream gave no batch; check the dataset")
    return {hook: describe(these, token_texts or _numbers) for hook, these in sums.items()}


def expand(hook_points: Sequence[str] | None, model: LanguageModel) -> list[str]:
    """Names with `*` for the number of the block as one name per block; None as attention output, MLP output and residual stream of each.

    Raises:
        HookPointError: the model has no such hook point, or no blocks to count.
    """
    patterns = [f"blocks.*.{kind}" for kind in KINDS] if hook_points is None else list(hook_points)
    if not patterns:
        raise ConfigError("no hook point to inspect; name one, or leave hook_points out for all blocks")
    names = [pattern.replace("*", str(block)) for pattern in patterns for block in (range(model.n_layers) if "*" in pattern else [0])]
    if not names:
        raise HookPointError(f"'{patterns[0]}' stands for no block: the model has none; name the hook points")
    for name in names:
        model.hook_width(name)
    return list(dict.fromkeys(names))


def _inspect(model: LanguageModel, factory: ActivationFactoryConfig, datasets: Mapping[str, Any], tokens: int, text: str | None) -> ActivationReport:
    if tokens < 1:
        raise ConfigError(f"tokens must be at least 1, got {tokens}")
    start = time.perf_counter()
    # The filter is applied at each hook point by itself: the stream's own drops a position everywhere that is an outlier anywhere.
    unfiltered = factory.replace(outlier_norm_factor=0.0)
    stream = ActivationFactory(unfiltered).process(model=model, datasets=datasets)
    records = inspect_batches(
        stream, factory.hook_points, tokens=tokens, outlier_norm_factor=factory.outlier_norm_factor, token_texts=model.token_texts
    )
    return ActivationReport(
        model=model.cfg.model_name, text=text, context_size=stream.context_size, hook_points=records, seconds=time.perf_counter() - start
    )


def _positions(batch: Mapping[str, Any], activations: Tensor) -> Positions:
    shape = activations.shape[:-1]
    everywhere = torch.ones(shape, dtype=torch.bool)
    kept = batch["mask"].cpu().bool() if "mask" in batch else everywhere
    attended = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else kept
    tokens = batch["tokens"].cpu() if "tokens" in batch else torch.full(shape, -1)
    place = torch.arange(shape[1]).expand(shape).flatten() if len(shape) == 2 else None
    return Positions((kept & attended).flatten(), (attended & ~kept).flatten(), tokens.flatten(), place)


def _load(model: LanguageModel | LanguageModelConfig | str, device: str) -> LanguageModel:
    if isinstance(model, LanguageModel):
        return model
    cfg = validated(LanguageModelConfig, {"model_name": model}) if isinstance(model, str) else model
    if cfg.device == "auto":
        cfg = cfg.replace(device=str(resolve_device(device)))
    return load_model(cfg)


def _name(text: Any) -> str | None:
    return str(text.dataset_name_or_path) if isinstance(text, DatasetConfig) else None


def _numbers(ids: Sequence[int]) -> list[str]:
    return [str(index) for index in ids]
