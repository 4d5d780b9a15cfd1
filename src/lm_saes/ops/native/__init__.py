"""The kernels of sparse.py in C++, for float32 on a CPU: the functions of `torch_kernels`, several times faster.

`applies` says whether they take certain tensors, `available` whether there are any, `describe` which, or why none. Letters: n rows of
a block, N tokens, D width, F latents, m or nnz entries. q is the gate value, h times `gate_norm` where there is one.

Results do not depend on the number of threads (torch's), not in one bit: each row of an output is one thread's own. They do depend
on the instruction set, by rounding. Numbers that are not positive are never selected, nor is NaN; infinity is the largest.
"""

from __future__ import annotations

from lm_saes.ops.native import library
from lm_saes.ops.native.calls import applies
from lm_saes.ops.native.kernels import (
    above,
    by_latent,
    entry_dots,
    gather_sum,
    latent_sums,
    reconstruct,
    topk,
)
from lm_saes.ops.native.library import ENVIRONMENT_VARIABLE, Unavailable
from lm_saes.ops.native.products import Bfloat16, Integers, bfloat16_pays, integers_pay
from lm_saes.ops.native.screening import ScreenedEncoder


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


def screening_pays() -> bool:
    """Whether products in low precision are faster than float32 ones on this processor; by its features, hence the same in every run."""
    return integers_pay() or bfloat16_pays()


__all__ = [
    "ENVIRONMENT_VARIABLE", "Bfloat16", "Integers", "ScreenedEncoder", "above", "applies", "available", "bfloat16_pays", "by_latent", "describe",
    "entry_dots", "gather_sum", "integers_pay", "latent_sums", "reconstruct", "screening_pays", "topk",
]  # fmt: skip
