"""What is gathered while a stream passes: quantiles, an even sample, the mean cosine of all pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.inspection.statistics import EvenSample, HookPointSums, NormHistogram, Positions

QUICK = settings(max_examples=50, deadline=None, derandomize=True)


def everything(n: int) -> Positions:
    return Positions(torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64), None)


@given(values=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60), share=st.floats(0.01, 0.99))
@QUICK
def test_quantiles_are_right_to_within_half_a_bin(values: list[float], share: float) -> None:
    histogram = NormHistogram()
    histogram.update(torch.tensor(values, dtype=torch.float64))
    exact = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    found = histogram.quantile(share)
    assert found is not None
    assert abs(math.log2(found / exact)) <= 0.5 / NormHistogram.BINS_PER_OCTAVE + 1e-9


def test_a_histogram_of_nothing_has_no_quantile() -> None:
    histogram = NormHistogram()
    histogram.update(torch.zeros(3))
    assert histogram.quantile(0.5) is None


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12), size=st.integers(2, 16))
@QUICK
def test_the_sample_is_even_bounded_and_blind_to_how_the_stream_is_cut(lengths: list[int], size: int) -> None:
    total = sum(lengths)
    stream = torch.arange(total, dtype=torch.float32)[:, None]
    sample, whole = EvenSample(size), EvenSample(size)
    for part in stream.split(lengths):
        sample.update(part)
    whole.update(stream)
    rows = sample.rows().flatten().tolist()
    assert rows == whole.rows().flatten().tolist()
    assert len(rows) <= size
    if total >= size:
        assert len(rows) >= size / 2
    if len(rows) > 1:
        stride = rows[1] - rows[0]
        assert rows == [index * stride for index in range(len(rows))]
        assert rows[-1] + stride >= total


def test_mean_cosine_is_that_of_all_pairs() -> None:
    x = torch.randn(40, 5, dtype=torch.float64) + 0.5
    x[7] = 0  # has no direction and is left out
    sums = HookPointSums("h", 10.0, True, 64)
    for part in x.split(13):
        sums.update(part, everything(len(part)))
    directions = torch.nn.functional.normalize(x[torch.arange(40) != 7], dim=1)
    cosines = directions @ directions.T
    pairs = cosines[~torch.eye(39, dtype=torch.bool)]
    assert sums.mean_cosine == pytest.approx(float(pairs.mean()), rel=1e-12)


def test_one_direction_has_cosine_one_and_opposite_ones_cancel() -> None:
    line = torch.tensor([[1.0, 0], [2.0, 0], [5.0, 0]])
    for x, expected in ((line, 1.0), (torch.cat([line, -line]), -1 / 5)):
        sums = HookPointSums("h", 10.0, True, 64)
        sums.update(x, everything(len(x)))
        assert sums.mean_cosine == pytest.approx(expected)


def test_two_tokens_are_needed_for_a_cosine() -> None:
    sums = HookPointSums("h", 10.0, True, 64)
    assert sums.mean_cosine is None
    sums.update(torch.ones(1, 3), everything(1))
    assert sums.mean_cosine is None
