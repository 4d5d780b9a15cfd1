"""What a stream is, and how the states of stacked streams are put together.

A stream is an iterator that can be stopped and taken up again: after `load_state_dict(state)` on a stream that was built from the same
settings, the items are those that the saved stream would have given next, bit for bit.

A state is one flat dict. Its values are tensors or JSON (of a stream from outside also numbers and arrays of NumPy); the state of an inner stream
stands in it under `prefix.`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from lm_saes.errors import LmSaesError

Item_co = TypeVar("Item_co", covariant=True)
State = dict[str, Any]


class Stream(Protocol[Item_co]):
    """An iterator with a state of tensors and JSON."""

    def __iter__(self) -> Self: ...

    def __next__(self) -> Item_co: ...

    def state_dict(self) -> State:
        """A snapshot: it does not change when the stream goes on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where the stream was that gave `state`."""
        ...


def nested(prefix: str, state: Mapping[str, Any]) -> State:
    """`state` with `prefix.` before each key."""
    return {f"{prefix}.{key}": value for key, value in state.items()}


def part(prefix: str, state: Mapping[str, Any]) -> State:
    """What `nested(prefix, ...)` put into `state`."""
    return {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(f"{prefix}.")}


_TENSOR, _ARRAY = "__tensor__", "__array__"


def snapshot(state: Any) -> Any:
    """A state with its tensors on the CPU. Those that are there already are not copied: they do not change any more. Arrays of NumPy may, and are
    copied."""
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, np.ndarray):
        return state.copy()
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return [snapshot(value) for value in state] if isinstance(state, list | tuple) else state


def packed(state: Any, error: type[LmSaesError]) -> tuple[Any, dict[str, Tensor]]:
    """A state, which may be that of anybody's stream (None: it has none), as a JSON value and the tensors that it refers to by name. NumPy's numbers
    become Python's, its arrays come back as arrays; tuples become lists.

    Raises:
        error: it is no dict, or there is something else in it.
    """
    if state is not None and not isinstance(state, dict):
        raise error(f"the stream's state_dict() must be a dict, got {type(state).__name__}")
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, place: str) -> Any:
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise error(f"the stream's state_dict(){place} has the key {key!r}; keys must be text")
            return {key: plain(item, f"{place}[{key!r}]") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, Tensor | np.ndarray):
            kind, name = _TENSOR if isinstance(value, Tensor) else _ARRAY, str(len(tensors))
            try:
                tensors[name] = value if isinstance(value, Tensor) else torch.from_numpy(value.copy())
            except (TypeError, ValueError) as fault:  # of objects, text, times, or in another order of bytes
                raise error(f"the stream's state_dict(){place} is an array of {value.dtype}, which cannot be saved: {fault}") from None
            if tensors[name].dtype is torch.complex128 or tensors[name].layout is not torch.strided:  # safetensors has neither
                raise error(f"the stream's state_dict(){place} is of {tensors[name].dtype}, {tensors[name].layout}, which cannot be saved")
            return {kind: name}
        number = value.item() if isinstance(value, np.generic) else value
        if number is None or isinstance(number, str | bool | int | float):
            return number
        raise error(f"the stream's state_dict(){place} is of type {type(value).__name__}; use JSON values, tensors, or numbers and arrays of NumPy")

    return plain(state, ""), tensors


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `packed` made a JSON value and tensors of.

    Raises:
        KeyError: a tensor is not there.
    """
    if isinstance(value, list):
        return [unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]]
    if value.keys() == {_ARRAY}:
        return tensors[value[_ARRAY]].numpy()
    return {key: unpacked(item, tensors) for key, item in value.items()}


class ReadingThread(threading.Thread):
    """A thread that reads a stream, and that may be told to stop in the middle of an item."""

    told_to_stop = False


class StoppedError(Exception):
    """Raised inside a stream that is read by a thread that was told to stop. The stream can be read on from there."""


def stopping_point() -> None:
    """To be called by streams between the pieces of a long item, where they can be left and taken up again.

    Raises:
        StoppedError: this is a `ReadingThread` that was told to stop.
    """
    thread = threading.current_thread()
    if isinstance(thread, ReadingThread) and thread.told_to_stop:
        raise StoppedError
