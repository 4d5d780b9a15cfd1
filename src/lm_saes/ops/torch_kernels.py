"""The kernels of sparse.py in plain torch, for every device and data type. They know no autograd.

Letters: n rows of a block, N tokens, D width, F latents, m or nnz entries. q is the gate value, h times `gate_norm` where there is one.
Everything comes down to rows of a matrix gathered and summed with weights (`embedding_bag`): over the entries of each token for
decoding, over the entries of each latent (after a sort) for the gradients of weights. There is no [nnz, D] temporary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag

from lm_saes.devices import fast_linear
from lm_saes.ops.sparse_codes import ByLatent, Pattern, at_least_float32


def applies(*tensors: Tensor | None) -> bool:  # noqa: ARG001
    """They take everything."""
    return True


def affine(x: Float[Tensor, "n D"], W: Float[Tensor, "D F"], b: Float[Tensor, " F"], out: Float[Tensor, "n F"]) -> Float[Tensor, "n F"]:
    """x W + b, perhaps in `out`."""
    product = fast_linear(x, W.t(), b)
    return torch.addmm(b, x, W, out=out) if product is None else product


def topk(h: Float[Tensor, "n F"], gate_norm: Float[Tensor, " F"] | None, k: int) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """Values and latents of the k largest relu(q) of each row, in no order. A value is h, 0 where q is not positive."""
    gate, indices = _gate(h, gate_norm).topk(k, dim=-1, sorted=False)
    return torch.where(gate > 0, h.gather(1, indices), 0.0), indices


def above(
    h: Float[Tensor, "n F"], gate_norm: Float[Tensor, " F"] | None, floor: float | Tensor
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """All entries with q > floor (a number, or one for each latent) and h > 0, by row, then latent: how many each row has, latent, h, q."""
    q = _gate(h, gate_norm)
    chosen = q > floor
    if isinstance(floor, Tensor) or floor < 0:  # else q > floor says that h > 0
        chosen &= h > 0
    where = chosen.flatten().nonzero().flatten()
    return torch.bincount(where // h.shape[1], minlength=len(h)), where % h.shape[1], h.flatten()[where], q.flatten()[where]


def gather_sum(pattern: Pattern, values: Float[Tensor, " nnz"], matrix: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    """codes @ matrix."""
    return _bags(pattern.indices, pattern.offsets, values, matrix)


def reconstruct(
    pattern: Pattern, values: Float[Tensor, " nnz"], W_D: Float[Tensor, "F D"], b_D: Float[Tensor, " D"] | None, target: Float[Tensor, "N D"]
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"], Float[Tensor, " N"], Float[Tensor, " nnz"]]:
    """x^ = codes @ W_D + b_D; the residual x^ - target; its squared norm; and the slope <residual, W_D row> of each entry."""
    weights = values.detach().requires_grad_()  # embedding_bag's own gradient to its weights is the slopes
    with torch.enable_grad():
        product = _bags(pattern.indices, pattern.offsets, weights, W_D)
    reconstruction = product.detach() if b_D is None else product.detach() + b_D
    residual = at_least_float32(reconstruction) - at_least_float32(target)
    slopes = torch.autograd.grad(product, weights, residual.to(product.dtype))[0]
    return reconstruction, residual, residual.square().sum(-1), at_least_float32(slopes)


def entry_dots(pattern: Pattern, left: Float[Tensor, "N D"], right: Float[Tensor, "F D"]) -> Float[Tensor, " nnz"]:
    """<left row, right row> of each entry's token and latent, in float32 or wider."""
    left, right = at_least_float32(left), at_least_float32(right)
    weights = left.new_zeros(pattern.indices.shape, requires_grad=True)
    with torch.enable_grad():
        product = _bags(pattern.indices, pattern.offsets, weights, right.to(left.dtype))
    return torch.autograd.grad(product, weights, left)[0]


def by_latent(pattern: Pattern) -> ByLatent:
    """The entries sorted by latent; those of one latent stay in the order of their tokens."""
    order = pattern.indices.sort(stable=True).indices
    counts = torch.bincount(pattern.indices, minlength=pattern.n_latents)
    return ByLatent(order, pattern.rows[order], torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def latent_sums(entries: ByLatent, values: Float[Tensor, " nnz"], matrix: Float[Tensor, "N D"], transposed: bool) -> Float[Tensor, "_ _"]:
    """codes^T @ matrix [F, D], or transposed [D, F], in float32 or wider."""
    matrix = at_least_float32(matrix)
    sums = _bags(entries.rows, entries.offsets, values.to(matrix.dtype)[entries.order], matrix)
    return sums.t().contiguous() if transposed else sums


def _gate(h: Float[Tensor, "n F"], gate_norm: Float[Tensor, " F"] | None) -> Float[Tensor, "n F"]:
    return at_least_float32(h) if gate_norm is None else at_least_float32(h) * at_least_float32(gate_norm)


def _bags(indices: Tensor, offsets: Tensor, weights: Tensor, matrix: Float[Tensor, "R D"]) -> Float[Tensor, "bags D"]:
    """For each bag of entries the sum of the matrix rows that they name, each times its weight."""
    return embedding_bag(indices, matrix, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
