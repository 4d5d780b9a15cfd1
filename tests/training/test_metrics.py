"""Metrics against NumPy, densities over windows, and dead latents."""

from __future__ import annotations

import numpy
import pytest
import torch

from lm_saes.ops import SparseCodes
from lm_saes.training.dead_latents import DeadLatents, firing_counts
from lm_saes.training.metrics import FiringDensity, reconstruction_metrics, sum_of_codes, to_host

MASK = torch.tensor([True, False, True, True, True])


def codes() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(5, 4).relu()


def test_reconstruction_metrics_are_their_formulas():
    torch.manual_seed(1)
    y, x_hat = torch.randn(5, 3) + 4, torch.randn(5, 3) + 4
    got = to_host(reconstruction_metrics(x_hat, y, MASK))
    target, estimate = y[MASK].double().numpy(), x_hat[MASK].double().numpy()
    error, variance = ((estimate - target) ** 2).sum(1), ((target - target.mean(0)) ** 2).sum(1)
    norm_error, norm = numpy.sqrt(error).mean(), numpy.linalg.norm(target, axis=1).mean()
    assert got == {
        "metrics/explained_variance": pytest.approx(1 - error.sum() / variance.sum(), rel=1e-5),
        "metrics/explained_variance_legacy": pytest.approx((1 - error / variance).mean(), rel=1e-5),
        "metrics/l2_norm_error": pytest.approx(norm_error, rel=1e-5),
        "metrics/l2_norm_error_ratio": pytest.approx(norm_error / norm, rel=1e-5),
    }


def test_the_mean_explains_nothing_and_the_label_everything():
    y = torch.randn(6, 3) + 2
    everything = torch.ones(6, dtype=torch.bool)
    assert reconstruction_metrics(y.mean(0).expand(6, 3), y, everything)["metrics/explained_variance"].item() == pytest.approx(0, abs=1e-5)
    assert reconstruction_metrics(y, y, everything)["metrics/explained_variance"].item() == 1


def test_firing_is_counted_alike_for_both_forms_of_codes():
    dense = codes()
    wanted = (dense[MASK] > 0).sum(0)
    assert torch.equal(firing_counts(dense, MASK), wanted)
    assert torch.equal(firing_counts(SparseCodes.from_dense(dense), MASK), wanted)
    zeros = SparseCodes(torch.tensor([1.0, 0.0]), torch.tensor([2, 0]), torch.tensor([0, 2]), 3)
    assert firing_counts(zeros, torch.ones(1, dtype=torch.bool)).tolist() == [0, 0, 1]
    assert sum_of_codes(dense, MASK).item() == pytest.approx(dense[MASK].sum().item(), rel=1e-6)
    assert sum_of_codes(SparseCodes.from_dense(dense), MASK).item() == pytest.approx(dense[MASK].sum().item(), rel=1e-6)


def test_a_latent_is_dead_when_it_has_not_fired_for_the_threshold():
    latents = DeadLatents(3, threshold=100, device="cpu")
    assert not latents.dead().any()
    tokens = torch.tensor(60)
    latents.update(torch.tensor([1, 0, 0]), tokens)
    assert latents.tokens_since_fired.tolist() == [0, 60, 60]
    latents.update(torch.tensor([0, 5, 0]), tokens)
    assert latents.dead().tolist() == [False, False, True]
    other = DeadLatents(3, threshold=100, device="cpu")
    other.load_state_dict(latents.state_dict())
    other.update(torch.tensor([0, 0, 1]), tokens)
    assert other.dead().tolist() == [True, False, False]
    assert latents.dead().tolist() == [False, False, True]


def test_density_is_that_of_the_last_full_window():
    density = FiringDensity(2, window=2, device="cpu")
    tokens = torch.tensor(10)
    density.update(torch.tensor([5, 0]), tokens)
    assert density.density().tolist() == [0.5, 0.0]
    density.update(torch.tensor([10, 0]), tokens)
    assert density.density().tolist() == [0.75, 0.0]
    density.update(torch.tensor([0, 10]), tokens)
    assert density.density().tolist() == [0.75, 0.0]
    assert to_host(density.metrics()) == {
        "sparsity/above_1e-1": 1, "sparsity/above_1e-2": 1, "sparsity/below_1e-5": 1, "sparsity/below_1e-6": 1, "sparsity/below_1e-7": 1,
    }  # fmt: skip
    other = FiringDensity(2, window=2, device="cpu")
    other.load_state_dict({name: value.clone() for name, value in density.state_dict().items()})
    other.update(torch.tensor([0, 0]), tokens)
    assert other.density().tolist() == [0.0, 0.5]


def test_numbers_come_to_the_host_unchanged():
    assert to_host({}) == {}
    assert to_host({"a": torch.tensor(2**40), "b": torch.tensor(0.1, dtype=torch.float64), "c": torch.tensor(True)}) == {
        "a": 2.0**40,
        "b": 0.1,
        "c": 1.0,
    }
