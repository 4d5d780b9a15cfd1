"""The sparse form of codes, and the little algebra on codes of either form that losses and metrics need."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class ByLatent(NamedTuple):
    """The entries of sparse codes, sorted by latent: what the gradient of a weight matrix sums over."""

    order: Int64[Tensor, " nnz"]
    """Which entry comes where; entries of one latent stay in the order of their tokens."""
    rows: Int64[Tensor, " nnz"]
    """The token of each entry, in that order."""
    offsets: Int64[Tensor, " ends"]
    """[F + 1]: latent i has the places `offsets[i] : offsets[i + 1]`."""


class Pattern:
    """Where sparse codes have their entries; shared by all codes that are functions of one another, so that it is sorted once."""

    def __init__(self, indices: Int64[Tensor, " nnz"], offsets: Int64[Tensor, " ends"], n_latents: int) -> None:
        self.indices, self.offsets, self.n_latents = indices, offsets, n_latents
        self.by_latent: ByLatent | None = None
        """Filled in by the first gradient that needs it."""

    @property
    def n_rows(self) -> int:
        """N."""
        return self.offsets.numel() - 1

    @cached_property
    def rows(self) -> Int64[Tensor, " nnz"]:
        """The token of each entry."""
        numbers = torch.arange(self.n_rows, device=self.offsets.device)
        return numbers.repeat_interleave(self.offsets.diff(), output_size=self.indices.numel())


class SparseCodes:
    """Codes of N tokens over F latents, row by row (CSR-like).

    Row n holds the entries `offsets[n] : offsets[n + 1]`, no latent twice. Entries may be zero: TopK has a constant number of
    entries per token and BatchTopK per batch, those that did not fire are zeros without gradient; JumpReLU has, beside what fires,
    the entries in the window of its threshold, whose gradient moves the threshold. Gradients flow through `values`.

    Args:
        values: [nnz].
        indices: [nnz] int64, the latent of each entry.
        offsets: [N + 1] int64, from 0 to nnz.
        n_latents: F.
    """

    def __init__(self, values: Float[Tensor, " nnz"], indices: Int64[Tensor, " nnz"], offsets: Int64[Tensor, " ends"], n_latents: int) -> None:
        self.values, self.pattern = values, Pattern(indices, offsets, n_latents)

    def with_values(self, values: Float[Tensor, " nnz"]) -> SparseCodes:
        """Other values in the same places."""
        codes = object.__new__(SparseCodes)
        codes.values, codes.pattern = values, self.pattern
        return codes

    @property
    def indices(self) -> Int64[Tensor, " nnz"]:
        """The latent of each entry."""
        return self.pattern.indices

    @property
    def offsets(self) -> Int64[Tensor, " ends"]:
        """[N + 1], from 0 to nnz."""
        return self.pattern.offsets

    @property
    def n_latents(self) -> int:
        """F."""
        return self.pattern.n_latents

    @property
    def n_rows(self) -> int:
        """N."""
        return self.pattern.n_rows

    @property
    def rows(self) -> Int64[Tensor, " nnz"]:
        """The token of each entry."""
        return self.pattern.rows

    def to_dense(self) -> Float[Tensor, "N F"]:
        """The same codes as a matrix; differentiable."""
        flat = self.values.new_zeros(self.n_rows * self.n_latents)
        return flat.index_add(0, self.rows * self.n_latents + self.indices, self.values).view(self.n_rows, self.n_latents)

    def counts(self) -> Int64[Tensor, " N"]:
        """L0: the number of non-zero entries of each row."""
        return torch.zeros_like(self.offsets[1:]).index_add(0, self.rows, (self.values != 0).long())

    @classmethod
    def from_dense(cls, codes: Float[Tensor, "N F"]) -> SparseCodes:
        """The non-zero entries of a matrix; differentiable in them."""
        rows, indices = codes.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=codes.shape[0])
        return cls(codes[rows, indices], indices, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), codes.shape[1])


Codes = Tensor | SparseCodes
"""Dense [N, F], or sparse."""


def to_dense(codes: Codes) -> Float[Tensor, "N F"]:
    """Codes of either form as a matrix."""
    return codes.to_dense() if isinstance(codes, SparseCodes) else codes


def counts(codes: Codes) -> Int64[Tensor, " N"]:
    """L0 of each row."""
    return codes.counts() if isinstance(codes, SparseCodes) else (codes != 0).sum(-1)


def entries(codes: Codes) -> Tensor:
    """All stored entries, zeros among them."""
    return codes.values if isinstance(codes, SparseCodes) else codes


def map_codes(codes: Codes, function: Callable[[Tensor], Tensor]) -> Codes:
    """`function` of every entry, in the same form. It must be elementwise and map zero to zero."""
    if isinstance(codes, SparseCodes):
        return codes.with_values(function(codes.values))
    return function(codes)


def scale_latents(codes: Codes, scale: Float[Tensor, " F"]) -> Codes:
    """Each latent times its own factor, in the same form, in at least float32."""
    if isinstance(codes, SparseCodes):
        return codes.with_values(at_least_float32(codes.values) * scale.index_select(0, codes.indices))
    return at_least_float32(codes) * scale


def latent_range(codes: Codes, start: int, stop: int) -> Codes:
    """The codes of the latents from `start` to before `stop` alone, [N, stop - start], in the same form; differentiable."""
    if not isinstance(codes, SparseCodes):
        return codes[:, start:stop]
    inside = ((codes.indices >= start) & (codes.indices < stop)).nonzero().flatten()
    return SparseCodes(codes.values[inside], codes.indices[inside] - start, torch.searchsorted(inside, codes.offsets), stop - start)


def row_sums(codes: Codes) -> Float[Tensor, " N"]:
    """The sum of each row."""
    if isinstance(codes, SparseCodes):
        return codes.values.new_zeros(codes.n_rows).index_add(0, codes.rows, codes.values)
    return codes.sum(-1)


def latent_sums(codes: Codes, row_weights: Float[Tensor, " N"]) -> Float[Tensor, " F"]:
    """The weighted sum of each latent over the rows."""
    if isinstance(codes, SparseCodes):
        weighted = codes.values * row_weights[codes.rows].to(codes.values.dtype)
        return weighted.new_zeros(codes.n_latents).index_add(0, codes.indices, weighted)
    return (row_weights.to(codes.dtype)[:, None] * codes).sum(0)  # not a matrix product: autocast would make it in half precision


def at_least_float32(tensor: Tensor) -> Tensor:
    """float32 for narrower floats, else unchanged: comparisons and sums are never made in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
