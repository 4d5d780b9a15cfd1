"""Finds, checks and opens the library of kernels for this processor."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

from lm_saes.errors import ConfigError
from lm_saes.ops.native import build

ENVIRONMENT_VARIABLE = "LM_SAES_NATIVE_ISA"
_AVX2, _AVX512, _FAST_BFLOAT16, _MATRIX_UNIT = 1, 2, 4, 8  # bits of lm_saes_features
_NEEDED = {"avx512": _AVX512, "avx2": _AVX2, "generic": 0}

_pointer, _int64, _int, _float = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_float,
)
_SIGNATURES = {
    "topk": [_pointer] * 2 + [_int64] * 3 + [_pointer] * 2 + [_int],
    "count_above": [_pointer] * 3 + [_float] + [_int64] * 2 + [_pointer] + [_int],
    "fill_above": [_pointer] * 3 + [_float] + [_int64] * 2 + [_pointer] * 4 + [_int],
    "gather_sum": [_pointer] * 4 + [_int64] * 2 + [_pointer] + [_int],
    "entry_dots": [_pointer] * 4 + [_int64] * 2 + [_pointer] + [_int],
    "reconstruct": [_pointer] * 6 + [_int64] * 2 + [_pointer] * 4 + [_int],
    "by_latent": [_pointer] * 2 + [_int64] * 3 + [_pointer] * 4 + [_int],
    "latent_sums": [_pointer] * 5 + [_int64] * 2 + [_int] + [_pointer] + [_int],
    "screen_weights": [_pointer] * 3 + [_int64] * 2 + [_pointer] * 5 + [_int],
    "screen_rows": [_pointer] * 2 + [_int64] * 2 + [_pointer] * 3 + [_int],
    "integer_weights": [_pointer] * 3 + [_int64] * 2 + [_pointer] * 7 + [_int],
    "integer_rows": [_pointer] * 2 + [_int64] * 2 + [_pointer] * 6 + [_int],
    "integer_product": [_pointer] * 11 + [_float] + [_int64] * 4 + [_pointer] * 2 + [_int],
    "screen_bounds": [_pointer] * 7 + [_float] + [_int64] * 4 + [_pointer] * 2 + [_int],
    "groups": [_int64] * 2,
    "screened_topk": [_pointer] * 13 + [_float] + [_int64] * 5 + [_pointer] * 3 + [_int],
    "screened_count": [_pointer] * 2 + [_int64] * 2 + [_pointer] + [_int],
    "screened_above": [_pointer] * 12 + [_float] + [_pointer] * 2 + [_float] + [_int64] * 3 + [_pointer] * 6 + [_int],
    "close_gaps": [_pointer] * 2 + [_int64] + [_pointer] * 3 + [_int],
    "use_runtime": [_pointer],
    "all_below": [_pointer, _int64, _int64],
    "ascend": [_pointer, _int64, _int64],
}
_RETURNS = {"groups": _int64, "all_below": _int, "ascend": _int}


class Unavailable(Exception):
    """There are no kernels to use; the message says why. The caller uses torch instead."""


def kernels() -> ctypes.CDLL:
    """The library for the instruction set that is asked for or best here.

    Raises:
        Unavailable: there is none, or it is not of these sources.
        ConfigError: the environment variable names an instruction set that does not exist here.
    """
    return _open(instruction_set())


def instruction_set() -> str:
    """The best instruction set of this processor, or what the environment variable says."""
    possible = _possible()
    asked = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if asked == "auto":
        return possible[0]
    if asked not in possible:
        raise ConfigError(f"{ENVIRONMENT_VARIABLE} must be one of auto, {', '.join(possible)} on this processor, got '{asked}'")
    return asked


@functools.cache
def _possible() -> list[str]:
    features = _open("generic").lm_saes_features()
    return [name for name in build.instruction_sets() if features & _NEEDED[name] == _NEEDED[name]]


def has_fast_bfloat16() -> bool:
    """Whether a bfloat16 matrix product is worth having on this processor: by its features, hence the same in every run."""
    return bool(_open("generic").lm_saes_features() & _FAST_BFLOAT16)


def has_fast_integers() -> bool:
    """Whether products of 8-bit integers are faster than bfloat16 and float32 ones: AVX-512 without a matrix unit."""
    return instruction_set() == "avx512" and not _open("generic").lm_saes_features() & _MATRIX_UNIT


def threads() -> str:
    """Whose threads the kernels run on."""
    return "torch's OpenMP threads" if _gomp_parallel() else "threads of their own"


def _open(name: str) -> ctypes.CDLL:
    library = _opened(name)
    if isinstance(library, Unavailable):
        raise library.with_traceback(None)
    return library


@functools.cache
def _opened(name: str) -> ctypes.CDLL | Unavailable:
    """The library, or why there is none: either way the same for the life of the process, whatever is built meanwhile."""
    path = build.library_path(name)
    if not path.exists():
        return Unavailable(f"no native kernels ({path.name} is not there: no C++ compiler at installation? python {build.__file__} builds it)")
    try:
        library = ctypes.CDLL(str(path))
        library.lm_saes_sources.restype = ctypes.c_char_p
        sources = library.lm_saes_sources().decode()
        for function, types in _SIGNATURES.items():
            getattr(library, f"lm_saes_{function}").argtypes = types
            getattr(library, f"lm_saes_{function}").restype = _RETURNS.get(function)
    except (OSError, AttributeError) as error:
        return Unavailable(f"no native kernels ({path.name} cannot be used: {error})")
    if sources != build.sources_hash():
        return Unavailable(f"no native kernels ({path.name} is older than its sources; python {build.__file__} builds it anew)")
    library.lm_saes_use_runtime(_gomp_parallel())
    return library


@functools.cache
def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch runs on, whichever it is; None if it has no such entry."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))  # open already
        return ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p).value  # looked up in what it depends on, too
    except (OSError, AttributeError):
        return None
