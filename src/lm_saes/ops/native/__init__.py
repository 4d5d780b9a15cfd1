"""The kernels of sparse.py in C++, for float32 on a CPU: the functions of `torch_kernels`, several times faster.

`applies` says whether they take certain tensors, `available` whether there are any, `describe` which, or why none. Letters: n rows of
a block, N tokens, D width, F latents, m or nnz entries. q is the gate value, h times `gate_norm` where there is one.

Results do not depend on the number of threads (torch's), not in one bit: each row of an output is one thread's own. They do depend
on the instruction set, by rounding. Numbers that are not positive are never selected, nor is NaN; infinity is the largest.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lm_saes.ops.native import library
from lm_saes.ops.native.library import ENVIRONMENT_VARIABLE, Unavailable
from lm_saes.ops.sparse_codes import ByLatent, Pattern


def available() -> bool:
    """Whether there are kernels for this machine, compiled from the sources that are here."""
    try:
        library.kernels()
    except Unavailable:
        return False
    return True


def describe() -> str:
    """Which kernels run, or why none does, in one line."""
    try:
        library.kernels()
    except Unavailable as reason:
        return str(reason)
    return f"native kernels for {library.instruction_set()}, on {library.threads()}"


def applies(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: contiguous tensors on a CPU, float32 or int64. None stands for an absent tensor."""
    return all(
        tensor is None or (tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.int64) and tensor.is_contiguous())
        for tensor in tensors
    )


def topk(h: Float[Tensor, "n F"], gate_norm: Float[Tensor, " F"] | None, k: int) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """Values and latents of the k largest relu(q) of each row; of equal ones those of lower index.

    Positive entries come first, by ascending latent. Where there are fewer than k, zeros follow at the first latents that are left.
    """
    n_rows, n_latents = h.shape
    if not 0 <= k <= n_latents:
        raise ValueError(f"k must be between 0 and the number of latents, {n_latents}, got {k}")
    _check(h=(h, (n_rows, n_latents)), gate_norm=(gate_norm, (n_latents,)))
    values, indices = h.new_empty(n_rows, k), h.new_empty(n_rows, k, dtype=torch.int64)
    if values.numel():
        _run("topk", h, gate_norm, n_rows, n_latents, k, values, indices)
    return values, indices


def above(
    h: Float[Tensor, "n F"], gate_norm: Float[Tensor, " F"] | None, floor: float | Float[Tensor, " F"]
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """All entries with q > floor (a number, or one for each latent) and h > 0, by row, then latent: how many each row has, latent, h, q."""
    n_rows, n_latents = h.shape
    floors, least = (floor, 0.0) if isinstance(floor, Tensor) else (None, floor)
    _check(h=(h, (n_rows, n_latents)), gate_norm=(gate_norm, (n_latents,)), floor=(floors, (n_latents,)))
    counts = h.new_empty(n_rows, dtype=torch.int64)
    _run("count_above", h, gate_norm, floors, least, n_rows, n_latents, counts)
    ends = counts.cumsum(0)
    n_entries = int(ends[-1]) if n_rows else 0
    indices, values, gates = h.new_empty(n_entries, dtype=torch.int64), h.new_empty(n_entries), h.new_empty(n_entries)
    _run("fill_above", h, gate_norm, floors, least, n_rows, n_latents, ends - counts, indices, values, gates)
    return counts, indices, values, gates


def gather_sum(pattern: Pattern, values: Float[Tensor, " nnz"], matrix: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    """codes @ matrix."""
    n_rows, width = pattern.n_rows, matrix.shape[1]
    _check_pattern(pattern, values=(values, pattern.indices.shape), matrix=(matrix, (pattern.n_latents, width)))
    sums = matrix.new_empty(n_rows, width)
    _run("gather_sum", pattern.indices, pattern.offsets, values, matrix, n_rows, width, sums)
    return sums


def reconstruct(
    pattern: Pattern, values: Float[Tensor, " nnz"], W_D: Float[Tensor, "F D"], b_D: Float[Tensor, " D"] | None, target: Float[Tensor, "N D"]
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"], Float[Tensor, " N"], Float[Tensor, " nnz"]]:
    """x^ = codes @ W_D + b_D; the residual x^ - target; its squared norm; and the slope <residual, W_D row> of each entry.

    All in one pass over the tokens: the rows of W_D are read once and are still in the cache for the slopes.
    """
    n_rows, width = pattern.n_rows, W_D.shape[1]
    _check_pattern(
        pattern,
        values=(values, pattern.indices.shape),
        W_D=(W_D, (pattern.n_latents, width)),
        b_D=(b_D, (width,)),
        target=(target, (n_rows, width)),
    )
    reconstruction, residual = torch.empty_like(target), torch.empty_like(target)
    squared_error, slopes = target.new_empty(n_rows), torch.empty_like(values)
    outputs = reconstruction, residual, squared_error, slopes
    _run("reconstruct", pattern.indices, pattern.offsets, values, W_D, b_D, target, n_rows, width, *outputs)
    return outputs


def entry_dots(pattern: Pattern, left: Float[Tensor, "N D"], right: Float[Tensor, "F D"]) -> Float[Tensor, " nnz"]:
    """<left row, right row> of each entry's token and latent."""
    n_rows, width = pattern.n_rows, right.shape[1]
    _check_pattern(pattern, left=(left, (n_rows, width)), right=(right, (pattern.n_latents, width)))
    dots = left.new_empty(pattern.indices.shape)
    _run("entry_dots", pattern.indices, pattern.offsets, left, right, n_rows, width, dots)
    return dots


def by_latent(pattern: Pattern) -> ByLatent:
    """The entries sorted by latent; those of one latent stay in the order of their tokens."""
    _check_pattern(pattern)
    indices, n_latents = pattern.indices, pattern.n_latents
    parts = min(torch.get_num_threads(), 1 + indices.numel() // 4096)
    scratch, offsets = indices.new_empty(parts, n_latents), indices.new_empty(n_latents + 1)
    order, rows = torch.empty_like(indices), torch.empty_like(indices)
    _run("by_latent", indices, pattern.offsets, pattern.n_rows, n_latents, parts, scratch, order, rows, offsets)
    return ByLatent(order, rows, offsets)


def latent_sums(entries: ByLatent, values: Float[Tensor, " nnz"], matrix: Float[Tensor, "N D"], transposed: bool) -> Float[Tensor, "_ _"]:
    """codes^T @ matrix [F, D], or transposed [D, F]; contiguous. `entries` as `by_latent` made them."""
    n_rows, width = matrix.shape
    shape, n_latents = values.shape, entries.offsets.numel() - 1
    _check(
        order=(entries.order, shape),
        rows=(entries.rows, shape),
        offsets=(entries.offsets, (n_latents + 1,)),
        values=(values, shape),
        matrix=(matrix, (n_rows, width)),
    )
    _check_range("rows", entries.rows, n_rows)
    _check_range("order", entries.order, values.numel())
    _check_offsets(entries.offsets, values.numel())
    sums = matrix.new_empty((width, n_latents) if transposed else (n_latents, width))
    _run("latent_sums", entries.order, entries.rows, entries.offsets, values, matrix, n_latents, width, int(transposed), sums)
    return sums


def _run(name: str, *arguments: Tensor | float | None) -> None:
    pointers = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    getattr(library.kernels(), f"lm_saes_{name}")(*pointers, torch.get_num_threads())


def _check(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """The kernels would read whatever lies at an address: everything about it is checked here."""
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")
        dtype = torch.int64 if name in ("order", "rows", "offsets", "indices") else torch.float32
        if tensor.dtype != dtype or not applies(tensor):
            kind = "contiguous" if tensor.is_contiguous() else "strided"
            raise ValueError(f"{name} must be a contiguous {dtype} tensor on the CPU, got a {kind} {tensor.dtype} one on {tensor.device}")


def _check_pattern(pattern: Pattern, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    indices, offsets = pattern.indices, pattern.offsets
    _check(indices=(indices, (indices.numel(),)), offsets=(offsets, (offsets.numel(),)), **tensors)
    _check_range("indices", indices, pattern.n_latents)
    _check_offsets(offsets, indices.numel())


def _check_range(name: str, numbers: Int64[Tensor, " n"], end: int) -> None:
    kernels = library.kernels()
    if not kernels.lm_saes_all_below(numbers.data_ptr(), numbers.numel(), end):
        raise ValueError(f"{name} must lie between 0 and {end - 1}, got {int(numbers.min())} to {int(numbers.max())}")


def _check_offsets(offsets: Int64[Tensor, " ends"], n_entries: int) -> None:
    if not library.kernels().lm_saes_ascend(offsets.data_ptr(), offsets.numel(), n_entries):
        raise ValueError(f"offsets must ascend from 0 to the number of entries, {n_entries}")


__all__ = [
    "ENVIRONMENT_VARIABLE", "above", "applies", "available", "by_latent", "describe", "entry_dots", "gather_sum", "latent_sums", "reconstruct",
    "topk",
]  # fmt: skip
