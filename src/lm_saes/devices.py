"""Devices: a name becomes a `torch.device` that this machine has."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x weight^T + bias, in float32 on x86, by oneDNN: on AMD it takes .7 to .9 of the time of torch's usual product. None where it does not apply."""
    linear = _onednn_linear()
    if linear is None or any(tensor.dtype is not torch.float32 or tensor.device.type != "cpu" for tensor in (x, weight, bias) if tensor is not None):
        return None
    return linear(x, weight, bias, "none", [], "")


class FastLinear(TorchFunctionMode):
    """While open, linear layers without gradient run on `fast_linear`, from some dozen rows on. They differ from torch's by rounding."""

    _FEWEST_ROWS = 64

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.nn.functional.linear and not kwargs and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            x, weight, *bias = args
            enough = x.numel() >= self._FEWEST_ROWS * max(1, x.shape[-1])
            if enough and (product := fast_linear(x, weight, bias[0] if bias else None)) is not None:
                return product
        return func(*args, **(kwargs or {}))


@functools.cache
def _onednn_linear() -> Callable[..., Tensor] | None:
    """torch's operator, not a public one, for oneDNN's product; None where there is none."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


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
