"""Where the entries of a shuffle buffer come from, so that a resumed stream can read them again instead of having them on disk.

An origin is the number of the item that an entry came in, and its row there: 8 bytes, where the activations themselves take thousands. Items come again
from an anchor, a state that the stream had before the oldest of them. Anchors are taken whenever the buffer is mixed, and dropped when all
that came before the next one has left. Half of what is mixed leaves before the next mixing, so the oldest entry of n is about log2(n) mixings
old: reading again means reading some log2(n) / 2 buffers.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm_saes.activations.stream import State, Stream

UNKNOWN = -1
"""Origin of an entry that was loaded from a saved buffer."""
_ROW_BITS = 32


class Anchor(NamedTuple):
    """A state of a stream, and how many items it had given by then."""

    read: int
    state: State


class Origins:
    """Reads `items` for a buffer of `capacity` places and remembers what came from where."""

    def __init__(self, items: Stream[dict[str, Any]]) -> None:
        self.items = items
        self.read = 0
        """Items read."""
        self.of_slot = torch.empty(0, dtype=torch.int64)
        self.waiting = UNKNOWN
        """Origin of the first entry that has no place yet."""
        self.anchors: deque[Anchor] = deque()

    def next(self) -> dict[str, Any] | None:
        """The next item; None at the end."""
        if not self.anchors:
            self.anchors.append(Anchor(self.read, self.items.state_dict()))
        item = next(self.items, None)
        if item is not None:
            self.waiting = self.read << _ROW_BITS
            self.read += 1
        return item

    def placed(self, slots: Tensor) -> None:
        """The next entries got these places."""
        if self.waiting == UNKNOWN:
            self.of_slot[slots] = UNKNOWN
        else:
            self.of_slot[slots] = torch.arange(self.waiting, self.waiting + len(slots))
            self.waiting += len(slots)

    def mixed(self, slots: Tensor) -> None:
        """The buffer, which holds entries at these places, was mixed: take an anchor."""
        self.anchors.append(Anchor(self.read, self.items.state_dict()))
        self.drop(slots)

    def drop(self, slots: Tensor) -> None:
        """Forget the anchors that entries at these places do not need."""
        oldest = self.oldest(slots)
        while len(self.anchors) > 1 and self.anchors[1].read <= oldest:
            self.anchors.popleft()

    def oldest(self, slots: Tensor) -> int:
        """The number of the oldest item that would have to be read again; negative if some entries cannot be."""
        entries = int(self.of_slot[slots].min()) if len(slots) else self.waiting
        return min(entries, self.waiting) >> _ROW_BITS

    def bytes(self, n_entries: int) -> int:
        """Of the state that replaces so many entries."""
        return 8 * n_entries + state_bytes(self.anchors[0].state) if self.anchors else 0


def split(origins: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the items, and rows in them."""
    return origins >> _ROW_BITS, origins & ((1 << _ROW_BITS) - 1)


def state_bytes(value: Any) -> int:
    """About how many bytes a nested state takes on the disk."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(len(str(key)) + state_bytes(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(state_bytes(item) for item in value)
    return len(str(value))
