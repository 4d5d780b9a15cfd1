"""Calls of the kernels: which tensors they take, and the checks before an address is passed on."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from lm_saes.ops.native import library
from lm_saes.ops.sparse_codes import Pattern


def applies(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: contiguous tensors on a CPU, float32 or int64. None stands for an absent tensor."""
    return all(
        tensor is None or (tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.int64) and tensor.is_contiguous())
        for tensor in tensors
    )


def run(name: str, *arguments: Tensor | float | None) -> None:
    pointers = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    getattr(library.kernels(), f"lm_saes_{name}")(*pointers, torch.get_num_threads())


def check(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
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


def check_pattern(pattern: Pattern, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    indices, offsets = pattern.indices, pattern.offsets
    check(
        indices=(indices, (indices.numel(),)),
        offsets=(offsets, (offsets.numel(),)),
        **tensors,
    )
    check_range("indices", indices, pattern.n_latents)
    check_offsets(offsets, indices.numel())


def check_range(name: str, numbers: Int64[Tensor, " n"], end: int) -> None:
    kernels = library.kernels()
    if not kernels.lm_saes_all_below(numbers.data_ptr(), numbers.numel(), end):
        raise ValueError(f"{name} must lie between 0 and {end - 1}, got {int(numbers.min())} to {int(numbers.max())}")


def check_offsets(offsets: Int64[Tensor, " ends"], n_entries: int) -> None:
    if not library.kernels().lm_saes_ascend(offsets.data_ptr(), offsets.numel(), n_entries):
        raise ValueError(f"offsets must ascend from 0 to the number of entries, {n_entries}")
