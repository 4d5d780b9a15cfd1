"""Devices: a name becomes a `torch.device` that this machine has."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_saes.errors import DeviceError


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
