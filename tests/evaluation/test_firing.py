"""Firing statistics on codes counted by hand."""

from __future__ import annotations

import pytest
import torch

from lm_saes.evaluation.firing import HISTOGRAM_EDGES, FiringCounts, dead_fraction, dense_fraction, density_histogram, l0
from lm_saes.ops import Codes, SparseCodes


def counts_of(*batches: Codes) -> FiringCounts:
    counts = FiringCounts()
    for codes in batches:
        counts.update(codes)
    return counts


def hundred_tokens() -> torch.Tensor:
    """Five latents that fire on 0, 1, 10, 11 and 100 of 100 tokens."""
    codes = torch.zeros(100, 5)
    for latent, fires in enumerate((0, 1, 10, 11, 100)):
        codes[:fires, latent] = 0.5 + latent
    return codes


def test_l0_dead_and_dense() -> None:
    counts = counts_of(hundred_tokens())
    assert counts.per_latent.tolist() == [0, 1, 10, 11, 100]
    assert l0(counts) == pytest.approx(1.22)
    assert dead_fraction(counts) == pytest.approx(1 / 5)
    assert dense_fraction(counts) == pytest.approx(2 / 5), "exactly 10 % is not dense"


def test_sparse_and_dense_codes_in_any_cut_count_alike() -> None:
    codes = hundred_tokens()[torch.randperm(100)]
    whole = counts_of(codes)
    for cut in (0, 1, 37, 100):
        parts = counts_of(codes[:cut], SparseCodes.from_dense(codes[cut:]))
        assert parts.per_latent.tolist() == whole.per_latent.tolist()
        assert parts.n_tokens == whole.n_tokens == 100


def test_entries_of_zero_in_sparse_codes_did_not_fire() -> None:
    codes = SparseCodes(torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([0, 1, 0, 2]), torch.tensor([0, 2, 4]), 3)
    counts = counts_of(codes)
    assert counts.per_latent.tolist() == [2, 0, 0]
    assert l0(counts) == 1


def test_histogram_in_half_decades() -> None:
    histogram = density_histogram(counts_of(hundred_tokens()))
    filled = {(low, high): n for low, high, n in histogram if n}
    assert filled == {(-2.0, -1.5): 1, (-1.0, -0.5): 2, (-0.5, 0.0): 1}
    assert [row[0] for row in histogram] == list(HISTOGRAM_EDGES[:-1])
    rare = FiringCounts()
    rare.per_latent, rare.n_tokens = torch.tensor([1, 0]), 10**8
    assert density_histogram(rare)[0] == [-6.0, -5.5, 1], "rarer than the first edge stands in the first bin, dead in none"
