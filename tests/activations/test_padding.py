"""Rows are grouped by length at the least cost, and what is captured does not depend on the grouping."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.activations import padding
from lm_saes.activations.padding import forward_cost, groups_by_length
from tests.activations.fake import HOOKS, FakeLanguageModel
from tests.activations.test_capture import capture


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put rows into groups."""
    if not rows:
        yield []
        return
    for size in range(len(rows)):
        for others in itertools.combinations(rows[1:], size):
            rest = [row for row in rows[1:] if row not in others]
            for partition in partitions(rest):
                yield [[rows[0], *others], *partition]


def total(groups: list[list[int]], lengths: list[int], cost: int) -> int:
    return sum(len(group) * max(lengths[row] for row in group) + cost for group in groups)


@given(lengths=st.lists(st.integers(0, 9), max_size=6), cost=st.integers(0, 12))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_grouping_costs_less(lengths: list[int], cost: int) -> None:
    groups = groups_by_length(lengths, cost)
    rows = [row for row, length in enumerate(lengths) if length]
    assert sorted(row for group in groups for row in group) == rows
    assert total(groups, lengths, cost) == min(total(partition, lengths, cost) for partition in partitions(rows))


def test_equal_rows_run_together_and_at_no_cost_nothing_is_padded() -> None:
    assert groups_by_length([3, 5, 3, 5, 3], 0) == [[1, 3], [0, 2, 4]]
    assert groups_by_length([3, 5, 3], 100) == [[0, 1, 2]]
    assert groups_by_length([200, 7, 199, 5], 64) == [[0, 2], [1, 3]]
    assert groups_by_length([], 64) == []


def test_costs() -> None:
    assert forward_cost(torch.device("cpu")) == 64
    assert forward_cost(torch.device("cuda")) > 1000


@pytest.mark.parametrize("cost", [0, 1, 4, 1000])
def test_activations_do_not_depend_on_the_grouping(cost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_batches(model: FakeLanguageModel) -> list[dict[str, Any]]:
        return list(capture(["abcdefghijkl", "mn", "opq", "rs", "tuvwxyz"], model, packing=False, rows=5, context_size=9))

    monkeypatch.setitem(padding.POSITIONS_PER_FORWARD, "cpu", cost)
    model = FakeLanguageModel()
    batches = all_batches(model)
    monkeypatch.setitem(padding.POSITIONS_PER_FORWARD, "cpu", 10**9)
    together = FakeLanguageModel()
    for batch, expected in zip(batches, all_batches(together), strict=True):
        assert all(torch.equal(batch[key], expected[key]) for key in (*HOOKS, "tokens", "mask", "attention_mask"))
    computed, held = sum(rows * length for rows, length in model.calls), sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert held <= computed <= sum(rows * length for rows, length in together.calls)
    if cost == 0:
        assert computed == held  # not one position of padding
        assert model.masks == [None] * len(model.calls)
    if cost == 1000:
        assert len(model.calls) == 1
