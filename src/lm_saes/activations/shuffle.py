"""Batches of one size from items of any size, in order (`Rebatch`) or shuffled (`ShuffleBuffer`).

An item is a dict of tensors (and lists) with the same length along their first dimension: n activations, or n sequences. Every entry is
given out exactly once; what is left at the end and does not fill a batch is dropped and counted in `remainder`.

The shuffle buffer, allocated once:
1. `slots` is a permutation of the buffer's places. The first `filled` of them hold an entry, the others are free.
2. Fill: entries are written to free places until none is left. Then the full part of `slots` is permuted. Entries do not move.
3. Emit: the last `batch_size` full places are gathered into a batch and become free, until less than half the buffer is full; then 2.
When the stream has ended, 3 goes on until the buffer is empty.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from lm_saes.activations.stream import State, Stream, nested, part
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


def _saved(items: Items) -> State:
    return {key: value.clone() if isinstance(value, Tensor) else list(value) for key, value in items.items()}


def _loaded(items: Mapping[str, Any], device: torch.device) -> Items:
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
        while n < self._batch_size:
            item = next(self._items, None)
            if item is None:
                self._waiting, self.remainder = joined(parts), n
                raise StopIteration
            parts.append(item)
            n += n_items(item)
        whole = joined(parts)
        self._waiting = sliced(whole, self._batch_size) if n > self._batch_size else {}
        self.delivered += self._batch_size
        return sliced(whole, 0, self._batch_size)

    def state_dict(self) -> State:
        counts = {"delivered": self.delivered, "remainder": self.remainder}
        return {**counts, **nested("waiting", _saved(self._waiting)), **nested("items", self._items.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.delivered, self.remainder = state["delivered"], state["remainder"]
        self._waiting = _loaded(part("waiting", state), self._device)
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
        self._filled = 0
        self._filling, self._ended = True, False
        self._waiting: Items = {}  # the end of an item that found no free place
        self.delivered = self.remainder = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Items:
        if self._filling and not self._ended:
            self._fill()
        start = self._filled - self._batch_size
        if start < 0:
            self.remainder = self._filled
            raise StopIteration
        slots = self._slots[start : self._filled]
        on_device = slots.to(self._device)
        batch = {
            key: value.index_select(0, on_device) if isinstance(value, Tensor) else [value[slot] for slot in slots.tolist()]
            for key, value in self._storage.items()
        }
        self._filled = start
        self._filling = start < max(self.capacity // 2, self._batch_size)
        self.delivered += self._batch_size
        return batch

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the buffer (lists not counted)."""
        tensors = [self._slots, *(value for value in self._storage.values() if isinstance(value, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _fill(self) -> None:
        while self._filled < self.capacity:
            if n_items(self._waiting) == 0:
                item = next(self._items, None)
                if item is None:
                    self._ended = True
                    break
                self._waiting = item
            if not self._storage:
                self._allocate(self._waiting)
            n = min(n_items(self._waiting), self.capacity - self._filled)
            self._write(sliced(self._waiting, 0, n))
            self._waiting = sliced(self._waiting, n)
        if n_items(self._waiting) == 0:
            self._waiting = {}  # an empty view would keep the whole item
        order = torch.randperm(self._filled, generator=self._generator)
        self._slots[: self._filled] = self._slots[: self._filled][order]

    def _write(self, items: Items) -> None:
        n = n_items(items)
        slots = self._slots[self._filled : self._filled + n]
        on_device = slots.to(self._device)
        for key, value in items.items():
            if isinstance(value, Tensor):
                self._storage[key].index_copy_(0, on_device, value)
            else:
                for slot, entry in zip(slots.tolist(), value, strict=True):
                    self._storage[key][slot] = entry
        self._filled += n

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
        """The full places in the order in which they will be given out; free places have no content, so none is saved."""
        slots = self._slots[: self._filled]
        on_device = slots.to(self._device)
        stored = {
            key: value.index_select(0, on_device) if isinstance(value, Tensor) else [value[slot] for slot in slots.tolist()]
            for key, value in self._storage.items()
        }
        counters = {"delivered": self.delivered, "remainder": self.remainder, "filling": self._filling, "ended": self._ended}
        return {
            **counters,
            "capacity": self.capacity,
            "generator": self._generator.get_state(),
            **nested("stored", stored),
            **nested("waiting", _saved(self._waiting)),
            **nested("items", self._items.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.delivered, self.remainder, self._filling, self._ended = (state[key] for key in ("delivered", "remainder", "filling", "ended"))
        self.capacity = state["capacity"]
        self._generator.set_state(state["generator"])
        stored = _loaded(part("stored", state), self._device)
        self._storage, self._slots, self._filled = {}, torch.empty(0, dtype=torch.int64), 0
        if stored:
            self._allocate(stored)
            self._write(stored)
        self._waiting = _loaded(part("waiting", state), self._device)
        self._items.load_state_dict(part("items", state))
