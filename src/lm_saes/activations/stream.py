"""What a stream is, and how the states of stacked streams are put together.

A stream is an iterator that can be stopped and taken up again: after `load_state_dict(state)` on a stream that was built from the same
settings, the items are those that the saved stream would have given next, bit for bit.

A state is one flat dict. Its values are tensors or JSON; the state of an inner stream stands in it under `prefix.`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar

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
