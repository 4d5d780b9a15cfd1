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
from lm_saes.ops.native.products import Bounds, Latents, Rounding, floor_keys

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

    It holds until the weights change; `update` then makes a pass over them and reuses the memory: W again, and W in low precision.

    Args:
        W: [D, F].
        b: [F].
        gate_norm: [F], what h is multiplied with for the gate value, at least 0; or None.
        rounding: the kind of product, one of `products`.
    """

    def __init__(self, W: Float[Tensor, "D F"], b: Float[Tensor, " F"], gate_norm: Float[Tensor, " F"] | None, rounding: type[Rounding]) -> None:
        width, n_latents = W.shape
        self._transposed, self._rounding = torch.empty(n_latents, width), rounding(width, n_latents)
        self._most = min(n_latents, max(n_latents // CANDIDATES, 64))
        self.update(W, b, gate_norm)

    def update(self, W: Float[Tensor, "D F"], b: Float[Tensor, " F"], gate_norm: Float[Tensor, " F"] | None = None) -> None:
        """The same for other weights of the same shape."""
        n_latents, width = self._transposed.shape
        check(W=(W, (width, n_latents)), b=(b, (n_latents,)), gate_norm=(gate_norm, (n_latents,)))
        self.W, self.b, self.gate_norm = (W.detach(), b.detach(), None if gate_norm is None else gate_norm.detach())
        self._rounding.update(self.W, self._transposed)
        self._latents: Latents | None = None

    def topk(self, x: Float[Tensor, "N D"], k: int) -> Selection:
        """The k largest relu(q) of each row: values [N, k] of h, 0 where q is not positive, and latents, as `kernels.topk` orders them."""
        n_rows, width, n_latents = len(x), *self.W.shape
        if not 0 <= k <= n_latents:
            raise ValueError(f"k must be between 0 and the number of latents, {n_latents}, got {k}")
        values, indices = (x.new_empty(n_rows, k), x.new_empty(n_rows, k, dtype=torch.int64))
        products = torch.zeros(n_rows, dtype=torch.int64)
        if not values.numel():
            return Selection(values, indices, products)
        latents = self._latents_for(x)
        most = min(n_latents, max(self._most, 2 * k))
        for piece in self._rounding.bounds(x, latents, k):
            rows, arguments = piece.rows, (*piece[1:], *self._about(latents), len(piece.keys), width, n_latents, k, most)
            run("screened_topk", x[rows], *arguments, values[rows], indices[rows], products[rows])
        left = (products < 0).nonzero().flatten()
        if len(left):
            values[left], indices[left] = topk(torch.addmm(self.b, x[left], self.W), self.gate_norm, k)
        return Selection(values, indices, products)

    def above(self, x: Float[Tensor, "N D"], floor: float | Float[Tensor, " F"]) -> Entries:
        """All entries with q > floor (a number, or one for each latent) and h > 0, by row, then latent."""
        floors, least = (floor, 0.0) if isinstance(floor, Tensor) else (None, floor)
        check(floor=(floors, self.b.shape))
        latents = self._latents_for(x)
        keys = floor_keys(self.b.new_full(self.b.shape, least) if floors is None else floors)
        pieces = [self._above(x[piece.rows], piece, latents, keys, floors, least) for piece in self._rounding.bounds(x, latents, 0)]
        counts, products, indices, values, gate = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        return Entries(counts, indices, values, gate, products)

    def _above(self, x: Tensor, piece: Bounds, latents: Latents, keys: Tensor, floors: Tensor | None, least: float) -> tuple[Tensor, ...]:
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
        about = (*piece[1:5], *self._about(latents), keys, floors, least)
        run("screened_above", x, *about, n_rows, width, n_latents, left, offsets, counts, *entries)
        if exact is not None:
            shift = offsets[where] - (exact[0].cumsum(0) - exact[0])
            at = torch.arange(len(exact[1])) + shift.repeat_interleave(exact[0])
            for entry, part in zip(entries, exact[1:], strict=True):
                entry[at] = part
        run("close_gaps", offsets, counts, n_rows, *entries)
        n_entries = int(counts.sum())
        return (counts, possible.masked_fill(left, -1), *(entry[:n_entries] for entry in entries))

    def _latents_for(self, x: Float[Tensor, "N D"]) -> Latents:
        """Around the mean of the first rows that were asked for; it takes a pass over the weights."""
        check(x=(x, (len(x), len(self.W))))
        if self._latents is None:
            mean = x.mean(0)
            if not mean.isfinite().all():  # of no rows, or some rows are not finite
                mean = torch.zeros_like(mean)
            self._latents = Latents(mean, float(mean.double().norm()), torch.mv(self.W.t(), mean) + self.b, self.gate_norm)
        return self._latents

    def _about(self, latents: Latents) -> tuple[Tensor | float | None, ...]:
        """What the kernels are told about the weights."""
        rounding = self._rounding
        of_bounds = (rounding.norms, rounding.errors, latents.centred, latents.gate_norm, latents.centre_norm)
        return (self._transposed, rounding.records, self.b, *of_bounds)
