"""What the initialisation measured and chose, and how the dictionary starts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_saes.config import InitializerConfig
from lm_saes.models.norm_search import NormChoice, rows_at_once
from lm_saes.models.sae import SparseAutoEncoder
from lm_saes.models.sparse_dictionary import Batch
from lm_saes.models.statistics import MEDIAN_MAX_TOKENS, RunningCovariance, RunningMean, effective_rank, in_float64, rank_at_variance
from lm_saes.ops import latent_sums, map_codes


@dataclass(frozen=True)
class InitializationReport:
    """Measurements on the initialisation batches, the choices made from them, and how the dictionary starts.

    Everything but `activation_norms` is in the dictionary's own space. What needs activations is `None` when there were none.
    """

    tokens: int
    """Tokens that the initialisation batches kept."""
    activation_norms: dict[str, float] | None
    """Mean norm of the raw activations at each hook point: measured, or as given."""
    gamma: float | None
    """‖mean‖ / √(total variance) of the input. Above about 5, centring decides whether latents live (arXiv 2605.31518)."""
    d_model: int
    effective_rank: float | None
    """Of the label covariance (Roy and Vetterli 2007)."""
    rank_99: int | None
    """Directions that hold 99 % of the label variance."""
    d_active: int | None
    """Dimension of the subspace that the decoder rows were drawn in, if they were."""
    bias_method: str
    """How b_D starts."""
    bias_distance_from_mean: float | None
    """‖b_D - mean label‖ in units of the labels' standard deviation √(total variance)."""
    decoder_norm: float
    """Mean norm of the decoder rows."""
    norm_choice: str
    """How that norm was found: "closed form", "search", "norm matching" (see the note), or "as drawn"."""
    explained_variance: float | None
    """Of the labels, at the start."""
    l0: float | None
    """Mean number of latents that fire on a token, at the start."""
    dead_fraction: float | None
    """Share of latents that fire on none of `sample_tokens` tokens, at the start."""
    sample_tokens: int
    """Tokens that median, norm and the start were computed on."""
    seconds: float
    notes: tuple[str, ...]
    """What the user should know."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "notes": list(self.notes)}

    def rows(self) -> list[tuple[str, str]]:
        """(label, text) pairs to print; what was not measured is left out."""
        rows = [(f"mean norm of {hook}", f"{norm:.4g}") for hook, norm in (self.activation_norms or {}).items()]
        if self.gamma is not None:
            rows.append(("gamma = ‖mean‖ / ‖std‖ of the input", f"{self.gamma:.2f}"))
        if self.effective_rank is not None and self.rank_99 is not None:
            d = self.d_model
            text = (
                f"{self.effective_rank:.1f} ({self.effective_rank / d:.0%} of {d}); 99 % of the variance in {self.rank_99} ({self.rank_99 / d:.0%})"
            )
            rows.append(("effective rank of the label", text))
        if self.d_active is not None:
            rows.append(("active subspace", f"{self.d_active} of {self.d_model} dimensions"))
        distance = f", {self.bias_distance_from_mean:.2f} std from the mean" if self.bias_distance_from_mean is not None else ""
        rows.append(("decoder bias", self.bias_method.replace("_", " ") + distance))
        rows.append(("norm of decoder rows", f"{self.decoder_norm:.4g} ({self.norm_choice})"))
        if self.explained_variance is not None and self.l0 is not None and self.dead_fraction is not None:
            rows.append(
                (
                    "at the start",
                    f"explained variance {self.explained_variance:.3f}, L0 {self.l0:.1f}, dead {self.dead_fraction:.1%} in {self.sample_tokens:,} tokens",
                )
            )
        rows.append(("measured on", f"{self.tokens:,} tokens in {self.seconds:.1f} s"))
        return rows + [("note", note) for note in self.notes]


@dataclass(frozen=True)
class Measured:
    """Normalised activations: moments over all initialisation batches, and an evenly spaced sample of at most `MEDIAN_MAX_TOKENS` tokens."""

    inputs: RunningCovariance
    labels: RunningCovariance
    x: Float[Tensor, "N D"]
    y: Float[Tensor, "N D"]

    def sample(self, sae: SparseAutoEncoder) -> dict[str, Tensor]:
        """The sample as a normalised 1D batch."""
        return {sae.cfg.hook_point_out: self.y, sae.cfg.hook_point_in: self.x}


def measure(sae: SparseAutoEncoder, batches: Sequence[Batch]) -> Measured:
    """Measure normalised 1D batches, all of whose tokens count."""
    inputs, labels = RunningCovariance(), RunningCovariance()
    xs, ys = [], []
    stride = math.ceil(sum(len(sae.prepare_input(batch)) for batch in batches) / MEDIAN_MAX_TOKENS)
    for batch in batches:
        x, y = sae.prepare_input(batch), sae.prepare_label(batch)
        labels.update(y)
        if sae.cfg.is_transcoder:
            inputs.update(x)
            ys.append(y[::stride])
        xs.append(x[::stride])
    x = torch.cat(xs)[:MEDIAN_MAX_TOKENS]
    if not sae.cfg.is_transcoder:
        return Measured(labels, labels, x, x)
    return Measured(inputs, labels, x, torch.cat(ys)[:MEDIAN_MAX_TOKENS])


def describe(
    cfg: InitializerConfig,
    sae: SparseAutoEncoder,
    measured: Measured | None,
    norms: dict[str, float] | None,
    choice: NormChoice,
    d_active: int | None,
    notes: Sequence[str],
    started: float,
) -> InitializationReport:
    """The report on a dictionary that is initialised; `started` is the `time.perf_counter()` of the beginning."""
    start = _start(sae, measured) if measured is not None else _Start(None, None, None)
    values = measured.labels.principal_directions()[0] if measured is not None else None
    return InitializationReport(
        tokens=measured.labels.count if measured is not None else 0,
        activation_norms=norms,
        gamma=_gamma(measured.inputs) if measured is not None else None,
        d_model=sae.cfg.d_model,
        effective_rank=effective_rank(values.sqrt()) if values is not None else None,
        rank_99=rank_at_variance(values) if values is not None else None,
        d_active=d_active,
        bias_method=cfg.bias_init_method if sae.b_D is not None else "none",
        bias_distance_from_mean=_bias_distance(sae, measured.labels) if measured is not None else None,
        decoder_norm=float(sae.decoder_norm().mean()),
        norm_choice=choice.how,
        explained_variance=start.explained_variance,
        l0=start.l0,
        dead_fraction=start.dead_fraction,
        sample_tokens=len(measured.x) if measured is not None else 0,
        seconds=time.perf_counter() - started,
        notes=(*notes, *_advice(cfg, sae, choice, start, measured)),
    )


@dataclass(frozen=True)
class _Start:
    explained_variance: float | None
    l0: float | None
    dead_fraction: float | None


def _gamma(moments: RunningCovariance) -> float | None:
    spread = math.sqrt(moments.total_variation / moments.count)
    return float(moments.mean.norm()) / spread if spread > 0 else None


def _bias_distance(sae: SparseAutoEncoder, labels: RunningCovariance) -> float | None:
    spread = math.sqrt(labels.total_variation / labels.count)
    bias = torch.zeros_like(labels.mean) if sae.b_D is None else in_float64(sae.b_D)
    return float((bias - labels.mean).norm()) / spread if spread > 0 else None


def _start(sae: SparseAutoEncoder, measured: Measured) -> _Start:
    """What the dictionary does to the sample in eval mode, before any training."""
    fired = torch.zeros(sae.cfg.d_sae, device=sae.device)
    labels, squared_error = RunningMean(), 0.0
    training = sae.training
    sae.eval()
    size = rows_at_once(sae)
    for x, y in zip(measured.x.split(size), measured.y.split(size), strict=True):
        forward = sae.run(x)
        ones = torch.ones(len(x), device=sae.device)
        fired += latent_sums(map_codes(forward.codes, lambda values: (values != 0).float()), ones)
        labels.update(y)
        squared_error += float((in_float64(y) - in_float64(forward.reconstruction)).square().sum())
    sae.train(training)
    variation = labels.total_variation
    return _Start(
        explained_variance=1 - squared_error / variation if variation > 0 else None,
        l0=float(in_float64(fired).sum()) / labels.count,
        dead_fraction=float((fired == 0).float().mean()),
    )


def _advice(cfg: InitializerConfig, sae: SparseAutoEncoder, choice: NormChoice, start: _Start, measured: Measured | None) -> list[str]:
    notes = []
    if choice.how == "norm matching":
        notes.append(
            "no scale of the drawn decoder brings it much nearer to the label (a transcoder knows nothing yet), so it matches the label in size"
        )
    if choice.how == "nothing to fit":
        notes.append("no latent fires or the label does not vary, so no norm fits better than another; it is 1")
    if start.explained_variance is not None and start.explained_variance < 0 and not cfg.grid_search_init_norm:
        notes.append(
            f"the start reconstructs worse than the mean (explained variance {start.explained_variance:.1f}), because the weights keep the scale of their "
            "uniform bounds; grid_search_init_norm = true chooses the scale"
        )
    if measured is not None and (gamma := _gamma(measured.inputs)) is not None and gamma > 5 and not cfg.init_encoder_bias_with_mean_hidden_pre:
        notes.append(
            f"the mean dominates the inputs (gamma {gamma:.1f}), so many latents may never fire; set init_encoder_bias_with_mean_hidden_pre = true"
        )
    if measured is not None and measured.labels.count < 2 * sae.cfg.d_model:
        notes.append(
            f"{measured.labels.count} tokens are few for {sae.cfg.d_model} dimensions, so the effective rank is underestimated; raise n_batches"
        )
    if measured is None and sae.cfg.act_fn == "batchtopk":
        notes.append("BatchTopK's threshold is not calibrated without activations; training sets it")
    return notes
