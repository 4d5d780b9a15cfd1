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

The state of the buffer is its entries, or where they come from, whichever takes fewer bytes (`replay.py`); a resumed buffer has them from the
state, or reads them again. Both give the same batches, bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from lm_saes.activations.replay import UNKNOWN, Anchor, Origins, split, state_bytes
from lm_saes.activations.stream import State, Stream, nested, part, stopping_point
from lm_saes.activations.tokens import restored_meta
from lm_saes.errors import ConfigError, DataError
from lm_saes.tensor_files import fingerprint

log = logging.getLogger("lm_saes")

Items = dict[str, Any]  # key -> Tensor [n, ...] or list of n
_BYTES_PER_SLOT = 16
"""A slot and an origin."""
_SAMPLED = 256
"""Entries by which a buffer that was read again is compared with what it was."""


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
    that does not fit waits beside it. Raises `ConfigError` if the budget does not hold one batch. `repeatable`: in a state that `items` had before it
    gives the same items again, so that entries need not be saved.
    """

    def __init__(
        self,
        items: Stream[Items],
        batch_size: int,
        capacity: int,
        *,
        seed: int = 0,
        max_bytes: int | None = None,
        device: torch.device | str = "cpu",
        repeatable: bool = True,
    ) -> None:
        self._items, self._batch_size, self._max_bytes, self._device = items, batch_size, max_bytes, torch.device(device)
        self._origins, self._repeatable = Origins(items), repeatable
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
        tensors = [self._slots, self._origins.of_slot, *(value for value in self._storage.values() if isinstance(value, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _fill(self) -> None:
        while self._filled + self._arrived < self.capacity:
            if n_items(self._waiting) == 0:
                stopping_point()
                item = self._origins.next()
                if item is None:
                    self._ended = True
                    break
                self._waiting = item
            if not self._storage:
                self._allocate(self._waiting)
            n = min(n_items(self._waiting), self.capacity - self._filled - self._arrived)
            free = self.capacity - self._arrived
            slots = self._slots[free - n : free].flip(0)
            self._write(sliced(self._waiting, 0, n), slots)
            self._origins.placed(slots)
            self._arrived += n
            self._waiting = sliced(self._waiting, n)
        if n_items(self._waiting) == 0:
            self._waiting = {}  # an empty view would keep the whole item

    def _mix(self) -> None:
        entries = self._entries()
        free = self._slots[self._filled : self.capacity - self._arrived]
        self._slots = torch.cat([entries[torch.randperm(len(entries), generator=self._generator)], free])
        self._filled, self._arrived = len(entries), 0
        self._origins.mixed(entries)

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
        self._origins.of_slot = torch.full((self.capacity,), UNKNOWN)

    def state_dict(self) -> State:
        """The entries, or where they come from: first the mixed ones, the next batch at their end, then the others; free places have no content,
        so none is saved."""
        counters = {"delivered": self.delivered, "remainder": self.remainder, "ended": self._ended, "mixed": self._filled, "read": self._origins.read}
        return {
            **counters,
            "capacity": self.capacity,
            "generator": self._generator.get_state(),
            **(self._saved_origins() if self._origins_are_smaller() else self._saved_entries()),
            **nested("items", self._items.state_dict()),
        }

    def _saved_entries(self) -> State:
        places = self._entries().sort().values  # in the order of memory: copied at its speed, while training waits
        return {"slots": self._slots.clone(), **nested("stored", self._gathered(places)), **nested("waiting", saved(self._waiting))}

    def _saved_origins(self) -> State:
        origins, entries = self._origins, self._entries()
        return {
            "origins": origins.of_slot[entries],
            "waiting_origin": origins.waiting,
            "anchors": [anchor.read for anchor in origins.anchors],
            "sample": self._sample(entries),
            **nested("anchor", origins.anchors[0].state),
        }

    def _origins_are_smaller(self) -> bool:
        """Whether where the entries come from is known, and takes fewer bytes than they do."""
        entries, origins = self._entries(), self._origins
        origins.drop(entries)
        if not self._repeatable or len(entries) == 0 or not origins.anchors or origins.anchors[0].read > origins.oldest(entries):
            return False
        one = sum(value[:1].nbytes if isinstance(value, Tensor) else state_bytes(value[int(entries[0])]) for value in self._storage.values())
        return origins.bytes(len(entries)) < (one + 8) * len(entries) + state_bytes(self._waiting)

    def _sample(self, entries: Tensor) -> str:
        return fingerprint(self._gathered(entries[:: max(1, len(entries) // _SAMPLED)]))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.delivered, self.remainder, self._ended, self.capacity = (state[key] for key in ("delivered", "remainder", "ended", "capacity"))
        self._generator.set_state(state["generator"])
        self._storage, self._slots, self._filled, self._arrived, self._waiting = {}, torch.empty(0, dtype=torch.int64), 0, 0, {}
        self._origins = Origins(self._items)
        if "origins" in state:
            self._read_again(state)
        else:
            stored = loaded(part("stored", state), self._device)
            if stored:
                self._allocate(stored)
                self._place(n_items(stored), state["mixed"])
                self._slots = state["slots"].clone()
                self._write(stored, self._entries().sort().values)
            self._waiting = loaded(part("waiting", state), self._device)
        self._origins.read = state["read"]
        self._items.load_state_dict(part("items", state))

    def _place(self, n: int, mixed: int) -> None:
        self._filled, self._arrived = mixed, n - mixed

    def _read_again(self, state: Mapping[str, Any]) -> None:
        """Fill the buffer with the entries that it had, by reading what they came from.

        Raises:
            DataError: the stream does not give as many any more.
        """
        origins, anchors = self._origins, list(state["anchors"])
        numbers, rows = split(state["origins"])
        by_item = numbers.argsort(stable=True)
        numbers = numbers[by_item].contiguous()
        log.info("reading %s items again, for the shuffle buffer", f"{state['read'] - anchors[0]:,}")
        self._items.load_state_dict(part("anchor", state))
        item, entries = Items(), torch.empty(0, dtype=torch.int64)
        for number in range(anchors[0], state["read"] + 1):
            if number in anchors:
                origins.anchors.append(Anchor(number, self._items.state_dict()))
            if number == state["read"]:
                break
            item = next(self._items, {})
            if n_items(item) == 0 and number in numbers:
                raise DataError("the stream does not give what it gave when it was saved: it has fewer items; resume with the same text or files")
            if not self._storage:
                self._allocate(item)
                self._place(len(rows), state["mixed"])
                entries = self._entries()
            first, last = (int(torch.searchsorted(numbers, number, right=right)) for right in (False, True))
            wanted = by_item[first:last]
            if len(wanted):
                self._write(_taken(item, rows[wanted] % n_items(item), self._device), entries[wanted])
        origins.of_slot[self._entries()], origins.waiting = state["origins"], state["waiting_origin"]
        _, next_row = split(torch.tensor(origins.waiting))
        self._waiting = sliced(item, int(next_row)) if int(next_row) < n_items(item) else {}
        if self._sample(self._entries()) != state["sample"]:
            log.warning(
                "the activations that were read again are not bit for bit those of the run so far (another machine, build or number of threads): "
                "it goes on, and ends like it, but not bit for bit"
            )


def _taken(items: Items, rows: Tensor, device: torch.device) -> Items:
    """Some entries of an item."""
    on_device = rows.to(device)
    return {
        key: value.to(device).index_select(0, on_device) if isinstance(value, Tensor) else [value[row] for row in rows.tolist()]
        for key, value in items.items()
    }
