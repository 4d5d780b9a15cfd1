"""A shuffle buffer whose content is saved, and one that is read again: the same batches, bit for bit; and which of the two it is."""

from __future__ import annotations

import copy
import logging
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from lm_saes.activations.replay import state_bytes
from lm_saes.activations.shuffle import ShuffleBuffer
from lm_saes.errors import DataError

N_ITEMS, LENGTHS = 120, (7, 0, 13, 1, 30)


class Drawn:
    """Items of different lengths that are drawn at random, so that they depend on a state: activations of some width, tokens, meta."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float32, error: float = 0.0, n_items: int = N_ITEMS) -> None:
        self.width, self.dtype, self.error, self.n_items = width, dtype, error, n_items
        self.position, self.total = 0, 0
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.position == self.n_items:
            raise StopIteration
        n = LENGTHS[self.position % len(LENGTHS)]
        self.position += 1
        x = (torch.randn(n, max(1, self.width), generator=self.generator) * 20 + self.error).to(self.dtype)
        if self.width == 0:
            return {"x": x[:, 0].contiguous()}
        self.total += n
        return {"x": x, "tokens": torch.arange(self.total - n, self.total), "meta": [{"n": k, "spans": [("d", 0, k)]} for k in range(n)]}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "total": self.total, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Any) -> None:
        self.position, self.total = state["position"], state["total"]
        self.generator.set_state(state["generator"])


def buffer(width: int, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> ShuffleBuffer:
    return ShuffleBuffer(Drawn(width, dtype, **options), 16, 200, seed=seed)


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("width", "dtype", "kind"),
    [(64, torch.float32, "origins"), (64, torch.bfloat16, "origins"), (24, torch.float32, "origins"), (0, torch.int8, "stored.x")],
    ids=["float32", "bfloat16", "narrow", "a byte each"],
)
@pytest.mark.parametrize("at", [1, 5, 13, 40, 70])
def test_stopped_at_any_batch_it_gives_the_same_batches(width, dtype, kind, at):
    whole = buffer(width, dtype)
    expected = list(whole)
    first = buffer(width, dtype)
    batches = [next(first) for _ in range(at)]
    state = copy.deepcopy(first.state_dict())
    assert kind in state
    again = buffer(width, dtype, seed=9)
    again.load_state_dict(state)
    batches += [next(again) for _ in range(4)]  # and once more, from a state of the resumed one
    third = buffer(width, dtype)
    third.load_state_dict(again.state_dict())
    batches += list(third)
    assert same(batches, expected)
    assert (third.delivered, third.remainder) == (whole.delivered, whole.remainder)


def test_a_resumed_buffer_has_the_state_that_it_would_have_had():
    whole, first = buffer(64), buffer(64)
    for _ in range(30):
        next(first)
    again = buffer(64)
    again.load_state_dict(first.state_dict())
    for _ in range(50):
        next(whole)
    for _ in range(20):
        next(again)
    one, other = whole.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) if isinstance(one[key], Tensor) else one[key] == other[key] for key in one)


def test_the_smaller_one_is_taken():
    for width in (64, 0):
        stream = buffer(width, torch.float32 if width else torch.int8)
        for _ in range(20):
            next(stream)
        taken = state_bytes(stream.state_dict())
        origins, entries = state_bytes(stream._saved_origins()), state_bytes(stream._saved_entries())
        common = taken - min(origins, entries)
        assert 0 < common < 12_000, "counters, the generator and the state of the items"
        assert (origins < entries) == (width == 64)
    assert entries < 10 * 200


def test_what_is_not_repeatable_is_saved():
    stream = ShuffleBuffer(Drawn(64), 16, 200, repeatable=False)
    next(stream)
    assert "stored.x" in stream.state_dict()


def test_no_more_is_read_again_than_the_oldest_entry_needs():
    stream = buffer(24)
    for _ in range(60):
        next(stream)
    state = stream.state_dict()
    oldest = int(state["origins"].min()) >> 32
    assert 0 < state["anchors"][0] <= oldest
    assert all(anchor > oldest for anchor in state["anchors"][1:])


def test_after_a_saved_buffer_origins_are_known_again_when_its_entries_have_left():
    first = ShuffleBuffer(Drawn(64, n_items=10_000), 16, 40, repeatable=False)
    next(first)
    stream = ShuffleBuffer(Drawn(64, n_items=10_000), 16, 40)
    stream.load_state_dict(first.state_dict())
    assert "stored.x" in stream.state_dict()
    expected = [next(first) for _ in range(60)]
    assert same([next(stream) for _ in range(60)], expected)
    assert "origins" in stream.state_dict()


def test_other_numbers_are_said_and_the_run_can_go_on(caplog):
    stream = buffer(64)
    for _ in range(20):
        next(stream)
    other = buffer(64, error=1e-4)
    with caplog.at_level(logging.WARNING, logger="lm_saes"):
        other.load_state_dict(stream.state_dict())
    assert "not bit for bit those of the run so far" in caplog.text
    assert [batch["tokens"].tolist() for batch in other] == [batch["tokens"].tolist() for batch in stream]


def test_fewer_items_are_an_error():
    stream = buffer(64)
    for _ in range(20):
        next(stream)
    with pytest.raises(DataError, match="has fewer items; resume with the same text"):
        buffer(64, n_items=3).load_state_dict(stream.state_dict())
