"""The functions of `torch_kernels` in C++. Letters: n rows of a block, N tokens, D width, F latents, m or nnz entries."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lm_saes.ops.native.calls import (
    check,
    check_offsets,
    check_pattern,
    check_range,
    run,
)
from lm_saes.ops.sparse_codes import ByLatent, Pattern


def topk(h: Float[Tensor, "n F"], gate_norm: Float[Tensor, " F"] | None, k: int) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """Values and latents of the k largest relu(q) of each row; of equal ones those of lower index.

    Positive entries come first, by ascending latent. Where there are fewer than k, zeros follow at the first latents that are left.
    """
    n_rows, n_latents = h.shape
    if not 0 <= k <= n_latents:
        raise ValueError(f"k must be between 0 and the number of latents, {n_latents}, got {k}")
    check(h=(h, (n_rows, n_latents)), gate_norm=(gate_norm, (n_latents,)))
    values, indices = h.new_empty(n_rows, k), h.new_empty(n_rows, k, dtype=torch.int64)
    if values.numel():
        run("topk", h, gate_norm, n_rows, n_latents, k, values, indices)
    return values, indices


def above(
    h: Float[Tensor, "n F"],
    gate_norm: Float[Tensor, " F"] | None,
    floor: float | Float[Tensor, " F"],
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """All entries with q > floor (a number, or one for each latent) and h > 0, by row, then latent: how many each row has, latent, h, q."""
    n_rows, n_latents = h.shape
    floors, least = (floor, 0.0) if isinstance(floor, Tensor) else (None, floor)
    check(
        h=(h, (n_rows, n_latents)),
        gate_norm=(gate_norm, (n_latents,)),
        floor=(floors, (n_latents,)),
    )
    counts = h.new_empty(n_rows, dtype=torch.int64)
    run("count_above", h, gate_norm, floors, least, n_rows, n_latents, counts)
    ends = counts.cumsum(0)
    n_entries = int(ends[-1]) if n_rows else 0
    indices, values, gates = (
        h.new_empty(n_entries, dtype=torch.int64),
        h.new_empty(n_entries),
        h.new_empty(n_entries),
    )
    run(
        "fill_above",
        h,
        gate_norm,
        floors,
        least,
        n_rows,
        n_latents,
        ends - counts,
        indices,
        values,
        gates,
    )
    return counts, indices, values, gates


def gather_sum(pattern: Pattern, values: Float[Tensor, " nnz"], matrix: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    """codes @ matrix."""
    n_rows, width = pattern.n_rows, matrix.shape[1]
    check_pattern(
        pattern,
        values=(values, pattern.indices.shape),
        matrix=(matrix, (pattern.n_latents, width)),
    )
    sums = matrix.new_empty(n_rows, width)
    run(
        "gather_sum",
        pattern.indices,
        pattern.offsets,
        values,
        matrix,
        n_rows,
        width,
        sums,
    )
    return sums


def reconstruct(
    pattern: Pattern,
    values: Float[Tensor, " nnz"],
    W_D: Float[Tensor, "F D"],
    b_D: Float[Tensor, " D"] | None,
    target: Float[Tensor, "N D"],
) -> tuple[
    Float[Tensor, "N D"],
    Float[Tensor, "N D"],
    Float[Tensor, " N"],
    Float[Tensor, " nnz"],
]:
    """x^ = codes @ W_D + b_D; the residual x^ - target; its squared norm; and the slope <residual, W_D row> of each entry.

    All in one pass over the tokens: the rows of W_D are read once and are still in the cache for the slopes.
    """
    n_rows, width = pattern.n_rows, W_D.shape[1]
    check_pattern(
        pattern,
        values=(values, pattern.indices.shape),
        W_D=(W_D, (pattern.n_latents, width)),
        b_D=(b_D, (width,)),
        target=(target, (n_rows, width)),
    )
    reconstruction, residual = torch.empty_like(target), torch.empty_like(target)
    squared_error, slopes = target.new_empty(n_rows), torch.empty_like(values)
    outputs = reconstruction, residual, squared_error, slopes
    run(
        "reconstruct",
        pattern.indices,
        pattern.offsets,
        values,
        W_D,
        b_D,
        target,
        n_rows,
        width,
        *outputs,
    )
    return outputs


def entry_dots(pattern: Pattern, left: Float[Tensor, "N D"], right: Float[Tensor, "F D"]) -> Float[Tensor, " nnz"]:
    """<left row, right row> of each entry's token and latent."""
    n_rows, width = pattern.n_rows, right.shape[1]
    check_pattern(pattern, left=(left, (n_rows, width)), right=(right, (pattern.n_latents, width)))
    dots = left.new_empty(pattern.indices.shape)
    run("entry_dots", pattern.indices, pattern.offsets, left, right, n_rows, width, dots)
    return dots


def by_latent(pattern: Pattern) -> ByLatent:
    """The entries sorted by latent; those of one latent stay in the order of their tokens."""
    check_pattern(pattern)
    indices, n_latents = pattern.indices, pattern.n_latents
    parts = min(torch.get_num_threads(), 1 + indices.numel() // 4096)
    scratch, offsets = (
        indices.new_empty(parts, n_latents),
        indices.new_empty(n_latents + 1),
    )
    order, rows = torch.empty_like(indices), torch.empty_like(indices)
    run(
        "by_latent",
        indices,
        pattern.offsets,
        pattern.n_rows,
        n_latents,
        parts,
        scratch,
        order,
        rows,
        offsets,
    )
    return ByLatent(order, rows, offsets)


def latent_sums(
    entries: ByLatent,
    values: Float[Tensor, " nnz"],
    matrix: Float[Tensor, "N D"],
    transposed: bool,
) -> Float[Tensor, "_ _"]:
    """codes^T @ matrix [F, D], or transposed [D, F]; contiguous. `entries` as `by_latent` made them."""
    n_rows, width = matrix.shape
    shape, n_latents = values.shape, entries.offsets.numel() - 1
    check(
        order=(entries.order, shape),
        rows=(entries.rows, shape),
        offsets=(entries.offsets, (n_latents + 1,)),
        values=(values, shape),
        matrix=(matrix, (n_rows, width)),
    )
    check_range("rows", entries.rows, n_rows)
    check_range("order", entries.order, values.numel())
    check_offsets(entries.offsets, values.numel())
    sums = matrix.new_empty((width, n_latents) if transposed else (n_latents, width))
    run(
        "latent_sums",
        entries.order,
        entries.rows,
        entries.offsets,
        values,
        matrix,
        n_latents,
        width,
        int(transposed),
        sums,
    )
    return sums
