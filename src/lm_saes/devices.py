"""Devices: a name becomes a `torch.device` that this machine has."""

from __future__ import annotations

import ctypes
import os
import platform

import torch
from torch import Tensor

from lm_saes.errors import DeviceError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of that name. "auto" is cuda, else mps, else cpu; "meta" holds shapes without numbers.

    Raises:
        DeviceError: this machine does not have the device; the message names those it has.
    """
    there = available_devices()
    if str(name) == "auto":
        return torch.device(next((kind for kind in ("cuda", "mps") if kind in there), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"wanted a device, got '{name}'; there are {', '.join(there)}") from None
    if device.type != "meta" and str(device) not in there:
        raise DeviceError(f"wanted device '{device}', which is not here; there are {', '.join(there)} (or say auto)")
    return device


def available_devices() -> list[str]:
    """The names that `resolve_device` accepts here, besides "auto" and "meta"."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names += ["mps", "mps:0"]
    return names


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64 (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def no_narrower_than(before: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
    """`after` on its device, but cast from `before` where a module-wide cast has narrowed it below `dtype`."""
    wanted = torch.promote_types(after.dtype, dtype)
    return after if after.dtype == wanted else before.to(after.device, wanted)


def reuse_freed_memory() -> None:
    """Have this process keep the memory that it frees, for the rest of its life: the large tensors of a training step are then made in
    pages that are there already.

    glibc's malloc maps each tensor beyond 32 MiB afresh and gives it back at once, and the kernel clears its pages again at every
    step: 40 % of the step at D 768, F 24576 on a CPU. Does nothing with another C library, or where the environment sets malloc's options.
    """
    own = [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]
    if own or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
