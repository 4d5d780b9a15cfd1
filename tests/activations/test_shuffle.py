"""The shuffle buffer: everything once, well mixed, within its budget, and resumable."""

from __future__ import annotations

import logging
from typing import Any, Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm_saes.activations.shuffle import Rebatch, ShuffleBuffer
from lm_saes.errors import ConfigError


class Counting:
    """Items that hold the numbers 0, 1, 2, ... in a tensor, a matrix and a list, cut at the given lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.position = lengths, 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.position == len(self.lengths):
            raise StopIteration
        start = sum(self.lengths[: self.position])
        numbers = torch.arange(start, start + self.lengths[self.position])
        self.position += 1
        return {
            "tokens": numbers,
            "x": numbers[:, None].float() * torch.tensor([1.0, -2.0]),
            "meta": [{"n": n, "spans": [("d", n, n + 1)]} for n in numbers.tolist()],
        }

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Any) -> None:
        self.position = state["position"]


PER_ENTRY = 8 + 8 + 16  # tokens, two floats, the slot and the origin


def numbers(batches: list[dict[str, Any]], batch_size: int) -> list[int]:
    """The numbers of the batches; checks that an entry's parts stayed together and that batches are full."""
    for batch in batches:
        assert len(batch["tokens"]) == batch_size
        assert torch.equal(batch["x"], batch["tokens"][:, None].float() * torch.tensor([1.0, -2.0]))
        assert batch["meta"] == [{"n": n, "spans": [("d", n, n + 1)]} for n in batch["tokens"].tolist()]
    return [n for batch in batches for n in batch["tokens"].tolist()]


lengths_strategy = st.lists(st.integers(0, 13), max_size=12)


@given(lengths=lengths_strategy, batch_size=st.integers(1, 7), extra=st.integers(0, 20), shuffled=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_entry_once(lengths: list[int], batch_size: int, extra: int, shuffled: bool) -> None:
    items = Counting(lengths)
    stream = ShuffleBuffer(items, batch_size, batch_size + extra, seed=1) if shuffled else Rebatch(items, batch_size)
    seen = numbers(list(stream), batch_size)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(sum(lengths)))
    assert stream.delivered == len(seen) == sum(lengths) // batch_size * batch_size
    assert stream.remainder == sum(lengths) % batch_size
    assert list(stream) == []
    if not shuffled:
        assert seen == list(range(len(seen)))


def test_seed_decides_the_order() -> None:
    orders = [numbers(list(ShuffleBuffer(Counting([7] * 30), 5, 40, seed=seed)), 5) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_it_shuffles_well() -> None:
    """A batch from the middle of the stream holds what came over at least half a buffer, and neighbours do not stay together."""
    capacity, batch_size = 400, 40
    batches = list(ShuffleBuffer(Counting([20] * 200), batch_size, capacity, seed=0))
    for batch in batches[10:-10]:
        values = batch["tokens"].sort().values
        assert values[-1] - values[0] > capacity / 2
    order = torch.tensor(numbers(batches, batch_size), dtype=torch.float64)
    neighbours = (order.diff().abs() == 1).double().mean()
    assert neighbours < 0.02  # 1 in order; about 2 / capacity where all is even
    spread = (order - torch.arange(len(order))).abs().mean()
    assert spread > capacity / 8


def test_the_stream_is_read_evenly_and_mixed_at_one_half() -> None:
    items = Counting([10] * 100)
    stream = ShuffleBuffer(items, 10, 100)
    batches, read = [], []
    for _ in range(20):
        batches.append(next(stream)["tokens"])
        read.append(items.position)
    assert read == list(range(10, 30))
    newest = [int(batch.max()) for batch in batches]
    assert max(newest[:6]) < 100 <= max(newest[6:12]) < 160 <= max(newest[12:18]) < 220


def test_an_error_of_the_stream_loses_nothing() -> None:
    class Failing(Counting):
        failures = 3

        def __next__(self) -> dict[str, Any]:
            if self.position == 5 and self.failures:
                self.failures -= 1
                raise OSError("for a moment")
            return super().__next__()

    for make in (lambda items: Rebatch(items, 8), lambda items: ShuffleBuffer(items, 8, 24)):
        stream, expected = make(Failing([3] * 20)), numbers(list(make(Counting([3] * 20))), 8)
        batches, failures = [], 0
        while len(batches) < 60 // 8:
            try:
                batches.append(next(stream))
            except OSError:
                failures += 1
        assert failures == 3
        assert numbers(batches, 8) == expected


@given(budget=st.integers(3 * PER_ENTRY, 40 * PER_ENTRY), capacity=st.integers(3, 60))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_byte_budget_holds(budget: int, capacity: int) -> None:
    stream = ShuffleBuffer(Counting([7] * 20), 3, capacity, max_bytes=budget)
    next(stream)
    assert stream.allocated_bytes == stream.capacity * PER_ENTRY <= budget
    assert stream.capacity == min(capacity, budget // PER_ENTRY)


def test_lowering_the_capacity_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lm_saes"):
        list(ShuffleBuffer(Counting([7] * 20), 3, 1000, max_bytes=10 * PER_ENTRY))
    assert [record.getMessage() for record in caplog.records] == ["buffer_size lowered from 1,000 to 10 by max_buffer_bytes = 320"]


def test_a_budget_below_one_batch_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"must hold one batch \(96 bytes\), got 71"):
        next(ShuffleBuffer(Counting([7]), 3, 1000, max_bytes=71))


def test_the_buffer_is_allocated_once_and_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ShuffleBuffer(Counting([10] * 100), 10, 100)
    next(stream)
    places = {key: value.data_ptr() for key, value in stream._storage.items() if isinstance(value, Tensor)}
    gathered: list[int] = []
    original = Tensor.index_select
    monkeypatch.setattr(Tensor, "index_select", lambda self, dim, index: gathered.append(len(index)) or original(self, dim, index))
    for _ in range(30):
        next(stream)
    assert {key: value.data_ptr() for key, value in stream._storage.items() if isinstance(value, Tensor)} == places
    assert set(gathered) == {10}


@given(lengths=lengths_strategy, batch_size=st.integers(1, 6), extra=st.integers(0, 15), shuffled=st.booleans(), cut=st.integers(0, 40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_resumed_equals_uninterrupted(lengths: list[int], batch_size: int, extra: int, shuffled: bool, cut: int) -> None:
    def make(seed: int) -> Rebatch | ShuffleBuffer:
        items = Counting(lengths)
        return ShuffleBuffer(items, batch_size, batch_size + extra, seed=seed) if shuffled else Rebatch(items, batch_size)

    whole = make(0)
    for _ in range(min(cut, sum(lengths) // batch_size)):
        next(whole)
    state = whole.state_dict()
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)  # no views: they are written to files as they are
    rest = numbers(list(whole), batch_size)
    for resumed in (make(7), whole):  # the state decides, not the seed of the new stream; and a snapshot does not change afterwards
        resumed.load_state_dict(state)
        assert numbers(list(resumed), batch_size) == rest
        assert (resumed.delivered, resumed.remainder) == (whole.delivered, whole.remainder)
