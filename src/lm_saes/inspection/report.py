"""The record of an inspection: what was measured at each hook point, as plain values, and how it is computed from the sums.

Letters: N tokens, D width; mu the mean, Σ the covariance, λ its eigenvalues, all of the raw activations at the tokens that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_saes.errors import DataError
from lm_saes.inspection.advice import Advice, advise
from lm_saes.inspection.statistics import HookPointSums, common
from lm_saes.models.statistics import effective_rank, geometric_median, rank_at_variance

OUTLIER_DIMENSION = 5.0
"""A dimension whose second moment is at least this many times the mean of all D is an outlier. The phenomenon is that of Timkey and van
Schijndel (arXiv 2109.04404); the second moment, instead of the variance, catches sinks too, which are large and hardly vary. The number is ours."""
SHOWN = 8
"""Outlier dimensions, tokens and positions that are listed; all are counted."""
QUANTILES = {"1%": 0.01, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "99%": 0.99}


@dataclass(frozen=True)
class Dimensionality:
    """How many directions the activations use. Two measures, because the literature has two."""

    of: int
    """Dimensions looked at."""
    variance_99: int
    """The least number of principal directions that hold 99 % of the variance (the "60 %" of arXiv 2508.16929, v1)."""
    effective_rank: float
    """exp(-Σ p ln p), p = √λ / Σ √λ (Roy and Vetterli, EUSIPCO 2007): it weighs directions by their standard deviation."""

    @property
    def variance_99_share(self) -> float:
        """Over the dimensions."""
        return self.variance_99 / self.of

    @property
    def effective_rank_share(self) -> float:
        """Over the dimensions."""
        return self.effective_rank / self.of


@dataclass(frozen=True)
class OutlierDimension:
    """One coordinate that stands out."""

    index: int
    mean: float
    std: float
    share: float
    """Of the second moment E‖x‖²."""


@dataclass(frozen=True)
class OutlierTokens:
    """Tokens with giant norms."""

    factor: float
    """Norms above this many times the median count."""
    count: int
    share: float
    """Of the tokens that are not special."""
    squares_share: float
    """Of Σ‖x‖² over those tokens: the weight that outliers have in a loss."""
    largest_ratio: float
    """Largest norm over the median at that time; 0 without outliers."""
    dropped: bool
    """Whether they are left out of everything else in this record, as a stream with this filter leaves them out."""
    tokens: tuple[tuple[str, int], ...]
    """The most frequent ones and how often they are outliers."""
    positions: tuple[tuple[int, int], ...]
    """The most frequent positions in the context, 0 first."""


@dataclass(frozen=True)
class SpecialToken:
    """A token that the stream never keeps, such as BOS."""

    text: str
    count: int
    mean_norm: float
    ratio: float | None
    """Over the median norm of the others."""


@dataclass(frozen=True)
class HookPointReport:
    """What the activations at one hook point are like. Everything is about the tokens that are kept, unless it says otherwise."""

    hook_point: str
    d_model: int
    """Width D of the activations."""
    tokens: int
    mean_norm: float
    norm_quantiles: dict[str, float]
    """To within 0.6 %."""
    largest_norm: float
    scale: float | None
    """√D / mean norm: what dataset-wise normalisation multiplies by. None if all activations are zero."""
    gamma: float | None
    """‖mu‖ / √(tr Σ), which predicts the latents that are dead from the start (arXiv 2605.31518). None without variance."""
    mean_share: float | None
    """‖mu‖² / E‖x‖²: the mean's share of the second moment."""
    median_distance: float | None
    """‖geometric median - mean‖ / √(tr Σ), both of an evenly spaced sample."""
    mean_cosine: float | None
    """Of two random tokens: the anisotropy of Ethayarajh (arXiv 1909.00512), over all pairs."""
    dimensionality: Dimensionality
    dimensionality_without_outliers: Dimensionality | None
    """The same without the outlier dimensions; None where there are none."""
    outlier_dimensions: tuple[OutlierDimension, ...]
    """The largest ones."""
    n_outlier_dimensions: int
    outlier_tokens: OutlierTokens
    special_tokens: tuple[SpecialToken, ...]
    spectrum: tuple[float, ...]
    """λ over their sum, largest first."""
    notes: tuple[str, ...] = ()
    """What the reader should know."""

    @property
    def advice(self) -> tuple[Advice, ...]:
        """Settings that follow from the measurements, each with its reason."""
        return advise(self)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, the advice included."""
        return {**_plain(asdict(self)), "advice": [item.as_dict() for item in self.advice]}


@dataclass(frozen=True)
class ActivationReport:
    """An inspection: one record per hook point."""

    model: str | None
    text: str | None
    context_size: int | None
    hook_points: dict[str, HookPointReport]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "model": self.model, "text": self.text, "context_size": self.context_size, "seconds": self.seconds,
            "hook_points": {name: report.as_dict() for name, report in self.hook_points.items()},
        }  # fmt: skip


def describe(sums: HookPointSums, token_texts: Callable[[Sequence[int]], list[str]]) -> HookPointReport:
    """The record of what was gathered at one hook point.

    Args:
        token_texts: what to print for token ids.

    Raises:
        DataError: no token was kept.
    """
    moments, n = sums.moments, sums.moments.count
    if n == 0:
        raise DataError(f"nothing to inspect at {sums.hook_point}: the text keeps no token; check the dataset and the filters")
    width = len(moments.mean)
    variance = moments.total_variation / n
    second_moment = sums.squares / n
    mean_norm = sums.norm_sum / n
    eigenvalues = moments.principal_directions()[0]
    outlying, dimensions = _outlier_dimensions(moments.mean, moments.covariance.diagonal())
    inner = _without(moments.covariance, outlying) if len(outlying) else None
    return HookPointReport(
        hook_point=sums.hook_point,
        d_model=width,
        tokens=n,
        mean_norm=mean_norm,
        norm_quantiles={name: sums.kept_norms.quantile(share) or 0.0 for name, share in QUANTILES.items()},
        largest_norm=sums.largest_norm,
        scale=math.sqrt(width) / mean_norm if mean_norm > 0 else None,
        gamma=float(moments.mean.norm()) / math.sqrt(variance) if variance > 0 else None,
        mean_share=float(moments.mean.square().sum()) / second_moment if second_moment > 0 else None,
        median_distance=_median_distance(sums.sample.rows(), variance),
        mean_cosine=sums.mean_cosine,
        dimensionality=_dimensionality(eigenvalues),
        dimensionality_without_outliers=_dimensionality(inner) if inner is not None else None,
        outlier_dimensions=dimensions,
        n_outlier_dimensions=len(outlying),
        outlier_tokens=_outlier_tokens(sums, token_texts),
        special_tokens=_special_tokens(sums, token_texts),
        spectrum=tuple((eigenvalues / eigenvalues.sum()).tolist()) if variance > 0 else (0.0,) * width,
        notes=_notes(sums, width),
    )


def _dimensionality(eigenvalues: Float[Tensor, " D"]) -> Dimensionality:
    return Dimensionality(len(eigenvalues), rank_at_variance(eigenvalues), effective_rank(eigenvalues.sqrt()))


def _outlier_dimensions(mean: Float[Tensor, " D"], variance: Float[Tensor, " D"]) -> tuple[Tensor, tuple[OutlierDimension, ...]]:
    """Their indices, largest second moment first, and the records of the first few."""
    second = mean.square() + variance
    order = second.argsort(descending=True, stable=True)
    outlying = order[(second[order] >= OUTLIER_DIMENSION * second.mean()) & (second[order] > 0)]
    shares = second / second.sum() if float(second.sum()) > 0 else second
    records = tuple(
        OutlierDimension(index, float(mean[index]), math.sqrt(float(variance[index])), float(shares[index])) for index in outlying[:SHOWN].tolist()
    )
    return outlying, records


def _without(covariance: Float[Tensor, "D D"], dimensions: Tensor) -> Float[Tensor, " d"]:
    """Eigenvalues, largest first, of the covariance of the other dimensions."""
    others = torch.ones(len(covariance), dtype=torch.bool, device=covariance.device)
    others[dimensions] = False
    return torch.linalg.eigvalsh(covariance[others][:, others]).flip(0).clamp_min(0)


def _median_distance(sample: Float[Tensor, "n D"], variance: float) -> float | None:
    if variance == 0 or len(sample) == 0:
        return None
    # The median of a sample is compared with the mean of the same sample, which takes most of the sampling error out of their distance.
    median = geometric_median(sample, tolerance=1e-4).point
    return float((median - sample.double().mean(0)).norm()) / math.sqrt(variance)


def _outlier_tokens(sums: HookPointSums, token_texts: Callable[[Sequence[int]], list[str]]) -> OutlierTokens:
    outliers = sums.outliers
    dropped = outliers.count if sums.drops_outliers else 0
    candidates = sums.moments.count + dropped
    squares = sums.squares + (outliers.squares if sums.drops_outliers else 0.0)
    frequent = common(outliers.tokens, SHOWN)
    return OutlierTokens(
        factor=sums.outlier_norm_factor,
        count=outliers.count,
        share=outliers.count / candidates,
        squares_share=outliers.squares / squares if squares > 0 else 0.0,
        largest_ratio=outliers.largest_ratio,
        dropped=sums.drops_outliers,
        tokens=tuple((token_texts([token])[0], count) for token, count in frequent),
        positions=tuple(common(outliers.places, SHOWN)),
    )


def _special_tokens(sums: HookPointSums, token_texts: Callable[[Sequence[int]], list[str]]) -> tuple[SpecialToken, ...]:
    median = sums.norms.value()
    ordered = sorted(sums.special.items(), key=lambda item: (-item[1][0], item[0]))[:SHOWN]
    return tuple(
        SpecialToken(token_texts([token])[0], count, total / count, total / count / median if median else None) for token, (count, total) in ordered
    )


def _notes(sums: HookPointSums, width: int) -> tuple[str, ...]:
    notes = []
    n = sums.moments.count
    if n < 10 * width:
        notes.append(f"{n:,} tokens are few for {width} dimensions: both dimensionalities are underestimated; inspect at least {10 * width:,}")
    if sums.zeros:
        notes.append(f"{sums.zeros:,} activations are exactly zero")
    return tuple(notes)


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down, as JSON has them."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value
