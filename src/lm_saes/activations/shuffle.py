"""Batches of one size from items of any size, in order (`Rebatch`) or shuffled (`ShuffleBuffer`).

An item is a dict of tensors (and lists) with the same length along their first dimension: n activations, or n sequences. Every entry is
given out exactly once; what is left at the end and does not fill a batch is dropped and counted in `remainder`.

The shuffle buffer, allocated once:
1. `slots` is a permutation of the buffer's places. From its left come `filled` places whose entries are mixed, from its right those of the
   `arrived` entries, which are not mixed yet; the places between are free.
2. Fill: before each batch, entries are written to the free places until none is left. So the stream is read evenly, a batch's worth at a
   time, and a thread that reads ahead never has half a buffer to catch up with.
3. Mix: when less than half the buffer is mixed, and at the start, the places of mixed and arrived entries are permuted together. Entries
   do not move.
4. Emit: the last `batch_size` mixed places are gathered into a batch and become free.
When the stream has ended, 3 and 4 go on until the buffer is empty.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from lm_saes.activations.stream import State, Stream, nested, part, stopping_point
from lm_saes.activations.tokens import restored_meta
from lm_saes.errors import ConfigError

log = logging.getLogger("lm_saes")

Items = dict[str, Any]  # key -> Tensor [n, ...] or list of n
_BYTES_PER_SLOT = 8


def n_items(items: Items) -> int:
    """How many entries an item holds."""
    return len(next(iter(items.values()))) if items else 0


def sliced(items: Items, start: int, stop: int | None = None) -> Items:
    """Entries `start` to `stop`, as views."""
    return {key: value[start:stop] for key, value in items.items()}


def joined(parts: list[Items]) -> Items:
    """Items one behind the other."""
    if len(parts) == 1:
        return parts[0]
    columns = {key: [items[key] for items in parts] for key in (parts[0] if parts else {})}
    return {
        key: torch.cat(column) if isinstance(column[0], Tensor) else [entry for entries in column for entry in entries]
        for key, column in columns.items()
    }


def saved(items: Items) -> State:
    """A snapshot of an item, for a state."""
    return {key: value.clone() if isinstance(value, Tensor) else list(value) for key, value in items.items()}


def loaded(items: Mapping[str, Any], device: torch.device) -> Items:
    """The item that `saved` made a snapshot of."""
    return {key: value.to(device) if isinstance(value, Tensor) else restored_meta(value) for key, value in items.items()}


class Rebatch:
    """Batches of `batch_size` entries in the order in which they come."""

    def __init__(self, items: Stream[Items], batch_size: int, device: torch.device | str = "cpu") -> None:
        self._items, self._batch_size, self._device = items, batch_size, torch.device(device)
        self._waiting: Items = {}
        self.delivered = self.remainder = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Items:
        parts, n = [self._waiting] if self._waiting else [], n_items(self._waiting)
        try:
            while n < self._batch_size:
                stopping_point()
                parts.append(next(self._items))
                n += n_items(parts[-1])
        except BaseException as error:  # what was read is not lost
            self._waiting = joined(parts)
            if isinstance(error, StopIteration):
                self.remainder = n
            raise
        whole = joined(parts)
        self._waiting = sliced(whole, self._batch_size) if n > self._batch_size else {}
        self.delivered += self._batch_size
        return sliced(whole, 0, self._batch_size)

    def state_dict(self) -> State:
        counts = {"delivered": self.delivered, "remainder": self.remainder}
        return {**counts, **nested("waiting", saved(self._waiting)), **nested("items", self._items.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.delivered, self.remainder = state["delivered"], state["remainder"]
        self._waiting = loaded(part("waiting", state), self._device)
        self._items.load_state_dict(part("items", state))


class ShuffleBuffer:
    """Batches of `batch_size` entries drawn from a buffer of `capacity` entries.

    `max_bytes` bounds what the buffer allocates; `capacity` is lowered to it with one log line when the size of an entry is known. One item
    that does not fit waits beside it. Raises `ConfigError` if the budget does not hold one batch.
    """

    def __init__(
        self, items: Stream[Items], batch_size: int, capacity: int, *, seed: int = 0, max_bytes: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self._items, self._batch_size, self._max_bytes, self._device = items, batch_size, max_bytes, torch.device(device)
        self.capacity = capacity
        self._generator = torch.Generator().manual_seed(seed)
        self._storage: Items = {}
        self._slots = torch.empty(0, dtype=torch.int64)
        self._filled = self._arrived = 0
        self._ended = False
        self._waiting: Items = {}  # the end of an item that found no free place
        self.delivered = self.remainder = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Items:
        if not self._ended:
            self._fill()
        if self._arrived and self._filled < max(self.capacity // 2, self._batch_size):
            self._mix()
        start = self._filled - self._batch_size
        if start < 0:
            self.remainder = self._filled
            raise StopIteration
        batch = self._gathered(self._slots[start : self._filled])
        self._filled = start
        self.delivered += self._batch_size
        return batch

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the buffer (lists not counted)."""
        tensors = [self._slots, *(value for value in self._storage.values() if isinstance(value, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _fill(self) -> None:
        while self._filled + self._arrived < self.capacity:
            if n_items(self._waiting) == 0:
                stopping_point()
                item = next(self._items, None)
                if item is None:
                    self._ended = True
                    break
                self._waiting = item
            if not self._storage:
                self._allocate(self._waiting)
            n = min(n_items(self._waiting), self.capacity - self._filled - self._arrived)
            free = self.capacity - self._arrived
            self._write(sliced(self._waiting, 0, n), self._slots[free - n : free].flip(0))
            self._arrived += n
            self._waiting = sliced(self._waiting, n)
        if n_items(self._waiting) == 0:
            self._waiting = {}  # an empty view would keep the whole item

    def _mix(self) -> None:
        entries = self._entries()
        free = self._slots[self._filled : self.capacity - self._arrived]
        self._slots = torch.cat([entries[torch.randperm(len(entries), generator=self._generator)], free])
        self._filled, self._arrived = len(entries), 0

    def _entries(self) -> Tensor:
        """The places of all entries: the mixed ones, then those that arrived since, in the order in which they came."""
        return torch.cat([self._slots[: self._filled], self._slots[self.capacity - self._arrived :].flip(0)])

    def _gathered(self, slots: Tensor) -> Items:
        on_device = slots.to(self._device)
        return {
            key: value.index_select(0, on_device) if isinstance(value, Tensor) else [value[slot] for slot in slots.tolist()]
            for key, value in self._storage.items()
        }

    def _write(self, items: Items, slots: Tensor) -> None:
        on_device = slots.to(self._device)
        for key, value in items.items():
            if isinstance(value, Tensor):
                self._storage[key].index_copy_(0, on_device, value)
            else:
                for slot, entry in zip(slots.tolist(), value, strict=True):
                    self._storage[key][slot] = entry

    def _allocate(self, like: Items) -> None:
        """Make room for `capacity` entries like those in `like`, within the budget."""
        tensors = {key: value for key, value in like.items() if isinstance(value, Tensor)}
        per_entry = _BYTES_PER_SLOT + sum(value.element_size() * math.prod(value.shape[1:]) for value in tensors.values())
        if self._max_bytes is not None and self.capacity * per_entry > self._max_bytes:
            affordable = self._max_bytes // per_entry
            if affordable < self._batch_size:
                wanted = self._batch_size * per_entry
                raise ConfigError(f"max_buffer_bytes must hold one batch ({wanted} bytes), got {self._max_bytes}; raise it or lower batch_size")
            log.info("buffer_size lowered from %s to %s by max_buffer_bytes = %s", f"{self.capacity:,}", f"{affordable:,}", f"{self._max_bytes:,}")
            self.capacity = affordable
        self._storage = {
            key: torch.empty((self.capacity, *value.shape[1:]), dtype=value.dtype, device=self._device)
            if isinstance(value, Tensor)
            else [None] * self.capacity
            for key, value in like.items()
        }
        self._slots = torch.arange(self.capacity)

    def state_dict(self) -> State:
        """The entries: first the mixed ones, the next batch at their end, then the others; free places have no content, so none is saved."""
        counters = {"delivered": self.delivered, "remainder": self.remainder, "ended": self._ended, "mixed": self._filled}
        return {
            **counters,
            "capacity": self.capacity,
            "generator": self._generator.get_state(),
            **nested("stored", self._gathered(self._entries())),
            **nested("waiting", saved(self._waiting)),
            **nested("items", self._items.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.delivered, self.remainder, self._ended, self.capacity = (state[key] for key in ("delivered", "remainder", "ended", "capacity"))
        self._generator.set_state(state["generator"])
        stored = loaded(part("stored", state), self._device)
        self._storage, self._slots, self._filled, self._arrived = {}, torch.empty(0, dtype=torch.int64), 0, 0
        if stored:
            self._allocate(stored)
            self._filled = state.get("mixed", n_items(stored))  # all of them, where the state is older than this key
            self._arrived = n_items(stored) - self._filled
            self._write(stored, self._entries())
        self._waiting = loaded(part("waiting", state), self._device)
        self._items.load_state_dict(part("items", state))
