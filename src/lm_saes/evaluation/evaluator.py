"""Evaluation of a dictionary on a stream: how it reconstructs, how its latents fire, and what it costs the language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lm_saes.config import EvalConfig
from lm_saes.errors import ConfigError, DataError, NonFiniteError
from lm_saes.evaluation import firing, reconstruction
from lm_saes.evaluation.downstream import DownstreamSums, EditableModel
from lm_saes.evaluation.reconstructor import Reconstructor
from lm_saes.models.statistics import kept_rows

Metrics = dict[str, float | list[list[float]] | None]
"""Metrics by name; `None` where a metric is undefined, so that they are valid JSON."""


@runtime_checkable
class MetricsLogger(Protocol):
    """A Weights & Biases run, as far as it is used here."""

    def log(self, data: dict[str, Any], /) -> Any: ...


class Evaluator:
    """Evaluates dictionaries, and baselines with the same surface.

    Args:
        cfg: how many tokens are evaluated.
    """

    def __init__(self, cfg: EvalConfig) -> None:
        self.cfg = cfg

    def evaluate(
        self,
        sae: Reconstructor,
        data_stream: Iterable[dict[str, Any]],
        wandb_logger: MetricsLogger | None = None,
        model: EditableModel | None = None,
    ) -> Metrics:
        """All metrics of `sae` on the kept positions of `data_stream`, in eval mode (the mode is put back afterwards).

        The batch with which `total_eval_tokens` is reached is the last. A shorter stream is evaluated whole; `metrics/n_tokens` says how much that was.
        With 2D batches and a `model`, the reconstruction is also spliced into the model (`downstream`).

        Raises:
            DataError: the stream kept no token, or its batches lack a hook point of the dictionary.
            NonFiniteError: NaN or infinity in the activations or the reconstructions.
            ConfigError: the dictionary reads a hook point that the model computes after the one it would be spliced into.
        """
        if len(sae.cfg.hooks_out) != 1:
            raise ConfigError(f"the evaluator takes dictionaries with one output hook point, got {sae.cfg.hooks_out}")
        sums, counts = reconstruction.ReconstructionSums(), firing.FiringCounts()
        downstream = DownstreamSums(model, sae) if model is not None else None
        with torch.no_grad(), _eval_mode(sae):
            for batch in data_stream:
                _evaluate_batch(sae, batch, sums, counts)
                if downstream is not None and batch["tokens"].ndim == 2:
                    _splice_batch(batch, sae.cfg.hooks_out[0], downstream)
                if sums.n_tokens >= self.cfg.total_eval_tokens:
                    break
        if sums.n_tokens == 0:
            raise DataError("nothing to evaluate: the stream kept no token; check the dataset, its split and the filters")
        metrics = {**_metrics(sums, counts), **(downstream.result() if downstream is not None and downstream.totals else {})}
        if wandb_logger is not None:
            wandb_logger.log({name: value for name, value in metrics.items() if isinstance(value, float)})
        return metrics


@contextmanager
def _eval_mode(sae: Reconstructor) -> Iterator[None]:
    training = sae.training
    sae.train(False)
    try:
        yield
    finally:
        sae.train(training)


def _evaluate_batch(sae: Reconstructor, batch: dict[str, Any], sums: reconstruction.ReconstructionSums, counts: firing.FiringCounts) -> None:
    (hook_out,) = sae.cfg.hooks_out
    rows = {hook: kept_rows(batch, hook) for hook in dict.fromkeys([*sae.cfg.hooks_in, hook_out])}
    if len(rows[hook_out]) == 0:
        return
    for hook, activations in rows.items():
        _check_finite(activations, f"the activations of {hook}")
    codes, reconstructed = sae.features_and_reconstruction(rows)
    _check_finite(reconstructed, f"the reconstruction of {hook_out}")
    counts.update(codes)
    sums.update(rows[hook_out], reconstructed.to(rows[hook_out].device))


def _splice_batch(batch: dict[str, Any], hook_out: str, downstream: DownstreamSums) -> None:
    tokens: Tensor = batch["tokens"]
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    attention_mask = batch.get("attention_mask", everywhere).bool()
    mask = batch.get("mask", everywhere).bool() & attention_mask
    downstream.update(tokens, attention_mask, mask, batch[hook_out])


def _check_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        n_bad = int((~torch.isfinite(values)).any(dim=-1).sum())
        raise NonFiniteError(
            f"{what} hold NaN or infinity on {n_bad} of {len(values)} tokens; run the language model in float32 or bfloat16, or filter them"
        )


def _metrics(sums: reconstruction.ReconstructionSums, counts: firing.FiringCounts) -> Metrics:
    return {
        "metrics/n_tokens": float(sums.n_tokens),
        "metrics/explained_variance": reconstruction.explained_variance(sums),
        "metrics/normalized_mse": reconstruction.normalized_mse(sums),
        "metrics/cosine_similarity": reconstruction.cosine_similarity(sums),
        "metrics/shrinkage": reconstruction.shrinkage(sums),
        "metrics/relative_reconstruction_bias": reconstruction.relative_reconstruction_bias(sums),
        "metrics/l0": firing.l0(counts),
        "metrics/dead_fraction": firing.dead_fraction(counts),
        "metrics/dense_fraction": firing.dense_fraction(counts),
        "metrics/density_histogram": firing.density_histogram(counts),
    }
