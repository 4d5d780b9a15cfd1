"""Screened selection: what the float32 encoder product would select, from a product in low precision and a few exact ones.

Processors multiply matrices of short numbers several times faster. The rounded product cannot be trusted with the selection, but it bounds
each gate value (the derivation stands in screen.h), and what lies too low for certain need not be known better. Of the candidates, some more
than are selected, those are computed in float32 that a closer look does not rule out, and these values decide. So the selection and the values are those of a float32 product, up to
the rounding of a float32 product; nothing is left to chance. Rows with too many candidates get a float32 product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lm_saes.ops.native.calls import check, run
from lm_saes.ops.native.kernels import above, topk
from lm_saes.ops.native.products import Bounds, Rounding, floor_keys

CANDIDATES = 8
"""A row with more than F / 8 candidates gets a product of its own: computing so many of them one by one takes as long."""


class Selection(NamedTuple):
    """The k largest entries of each row."""

    values: Float[Tensor, "N k"]
    indices: Int64[Tensor, "N k"]
    products: Int64[Tensor, " N"]
    """How many entries of each row were computed one by one; -1: the whole row was, in float32, since there were too many candidates."""


class Entries(NamedTuple):
    """All entries above a floor, by row, then latent."""

    counts: Int64[Tensor, " N"]
    indices: Int64[Tensor, " m"]
    values: Float[Tensor, " m"]
    gate: Float[Tensor, " m"]
    products: Int64[Tensor, " N"]
    """How many entries of each row were computed one by one; -1: the whole row was, in float32, since there were too many candidates."""


class ScreenedEncoder:
    """An encoder product of which only the largest entries are wanted: the weights, as screening needs them.

    It holds until the weights change. The first call then makes a pass over them, into memory that is used again: W transposed, and W in low precision.

    Args:
        W: [D, F].
        b: [F].
        gate_norm: [F], what h is multiplied with for the gate value, at least 0; or None.
        rounding: the kind of product, one of `products`.
    """

    def __init__(self, W: Float[Tensor, "D F"], b: Float[Tensor, " F"], gate_norm: Float[Tensor, " F"] | None, rounding: type[Rounding]) -> None:
        self._rounding = rounding(*W.shape)
        self._most = min(W.shape[1], max(W.shape[1] // CANDIDATES, 64))
        self.update(W, b, gate_norm)

    def update(self, W: Float[Tensor, "D F"], b: Float[Tensor, " F"], gate_norm: Float[Tensor, " F"] | None = None) -> None:
        """The same for other weights of the same shape."""
        width, n_latents = self._rounding.width, self._rounding.n_latents
        check(W=(W, (width, n_latents)), b=(b, (n_latents,)), gate_norm=(gate_norm, (n_latents,)))
        self.W, self.b, self.gate_norm = (W.detach(), b.detach(), None if gate_norm is None else gate_norm.detach())
        self._is_rounded = False

    def topk(self, x: Float[Tensor, "N D"], k: int) -> Selection:
        """The k largest relu(q) of each row: values [N, k] of h, 0 where q is not positive, and latents, as `kernels.topk` orders them."""
        n_rows, width, n_latents = len(x), *self.W.shape
        if not 0 <= k <= n_latents:
            raise ValueError(f"k must be between 0 and the number of latents, {n_latents}, got {k}")
        values, indices = (x.new_empty(n_rows, k), x.new_empty(n_rows, k, dtype=torch.int64))
        products = torch.zeros(n_rows, dtype=torch.int64)
        if not values.numel():
            return Selection(values, indices, products)
        rounding = self._rounded_around(x)
        weights, most = (rounding.transposed, rounding.records, self.b, *rounding.of_bounds), min(n_latents, max(self._most, 2 * k))
        for piece in rounding.bounds(x, k):
            rows, arguments = piece.rows, (*piece[1:], *weights, len(piece.keys), width, n_latents, k, most)
            run("screened_topk", x[rows], *arguments, values[rows], indices[rows], products[rows])
        left = (products < 0).nonzero().flatten()
        if len(left):
            values[left], indices[left] = topk(torch.addmm(self.b, x[left], self.W), self.gate_norm, k)
        return Selection(values, indices, products)

    def above(self, x: Float[Tensor, "N D"], floor: float | Float[Tensor, " F"]) -> Entries:
        """All entries with q > floor (a number, or one for each latent) and h > 0, by row, then latent."""
        floors, least = (floor, 0.0) if isinstance(floor, Tensor) else (None, floor)
        check(floor=(floors, self.b.shape))
        rounding = self._rounded_around(x)
        keys = floor_keys(self.b.new_full(self.b.shape, least) if floors is None else floors)
        pieces = [self._above(x[piece.rows], piece, rounding, keys, floors, least) for piece in rounding.bounds(x, 0)]
        counts, products, indices, values, gate = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        return Entries(counts, indices, values, gate, products)

    def _above(self, x: Tensor, piece: Bounds, rounding: Rounding, keys: Tensor, floors: Tensor | None, least: float) -> tuple[Tensor, ...]:
        n_rows, (width, n_latents) = len(x), self.W.shape
        possible = x.new_empty(n_rows, dtype=torch.int64)
        run("screened_count", piece.keys, keys, n_rows, n_latents, possible)
        left = possible > self._most
        room, where, exact = possible, left.nonzero().flatten(), None
        if len(where):
            exact = above(torch.addmm(self.b, x[where], self.W), self.gate_norm, least if floors is None else floors)
            room = possible.index_put((where,), exact[0])
        ends = room.cumsum(0)
        offsets, n_entries = ends - room, int(ends[-1]) if n_rows else 0
        entries = (x.new_empty(n_entries, dtype=torch.int64), x.new_empty(n_entries), x.new_empty(n_entries))
        counts = room.clone()
        about = (*piece[1:5], rounding.transposed, rounding.records, self.b, *rounding.of_bounds, keys, floors, least)
        run("screened_above", x, *about, n_rows, width, n_latents, left, offsets, counts, *entries)
        if exact is not None:
            shift = offsets[where] - (exact[0].cumsum(0) - exact[0])
            at = torch.arange(len(exact[1])) + shift.repeat_interleave(exact[0])
            for entry, part in zip(entries, exact[1:], strict=True):
                entry[at] = part
        run("close_gaps", offsets, counts, n_rows, *entries)
        n_entries = int(counts.sum())
        return (counts, possible.masked_fill(left, -1), *(entry[:n_entries] for entry in entries))

    def _rounded_around(self, x: Float[Tensor, "N D"]) -> Rounding:
        """The rounded weights, for activations around the mean of the first rows that were asked for."""
        check(x=(x, (len(x), len(self.W))))
        if not self._is_rounded:
            mean = x.mean(0)
            if not mean.isfinite().all():  # of no rows, or some rows are not finite
                mean = torch.zeros_like(mean)
            self._rounding.update(self.W, self.b, self.gate_norm, mean)
            self._is_rounded = True
        return self._rounding
