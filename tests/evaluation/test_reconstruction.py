"""Each metric against its formula in NumPy and in cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.evaluation.reconstruction import (
    EXPLAINED_VARIANCE_DEFINITION,
    ReconstructionSums,
    cosine_similarity,
    explained_variance,
    normalized_mse,
    relative_reconstruction_bias,
    shrinkage,
)


def sums_of(x: torch.Tensor, y: torch.Tensor, cut: int = 0) -> ReconstructionSums:
    sums = ReconstructionSums()
    sums.update(x[:cut], y[:cut])
    sums.update(x[cut:], y[cut:])
    return sums


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(2, 20), d=st.integers(1, 5), cut=st.integers(0, 20), offset=st.sampled_from([0.0, 5.0, 1e5]), seed=st.integers(0, 999))
def test_all_metrics_are_their_formulas_over_any_cut_into_batches(n: int, d: int, cut: int, offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + offset
    y = x + rng.normal(size=(n, d))
    sums = sums_of(torch.from_numpy(x), torch.from_numpy(y), min(cut, n))
    norm = np.linalg.norm
    assert sums.n_tokens == n
    assert explained_variance(sums) == pytest.approx(1 - ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-6)
    assert normalized_mse(sums) == pytest.approx(((x - y) ** 2).sum() / (x**2).sum(), rel=1e-9)
    assert cosine_similarity(sums) == pytest.approx(((x * y).sum(1) / norm(x, axis=1) / norm(y, axis=1)).mean(), rel=1e-9)
    assert shrinkage(sums) == pytest.approx((norm(y, axis=1) / norm(x, axis=1)).mean(), rel=1e-9)
    if (x * y).sum() > 0:
        assert relative_reconstruction_bias(sums) == pytest.approx((y**2).sum() / (x * y).sum(), rel=1e-9)


def test_the_mean_explains_nothing_and_the_truth_everything() -> None:
    x = torch.randn(50, 3) + 100
    assert explained_variance(sums_of(x, x.double().mean(0).expand(50, 3))) == pytest.approx(0, abs=1e-12)
    assert explained_variance(sums_of(x, x)) == 1
    uncentred = normalized_mse(sums_of(x, x.double().mean(0).expand(50, 3)))
    assert uncentred is not None
    assert uncentred < 1e-3, "the uncentred measure is flattered by the mean"
    assert "Σ‖x - x̂‖² / Σ‖x - mean(x)‖²" in EXPLAINED_VARIANCE_DEFINITION


def test_halving_is_shrinkage_and_bias_but_not_a_turn() -> None:
    x = torch.randn(50, 3)
    sums = sums_of(x, x / 2)
    assert shrinkage(sums) == pytest.approx(0.5)
    assert relative_reconstruction_bias(sums) == pytest.approx(0.5)
    assert cosine_similarity(sums) == pytest.approx(1)
    assert normalized_mse(sums) == pytest.approx(0.25)


def test_bias_is_the_scale_that_fits_best() -> None:
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    y += x
    gamma = relative_reconstruction_bias(sums_of(x, y))
    assert gamma is not None

    def error(scale: float) -> float:
        return float((y / scale - x).square().sum())

    assert all(error(gamma) < error(gamma * factor) for factor in (0.9, 0.999, 1.001, 1.1))


def test_undefined_is_none_and_zero_vectors_do_not_poison() -> None:
    constant = torch.ones(4, 2)
    assert explained_variance(sums_of(constant, constant)) is None
    zero = torch.zeros(4, 2)
    nothing = sums_of(zero, constant)
    assert (normalized_mse(nothing), cosine_similarity(nothing), shrinkage(nothing), relative_reconstruction_bias(nothing)) == (None,) * 4
    half = sums_of(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    assert cosine_similarity(half) == 1
    assert shrinkage(half) == 2
    assert cosine_similarity(sums_of(constant, zero)) == 0


def test_a_large_mean_in_float32_does_not_cancel() -> None:
    x = (torch.randn(1000, 4, dtype=torch.float64) + 3000).float()
    y = x + 0.5
    expected = 1 - 0.25 * 4 * 1000 / float((x.double() - x.double().mean(0)).square().sum())
    assert explained_variance(sums_of(x, y, 317)) == pytest.approx(expected, rel=1e-9)
