"""What is gathered about the activations at one hook point while a stream passes, in float64 and in memory that does not grow with the stream.

Letters: N tokens, D width; x an activation, mu the mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lm_saes.activations.capture import RunningMedian
from lm_saes.errors import NonFiniteError
from lm_saes.models.statistics import RunningCovariance, in_float64


class Positions(NamedTuple):
    """What a batch says about its rows, which are flattened to M positions."""

    kept: Bool[Tensor, " M"]
    """Positions that a dictionary could be trained on: text that is neither padding nor special."""
    special: Bool[Tensor, " M"]
    """Positions that hold a token which the stream drops: BOS, separators and the like."""
    tokens: Int64[Tensor, " M"]
    place: Int64[Tensor, " M"] | None
    """Position in the context, 0 first; None where the batch does not say (activations-1d)."""


class NormHistogram(RunningMedian):
    """The quantiles of all positive numbers seen, to within 0.6 %, in fixed memory."""

    def quantile(self, share: float) -> float | None:
        """The number below which `share` of all numbers lie (lower quantile, middle of its bin); None before the first number."""
        total = int(self.counts.sum())
        if total == 0:
            return None
        rank = min(max(1, math.ceil(share * total)), total)
        index = int(torch.searchsorted(self.counts.cumsum(0), rank))
        return 2 ** ((index + 0.5) / self.BINS_PER_OCTAVE - self.OCTAVES)


class EvenSample:
    """Evenly spaced rows of a stream of any length, between `size` / 2 and `size` of them once there are that many.

    It keeps every `stride`-th row; when it is full, every other row goes and the stride doubles. Nothing is random.
    """

    def __init__(self, size: int) -> None:
        self._size, self._stride, self._seen = size, 1, 0
        self._rows: list[Tensor] = []

    def update(self, x: Float[Tensor, "N D"]) -> None:
        """Take in the next rows, which are copied in float32."""
        first = -self._seen % self._stride
        self._rows.append(x[first :: self._stride].detach().to("cpu", torch.float32, copy=True))
        self._seen += len(x)
        while sum(len(rows) for rows in self._rows) > self._size:
            self._rows = [torch.cat(self._rows)[::2].clone()]
            self._stride *= 2

    def rows(self) -> Float[Tensor, "n D"]:
        """The sample, in the order of the stream."""
        return torch.cat(self._rows) if self._rows else torch.empty(0, 0)


class OutlierCounts:
    """Tokens whose norm exceeds a factor times the median: how many, how large, which and where."""

    def __init__(self) -> None:
        self.count = 0
        self.squares = 0.0
        self.largest_ratio = 0.0
        self.tokens: Counter[int] = Counter()
        self.places: Counter[int] = Counter()

    def update(self, norms: Float[Tensor, " n"], median: float, tokens: Int64[Tensor, " n"], places: Int64[Tensor, " n"] | None) -> None:
        """Take in outliers: their norms, the median they are outliers to, their token ids and positions."""
        if len(norms) == 0:
            return
        self.count += len(norms)
        self.squares += float(norms.square().sum())
        self.largest_ratio = max(self.largest_ratio, float(norms.max()) / median)
        self.tokens.update(tokens.tolist())
        if places is not None:
            self.places.update(places.tolist())


class HookPointSums:
    """Everything that is gathered at one hook point.

    Args:
        hook_point: its name, for messages.
        outlier_norm_factor: norms above this many times the running median are outliers, by the rule of the stream's own filter.
        drops_outliers: whether the stream to be trained on drops them, so that the moments are taken without them.
        sample_size: rows kept for what cannot be summed up, such as the geometric median.
    """

    def __init__(self, hook_point: str, outlier_norm_factor: float, drops_outliers: bool, sample_size: int) -> None:
        self.hook_point, self.outlier_norm_factor, self.drops_outliers = hook_point, outlier_norm_factor, drops_outliers
        self.moments = RunningCovariance()
        self.norms = NormHistogram()
        """Of all candidates, outliers included: the median that outliers are judged by."""
        self.kept_norms = NormHistogram()
        self.norm_sum = self.squares = self.largest_norm = 0.0
        self.zeros = 0
        self.directions: Tensor | None = None
        """Sum of x / ‖x‖ over the tokens with x ≠ 0."""
        self.sample = EvenSample(sample_size)
        self.outliers = OutlierCounts()
        self.special: dict[int, tuple[int, float]] = {}
        """Token id → occurrences and sum of their norms."""

    def update(self, activations: Float[Tensor, "M D"], positions: Positions) -> None:
        """Take in the activations of one batch.

        Raises:
            NonFiniteError: NaN or infinity among the positions that are kept.
        """
        device = activations.device
        self._update_special(activations, positions)
        kept = positions.kept.to(device)
        x = in_float64(activations[kept])
        norms = x.norm(dim=1).cpu()
        if not norms.isfinite().all():
            raise NonFiniteError(
                f"the activations of {self.hook_point} hold NaN or infinity at {int((~norms.isfinite()).sum())} of {len(norms)} tokens; "
                "run the language model in float32 or bfloat16"
            )
        self.norms.update(norms)
        median = self.norms.value()
        outlying = norms > self.outlier_norm_factor * median if median is not None else torch.zeros_like(norms, dtype=torch.bool)
        if bool(outlying.any()):
            assert median is not None
            tokens, places = (None if values is None else values[positions.kept][outlying] for values in (positions.tokens, positions.place))
            assert tokens is not None
            self.outliers.update(norms[outlying], median, tokens, places)
            if self.drops_outliers:
                x, norms = x[~outlying.to(x.device)], norms[~outlying]
        self._update_moments(x, norms)

    def _update_moments(self, x: Float[Tensor, "N D"], norms: Float[Tensor, " N"]) -> None:
        if len(x) == 0:
            return
        self.moments.update(x)
        self.kept_norms.update(norms)
        self.norm_sum += float(norms.sum())
        self.squares += float(norms.square().sum())
        self.largest_norm = max(self.largest_norm, float(norms.max()))
        self.zeros += int((norms == 0).sum())
        lengths = norms.to(x.device)[:, None]
        directions = torch.where(lengths > 0, x / torch.where(lengths > 0, lengths, 1.0), 0.0).sum(0)
        self.directions = directions if self.directions is None else self.directions + directions
        self.sample.update(x)

    def _update_special(self, activations: Float[Tensor, "M D"], positions: Positions) -> None:
        ids = positions.tokens[positions.special]
        if len(ids) == 0:
            return
        norms = in_float64(activations[positions.special.to(activations.device)]).norm(dim=1).cpu()
        for token in ids.unique().tolist():
            these = norms[ids == token]
            count, total = self.special.get(token, (0, 0.0))
            self.special[token] = (count + len(these), total + float(these.sum()))

    @property
    def mean_cosine(self) -> float | None:
        """Mean cosine of two different tokens, over all pairs: (‖Σ x/‖x‖‖² - n) / (n (n - 1)). None with fewer than two tokens."""
        n = self.moments.count - self.zeros
        if n < 2 or self.directions is None:
            return None
        return float((self.directions.square().sum() - n) / (n * (n - 1)))


def common(counts: Counter[int], n: int) -> Sequence[tuple[int, int]]:
    """The `n` most frequent, ties by the smaller number, so that the order never depends on that of the stream."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:n]
