"""Mixing by tokens: shares, ends, and a name that keeps its weight."""

from __future__ import annotations

import logging
from typing import Any, Self

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.activations.mix import Mix, Source
from lm_saes.activations.tokens import Tokens


class Rows:
    """Rows with the given numbers of tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.position = lengths, 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tokens:
        if self.position == len(self.lengths):
            raise StopIteration
        mask = torch.ones(1, self.lengths[self.position], dtype=torch.bool)
        self.position += 1
        return Tokens(mask.long(), mask, ~mask, [{}])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Any) -> None:
        self.position = state["position"]


sources_strategy = st.lists(st.tuples(st.floats(0.05, 1), st.lists(st.integers(1, 30), min_size=1, max_size=40)), min_size=1, max_size=4)


def mix(sources: list[tuple[float, list[int]]]) -> Mix:
    return Mix([Source(f"s{index}", weight, Rows(lengths)) for index, (weight, lengths) in enumerate(sources)])


@given(sources=sources_strategy)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_source_is_more_than_an_item_ahead_of_its_share(sources: list[tuple[float, list[int]]]) -> None:
    stream = mix(sources)
    given = [0] * len(sources)
    n_items = 0
    for source, tokens in stream:
        given[source] += tokens.ids.numel()
        n_items += 1
        if not any(stream.ended):
            progress = [tokens / weight for tokens, (weight, _) in zip(given, sources, strict=True)]
            for (weight, lengths), mine in zip(sources, progress, strict=True):
                assert mine - min(progress) <= max(lengths) / weight + 1e-6  # rounding of the quotients
    assert given == [sum(lengths) for _, lengths in sources]
    assert n_items == sum(len(lengths) for _, lengths in sources)
    assert stream.ended == [True] * len(sources)


def test_shares_are_of_tokens_not_of_rows() -> None:
    stream = mix([(0.9, [10] * 2000), (0.1, [50] * 2000)])
    given = [0, 0]
    for _ in range(1000):
        source, tokens = next(stream)
        given[source] += tokens.ids.numel()
    assert given[0] / sum(given) == pytest.approx(0.9, abs=0.005)  # one item of 50 in about 12,000 tokens


def test_an_ended_source_is_said_and_the_others_keep_their_proportion(caplog: pytest.LogCaptureFixture) -> None:
    stream = mix([(8, [10] * 2), (2, [10] * 500), (1, [10] * 500)])
    with caplog.at_level(logging.INFO, logger="lm_saes"):
        given = [0, 0, 0]
        for _ in range(300):
            given[next(stream).source] += 1
    assert given[0] == 2
    assert abs(given[1] - 2 * given[2]) <= 3
    assert stream.ended == [True, False, False]
    assert [record.getMessage() for record in caplog.records] == ["dataset 's0' ended after 20 tokens; going on with s1, s2"]


@given(sources=sources_strategy, cut=st.integers(0, 60))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_resumed_equals_uninterrupted(sources: list[tuple[float, list[int]]], cut: int) -> None:
    whole = mix(sources)
    for _ in range(min(cut, sum(len(lengths) for _, lengths in sources))):
        next(whole)
    state = whole.state_dict()
    rest = [(source, tokens.ids.numel()) for source, tokens in whole]
    resumed = mix(sources)
    resumed.load_state_dict(state)
    assert [(source, tokens.ids.numel()) for source, tokens in resumed] == rest
