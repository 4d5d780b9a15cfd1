"""Statistics of activations, in float64: mean and covariance over a stream, effective rank, geometric median.

Letters: N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lm_saes.devices import widest_float
from lm_saes.errors import DataError

MEDIAN_MAX_TOKENS = 32_768
"""Tokens on which the geometric median is computed (the number of Gao et al., arXiv 2406.04093)."""

_CHUNK = 4096
"""Rows turned into float64 at a time, so that a bfloat16 sample does not quadruple in memory."""


def kept_rows(batch: Mapping[str, Any], hook_point: str) -> Float[Tensor, "N D"]:
    """The activations of a 1D or 2D batch at the positions that its mask keeps; all of them where it has no mask.

    Raises:
        DataError: the batch lacks the hook point.
    """
    if hook_point not in batch:
        raise DataError(
            f"the batches of this stream have no activations of '{hook_point}' (they have {sorted(batch)}); add it to the stream's hook_points"
        )
    activation, mask = batch[hook_point], batch.get("mask")
    return activation.flatten(0, -2) if mask is None else activation[mask.to(activation.device)]


def in_float64(x: Tensor) -> Tensor:
    """`x` in float64; on the CPU where its device has no float64."""
    return (x if widest_float(x.device) == torch.float64 else x.cpu()).detach().to(torch.float64)


def float64_chunks(x: Float[Tensor, "N D"]) -> Iterator[Float[Tensor, "n D"]]:
    """The rows of `x` in float64, a few thousand at a time."""
    for rows in x.split(_CHUNK):
        yield in_float64(rows)


class RunningMean:
    """Mean and total variation of vectors that come in batches.

    Merging follows Chan, Golub and LeVeque (1983): deviations are taken from each batch's own mean, so a mean that is large against the
    spread does not cancel, as it would in E[x^2] - E[x]^2.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(0, dtype=torch.float64)
        self._squares: Tensor = torch.zeros((), dtype=torch.float64)

    def update(self, x: Float[Tensor, "N D"]) -> None:
        """Take in the rows of `x`. No rows: nothing changes."""
        for rows in float64_chunks(x):
            if len(rows) == 0:
                continue
            mean = rows.mean(0)
            deviations = rows - mean
            if self.count == 0:
                self.mean, self._squares = torch.zeros_like(mean), torch.zeros_like(self._deviation_squares(deviations))
            shift = (mean - self.mean)[None]
            total = self.count + len(rows)
            self._squares = self._squares + self._deviation_squares(deviations) + self._deviation_squares(shift) * (self.count * len(rows) / total)
            self.mean = self.mean + shift[0] * (len(rows) / total)
            self.count = total

    @property
    def total_variation(self) -> float:
        """Sum over tokens of ‖x - mean‖²."""
        return float(self._squares)

    def _deviation_squares(self, deviations: Float[Tensor, "N D"]) -> Tensor:
        return deviations.square().sum()


class RunningCovariance(RunningMean):
    """Mean and covariance of vectors that come in batches; O(D²) memory."""

    def __init__(self) -> None:
        super().__init__()
        self._principal: tuple[Tensor, Tensor] | None = None

    def update(self, x: Float[Tensor, "N D"]) -> None:
        super().update(x)
        self._principal = None

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """The centred covariance with the 1/N of a population."""
        return self._squares / max(self.count, 1)

    @property
    def total_variation(self) -> float:
        return float(self._squares.trace()) if self.count else 0.0

    def principal_directions(self) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
        """Eigenvalues of the covariance, largest first and not negative, and the directions belonging to them as columns.

        The sign of a direction is fixed (its entry of largest size is positive), so that the result does not depend on the linear algebra library.
        """
        if self._principal is None:
            values, vectors = torch.linalg.eigh(self.covariance)
            values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
            largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
            self._principal = values, vectors * torch.where(largest < 0, -1.0, 1.0)
        return self._principal

    def _deviation_squares(self, deviations: Float[Tensor, "N D"]) -> Tensor:
        return deviations.T @ deviations


def effective_rank(singular_values: Float[Tensor, " D"]) -> float:
    """exp(-Σ p ln p) with p = s / Σ s: the effective rank of Roy and Vetterli (2007). It is n for n equal values, and 0 if all are zero."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    shares = in_float64(singular_values / total)
    return float(torch.special.entr(shares).sum().exp())


def rank_at_variance(eigenvalues: Float[Tensor, " D"], share: float = 0.99) -> int:
    """The smallest number of leading directions that hold `share` of the variance; `eigenvalues` of the covariance, largest first."""
    total = eigenvalues.sum()
    if total == 0:
        return 0
    # Rounding may leave the last cumulative sums a hair below a share of 1, hence the cap.
    below = (eigenvalues.cumsum(0) < share * total).sum()
    return min(int(below) + 1, len(eigenvalues))


class GeometricMedian(NamedTuple):
    """A geometric median and how well it was found."""

    point: Float[Tensor, " D"]
    """float64."""
    gradient_norm: float
    """Norm of the smallest subgradient of the mean distance at `point`, in [0, 1]; 0 at the median."""
    iterations: int
    converged: bool


def geometric_median(x: Float[Tensor, "N D"], tolerance: float = 1e-7, max_iterations: int = 500) -> GeometricMedian:
    """The point with the least mean distance to the rows of `x`, by Weiszfeld's iteration with the step of Vardi and Zhang (PNAS 2000)
    at data points, where Weiszfeld's own step divides by zero.

    The iteration stops when the subgradient of the mean distance is at most `tolerance`. Its terms are unit vectors, so the rule does not depend
    on the scale of the activations.

    Raises:
        ValueError: `x` has no rows.
    """
    if len(x) == 0:
        raise ValueError("the geometric median of no points is undefined")
    point = torch.stack([rows.sum(0) for rows in float64_chunks(x)]).sum(0) / len(x)
    scale = float(torch.stack([(rows - point).norm(dim=1).sum() for rows in float64_chunks(x)]).sum()) / len(x)
    coincident = 1e-10 * scale  # closer than this, a data point and the iterate are one point
    gradient_norm = 0.0
    for iteration in range(max_iterations + 1):
        pull, weight, ties = torch.zeros_like(point), 0.0, 0
        for rows in float64_chunks(x):
            offsets = rows - point
            distances = offsets.norm(dim=1)
            away = distances > coincident
            inverse = torch.where(away, 1 / distances.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
            pull += inverse @ offsets
            weight += float(inverse.sum())
            ties += int((~away).sum())
        length = float(pull.norm())
        gradient_norm = max(length - ties, 0.0) / len(x)
        if gradient_norm <= tolerance:
            return GeometricMedian(point, gradient_norm, iteration, converged=True)
        if iteration < max_iterations:
            # Weiszfeld's step is pull / weight; each data point at the iterate holds it back by one unit of pull.
            point = point + pull / weight * (1 - ties / length)
    return GeometricMedian(point, gradient_norm, max_iterations, converged=False)
