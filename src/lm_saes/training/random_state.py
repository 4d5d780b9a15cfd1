"""The state of the global random number generators, for checkpoints. Training itself draws nothing; callbacks and streams may."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import Tensor


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """torch's generators on the CPU and on `device`, as bytes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def load_random_tensors(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_tensors` gave; the state of a device of another kind is left out."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def random_numbers() -> dict[str, Any]:
    """The generators of Python and NumPy, as JSON values."""
    version, internal, gauss = random.getstate()
    state = numpy.random.get_state(legacy=False)
    return {
        "python": [version, list(internal), gauss],
        "numpy": {**state, "state": {"key": state["state"]["key"].tolist(), "pos": state["state"]["pos"]}},
    }  # pyright: ignore


def load_random_numbers(states: dict[str, Any]) -> None:
    """Put back what `random_numbers` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(
        {
            **states["numpy"],
            "state": {"key": numpy.array(states["numpy"]["state"]["key"], dtype=numpy.uint32), "pos": states["numpy"]["state"]["pos"]},
        }
    )
