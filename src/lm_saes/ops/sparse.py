"""Selection, decoding and their gradients in plain torch, without the dense codes: [N, F] is never in memory.

Forward, the encoder product is made for blocks of rows in one buffer, and only what is selected leaves it. Backward, everything
comes down to one operation, rows of a matrix gathered and summed with weights (`embedding_bag`): over the entries of each token for
decoding and dX, over the entries of each latent (a sort of the entries by latent) for dW_E and dW_D. There is no [nnz, D] temporary.

Sums of gradients are made in float32 or wider, also under autocast. Differs from the reference only by rounding, hence in the
selection only where gate values lie within a few ulp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from lm_saes.ops import reference
from lm_saes.ops.reference import Encoder
from lm_saes.ops.sparse_codes import Codes, SparseCodes, at_least_float32

ROWS_AT_ONCE = 1024
"""Tokens per encoder product: large enough for the product to run at full speed, 24 MB at 6144 latents."""
SAMPLED_ROWS = 128
"""Tokens (or one in 32, if that is more) from which BatchTopK guesses how small a gate value may be and still be selected."""
CANDIDATES = (1.25, 4.0)
"""BatchTopK first looks at so many candidates for each entry it needs, by the guess; then at all positive gate values."""

# What does not change by computing it otherwise.
pre_activations = reference.pre_activations
gate_values = reference.gate_values
threshold_codes = reference.threshold_codes
jumprelu = reference.jumprelu


def topk_codes(x: Float[Tensor, "N D"], encoder: Encoder, k: int) -> SparseCodes:
    n_rows, n_latents = x.shape[0], encoder.W.shape[1]
    k = min(k, n_latents)
    pieces = []
    with torch.no_grad():
        for block in _blocks(x, encoder):
            gate, indices = block.q.topk(k, dim=-1, sorted=False)
            values = torch.where(gate > 0, block.h.gather(1, indices), 0.0)
            pieces.append([indices, values, *(factor.gather(1, indices) for factor in block.factors)])
        indices, values, *factors = (torch.cat(piece).flatten() for piece in zip(*pieces, strict=True))
        offsets = torch.arange(n_rows + 1, device=x.device) * k
    return _differentiable(x, encoder, SparseCodes(values, indices, offsets, n_latents), factors)


def batch_topk_codes(x: Float[Tensor, "N D"], encoder: Encoder, k: int, mask: Bool[Tensor, " N"] | None = None) -> SparseCodes:
    n_rows, n_latents = x.shape[0], encoder.W.shape[1]
    with torch.no_grad():
        kept = torch.arange(n_rows, device=x.device) if mask is None else mask.nonzero().flatten()
        x_kept = x if len(kept) == n_rows else x[kept]
        per_row = min(k, n_latents)
        gate, where, values, *factors = _candidates(x_kept, encoder, per_row)
        if gate.numel() > len(kept) * per_row:
            best = gate.topk(len(kept) * per_row, sorted=False).indices.sort().values  # by token, then latent
            where, values, *factors = (entry[best] for entry in (where, values, *factors))
        counts = torch.bincount(kept[where // n_latents], minlength=n_rows)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return _differentiable(x, encoder, SparseCodes(values, where % n_latents, offsets, n_latents), factors)


def decode(codes: Codes, W_D: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    if not isinstance(codes, SparseCodes):
        return reference.decode(codes, W_D)
    # embedding_bag's own gradient to the codes is fast, that to the matrix is slow and comes from _DecoderGradient.
    values = codes.values.to(W_D.dtype)
    product = _gather_sum(codes.indices, codes.offsets, values, W_D.detach())
    return _DecoderGradient.apply(product, W_D, values.detach(), codes.indices, codes.offsets)  # pyright: ignore[reportReturnType]


class _Block(NamedTuple):
    """Some rows of the encoder product. The tensors are buffers: they hold until the next block."""

    start: int
    """The first row."""
    h: Float[Tensor, "n F"]
    q: Float[Tensor, "n F"]
    factors: tuple[Tensor, ...]
    """For a gated linear unit what h is the product of: the linear part and the sigmoid, [n, F] each."""


def _as_autocast(x: Tensor, encoder: Encoder) -> tuple[Tensor, Encoder]:
    """Input and weights of the product in the type that autocast would make it in.

    Left to autocast, the weights would be cast for every block; and where it caches, without gradient for those who use them next.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, encoder
    narrow = torch.get_autocast_dtype(device)
    W, b, *glu, gate_norm = encoder
    return x.to(narrow), Encoder(W.to(narrow), b.to(narrow), *(None if part is None else part.to(narrow) for part in glu), gate_norm=gate_norm)


def _blocks(x: Tensor, encoder: Encoder) -> Iterator[_Block]:
    """The encoder product block by block; one empty block if there are no rows. Call it without gradient."""
    x, (W, b, W_glu, b_glu, gate_norm) = _as_autocast(x, encoder)
    shape = min(len(x), ROWS_AT_ONCE), W.shape[1]
    buffers = [x.new_empty(shape) for _ in range(1 if W_glu is None else 3)]
    gate_norm = None if gate_norm is None else at_least_float32(gate_norm)
    gates = None if gate_norm is None else x.new_empty(shape, dtype=torch.promote_types(x.dtype, gate_norm.dtype))
    for start in range(0, max(len(x), 1), ROWS_AT_ONCE):
        rows = x[start : start + ROWS_AT_ONCE]
        n = len(rows)
        with torch.autocast(x.device.type, enabled=False):
            h, factors = torch.addmm(b, rows, W, out=buffers[0][:n]), ()
            if W_glu is not None and b_glu is not None:
                factors = h, torch.addmm(b_glu, rows, W_glu, out=buffers[1][:n]).sigmoid_()
                h = torch.mul(*factors, out=buffers[2][:n])
            q = at_least_float32(h) if gate_norm is None or gates is None else torch.mul(h, gate_norm, out=gates[:n])
        yield _Block(start, h, q, factors)


def _candidates(x: Tensor, encoder: Encoder, per_row: int) -> list[Tensor]:
    """All entries that could be among the `per_row * len(x)` of largest q > 0, and some more: q, row * F + latent, h, and the factors of h."""
    for share in CANDIDATES:
        floor = _guess_floor(x, encoder, per_row, share)
        found = _entries_above(x, encoder, floor)
        if found[0].numel() >= per_row * len(x) or not floor > 0:
            return found
    return _entries_above(x, encoder, 0.0)


def _guess_floor(x: Tensor, encoder: Encoder, per_row: int, share: float) -> float:
    """The gate value above which `share * per_row` latents lie on each of some evenly spaced tokens, on average; at least 0."""
    sample = x[:: max(1, len(x) // max(SAMPLED_ROWS, len(x) // 32))]
    q = torch.cat([block.q.flatten() for block in _blocks(sample, encoder)])
    rank = int(share * per_row * len(sample))
    return float(q.topk(rank, sorted=False).values.min().clamp(min=0)) if 0 < rank < q.numel() else 0.0


def _entries_above(x: Tensor, encoder: Encoder, floor: float) -> list[Tensor]:
    pieces = []
    for block in _blocks(x, encoder):
        where = (block.q > floor).flatten().nonzero().flatten()
        entries = (part.flatten()[where] for part in (block.q, block.h, *block.factors))
        gate, *rest = entries
        pieces.append([gate, where + block.start * block.q.shape[1], *rest])
    return [torch.cat(piece) for piece in zip(*pieces, strict=True)]


def _gather_sum(indices: Tensor, offsets: Tensor, weights: Tensor, matrix: Float[Tensor, "R D"]) -> Float[Tensor, "bags D"]:
    """For each bag of entries the sum of the matrix rows that they name, each times its weight."""
    return embedding_bag(indices, matrix, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


class _ByLatent:
    """The entries of sparse codes, sorted by latent: what the gradient of a weight matrix sums over."""

    def __init__(self, indices: Int64[Tensor, " nnz"], rows: Int64[Tensor, " nnz"], n_latents: int) -> None:
        self.order = indices.sort(stable=True).indices
        self.rows = rows[self.order]
        counts = torch.bincount(indices, minlength=n_latents)
        self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def sums(self, values: Float[Tensor, " nnz"], matrix: Float[Tensor, "N D"]) -> Float[Tensor, "F D"]:
        """codes^T @ matrix, in float32 or wider."""
        matrix = at_least_float32(matrix)
        return _gather_sum(self.rows, self.offsets, values.to(matrix.dtype)[self.order], matrix)


class _DecoderGradient(torch.autograd.Function):
    """The identity on a product codes @ W_D that is constant in W_D; backward adds the gradient dW_D = codes^T @ gradient."""

    @staticmethod
    def forward(ctx, product: Tensor, W_D: Tensor, values: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, offsets)
        ctx.n_latents, ctx.dtype = W_D.shape[0], W_D.dtype
        return product.view_as(product)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        to_weight = None
        if ctx.needs_input_grad[1]:
            values, indices, offsets = ctx.saved_tensors
            rows = SparseCodes(values, indices, offsets, ctx.n_latents).rows
            to_weight = _ByLatent(indices, rows, ctx.n_latents).sums(values, gradient).to(ctx.dtype)
        return gradient, to_weight, None, None, None


def _differentiable(x: Tensor, encoder: Encoder, codes: SparseCodes, factors: list[Tensor]) -> SparseCodes:
    """The codes, their values differentiable in x and the weights of the encoder."""
    parts = (x, encoder.W, encoder.b, encoder.W_glu, encoder.b_glu)
    values = _Selected.apply(*parts, codes.values, codes.indices, codes.offsets, *factors)
    return SparseCodes(values, codes.indices, codes.offsets, codes.n_latents)  # pyright: ignore[reportArgumentType]


class _Selected(torch.autograd.Function):
    """Selected pre-activations, already computed, as a function of what they were computed from. Entries that are zero get no gradient."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        W_glu: Tensor | None,
        b_glu: Tensor | None,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, W, W_glu, values > 0, indices, offsets, *factors)
        ctx.bias_dtypes = b.dtype, None if b_glu is None else b_glu.dtype
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, W_glu, fires, indices, offsets, *factors = ctx.saved_tensors
        gradient = torch.where(fires, at_least_float32(gradients[0]), 0.0)
        to_h = [gradient]  # to x W + b, and to x W_glu + b_glu
        if factors:
            linear, sigmoid = (at_least_float32(factor) for factor in factors)
            to_h = [gradient * sigmoid, gradient * linear * sigmoid * (1 - sigmoid)]
        needs_x, *needs = ctx.needs_input_grad[:5]
        by_latent = None
        result: list[Tensor | None] = [None] * 5
        for i, (to, weight) in enumerate(zip(to_h, (W, W_glu), strict=False)):
            n_latents = weight.shape[1]
            if needs[2 * i]:
                by_latent = by_latent or _ByLatent(indices, SparseCodes(gradient, indices, offsets, n_latents).rows, n_latents)
                result[1 + 2 * i] = by_latent.sums(to, x).t().to(weight.dtype, memory_format=torch.contiguous_format)
            if needs[2 * i + 1]:
                result[2 + 2 * i] = to.new_zeros(n_latents).index_add_(0, indices, to).to(ctx.bias_dtypes[i])
            if needs_x:
                share = _gather_sum(indices, offsets, to, at_least_float32(weight.t())).to(x.dtype)
                result[0] = share if result[0] is None else result[0] + share
        return *result, *[None] * (3 + len(factors))
