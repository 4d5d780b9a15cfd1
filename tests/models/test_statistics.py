"""Statistics against NumPy, brute force, and what defines them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.models.statistics import RunningCovariance, RunningMean, effective_rank, geometric_median, rank_at_variance

few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    offset=st.sampled_from([0.0, 3.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_running_covariance_is_numpys_however_the_rows_are_cut(n: int, d: int, cuts: list[int], offset: float, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(n, d)) + offset
    covariance, mean = RunningCovariance(), RunningMean()
    for part in np.split(x, sorted(cut for cut in cuts if cut <= n)):
        covariance.update(torch.from_numpy(part))
        mean.update(torch.from_numpy(part))
    expected = np.cov(x.T, bias=True).reshape(d, d)
    # an offset of 1e6 leaves 16 - 6 digits of each entry, that is 1e-10
    np.testing.assert_allclose(covariance.covariance, expected, atol=1e-9)
    np.testing.assert_allclose(covariance.mean, x.mean(0), rtol=1e-13, atol=1e-13)
    assert covariance.count == mean.count == n
    assert mean.total_variation == pytest.approx(n * np.trace(expected), abs=1e-7)
    assert covariance.total_variation == pytest.approx(n * np.trace(expected), abs=1e-7)


def test_principal_directions_are_ordered_orthonormal_and_reconstruct_the_covariance() -> None:
    x = torch.randn(200, 5, dtype=torch.float64) * torch.tensor([3.0, 0.1, 2.0, 0.0, 1.0], dtype=torch.float64)
    moments = RunningCovariance()
    moments.update(x)
    values, vectors = moments.principal_directions()
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    assert values.min() >= 0
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, moments.covariance)
    assert vectors[:, 0].abs().argmax() == 0
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_effective_rank_closed_forms() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    p, q = 0.75, 0.25
    assert effective_rank(torch.tensor([3.0, 1.0], dtype=torch.float64)) == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)), rel=1e-12)


def test_rank_at_variance() -> None:
    values = torch.tensor([90.0, 8.0, 1.0, 1.0], dtype=torch.float64)
    assert [rank_at_variance(values, share) for share in (0.5, 0.9, 0.91, 0.98, 0.99, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert rank_at_variance(torch.zeros(3)) == 0


def mean_distance(x: torch.Tensor, point: torch.Tensor) -> float:
    return float((x.double() - point).norm(dim=1).mean())


@few
@given(n=st.integers(1, 30), d=st.integers(1, 5), duplicates=st.integers(0, 20), seed=st.integers(0, 99))
def test_no_point_near_the_median_nor_any_data_point_is_better(n: int, d: int, duplicates: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = torch.cat([x, x[:1].expand(duplicates, d)])
    # Where the median is a data point whose subgradient is barely inside the unit ball, the iteration is sublinear; the objective is flat there.
    median = geometric_median(x, max_iterations=2000)
    assert torch.isfinite(median.point).all()
    best = mean_distance(x, median.point)
    for size in (1e-3, 0.1, 1.0):
        for direction in torch.randn(10, d, generator=generator, dtype=torch.float64):
            assert best <= mean_distance(x, median.point + size * direction) + 1e-6
    assert all(best <= mean_distance(x, row) + 1e-6 for row in x)


def test_gradient_vanishes_at_the_median() -> None:
    x = torch.randn(500, 8, dtype=torch.float64) * torch.linspace(0.1, 5, 8, dtype=torch.float64) + 7
    median = geometric_median(x, tolerance=1e-12)
    assert median.converged
    point = median.point.clone().requires_grad_()
    (x - point).norm(dim=1).mean().backward()
    assert point.grad is not None
    assert float(point.grad.norm()) <= 2e-12
    assert median.gradient_norm == pytest.approx(float(point.grad.norm()), abs=1e-14)


def test_median_of_one_dimension_is_the_middle_value() -> None:
    assert float(geometric_median(torch.tensor([[1.0], [2.0], [30.0]])).point) == pytest.approx(2, abs=1e-6)


def test_a_third_of_far_outliers_moves_the_mean_but_not_the_median() -> None:
    clean = torch.randn(200, 16, dtype=torch.float64)
    outliers = torch.full((90, 16), 1000.0, dtype=torch.float64)
    x = torch.cat([clean, outliers])
    assert x.mean(0).norm() > 1000
    assert geometric_median(x).point.norm() < 5


def test_an_iterate_that_meets_a_data_point_moves_on_or_stays_rightly() -> None:
    # The mean (the start) is the data point at 0, which is not the median: Weiszfeld's own step divides by zero here.
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-3.0, 0.0]], dtype=torch.float64)
    assert x.mean(0).norm() == 0
    moved = geometric_median(x)
    assert moved.converged
    assert mean_distance(x, moved.point) < mean_distance(x, x[0]) - 0.1
    # A point that holds the majority is the median, exactly.
    heavy = torch.cat([torch.randn(10, 3), torch.tensor([[5.0, -2.0, 1.0]]).expand(11, 3)])
    stayed = geometric_median(heavy)
    assert stayed.converged
    torch.testing.assert_close(stayed.point, heavy[-1].double(), atol=1e-8, rtol=0)


def test_identical_points_and_the_empty_set() -> None:
    median = geometric_median(torch.full((5, 3), 2.5))
    assert median.converged
    assert median.point.tolist() == [2.5] * 3
    with pytest.raises(ValueError, match="no points"):
        geometric_median(torch.zeros(0, 3))


def test_median_is_equivariant_and_says_when_it_did_not_converge() -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    direct = geometric_median(1e4 * x @ rotation + 3).point
    torch.testing.assert_close(direct, 1e4 * geometric_median(x).point @ rotation + 3, rtol=1e-6, atol=1e-2)
    assert not geometric_median(x, max_iterations=1).converged
