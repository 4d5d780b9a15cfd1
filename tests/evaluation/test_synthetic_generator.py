"""The synthetic model: each part of its law against a closed form, and the stream of its samples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy.stats import multivariate_normal

from lm_saes.config.base import validated
from lm_saes.config.synthetic import SyntheticModelConfig
from lm_saes.errors import ConfigError
from lm_saes.evaluation.synthetic.generator import SYNTHETIC_HOOK, SyntheticModel, SyntheticStream, capped, forest, spread_out, zipf_probabilities

SMALL: dict[str, Any] = {
    "n_features": 60, "d_model": 16, "n_roots": 3, "branching_factor": 3, "depth": 2, "min_firing_probability": 0.03, "orthogonalization_steps": 0,
    "magnitude_spread_mean": 0.3, "magnitude_spread_std": 0.0,
}  # fmt: skip
N = 80_000


def small(**changes: Any) -> SyntheticModel:
    return SyntheticModel(SyntheticModelConfig(**{**SMALL, **changes}))


def drawn(model: SyntheticModel, n: int = N) -> torch.Tensor:
    return model.sample_features(n, torch.Generator().manual_seed(1)).to_dense()


def assert_rates(counts: torch.Tensor, probabilities: torch.Tensor, n: int = N) -> None:
    """Within five standard deviations of a binomial count, plus one."""
    expected = probabilities.double() * n
    spread = (expected * (1 - probabilities.double())).sqrt()
    off = (counts.double() - expected).abs() - 1
    assert (off < 5 * spread).all(), f"off by {float((off / spread).max()):.1f} standard deviations"


def test_zipf_is_a_power_law_between_its_two_ends():
    p = zipf_probabilities(SyntheticModelConfig())
    assert float(p[0]) == pytest.approx(0.4)
    assert float(p[-1]) == pytest.approx(5e-4)
    power = lambda rank: rank**-0.5 - 2048**-0.5  # noqa: E731
    assert float((p[99] - p[-1]) / (p[0] - p[-1])) == pytest.approx(power(100) / power(1), rel=1e-5)
    assert (p.diff() < 0).all()


def test_the_forest_is_numbered_breadth_first():
    parents = forest(SyntheticModelConfig(n_features=16, n_roots=2, branching_factor=2, depth=2))
    assert parents.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, -1, -1]
    assert (forest(SyntheticModelConfig(n_features=16, n_roots=0)) == -1).all()


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("exclusive", [True, False])
def test_firing_rates_are_those_of_the_law(exclusive, compensate):
    """Without correlations the rate of a child is P(parent) E[1 / number of siblings that would fire; it would itself], summed over families."""
    model = small(correlation_rank=0, mutually_exclusive_children=exclusive, compensate_probabilities=compensate)
    p, expected = model.firing_probabilities.double(), torch.zeros(60, dtype=torch.float64)
    for i, parent in enumerate(model.parents.tolist()):
        if parent < 0:
            expected[i] = p[i]
            continue
        siblings = (model.parents == parent).nonzero().flatten().tolist()
        survives = 0.0
        for on in itertools.product([False, True], repeat=len(siblings)):
            if on[siblings.index(i)]:
                chance = math.prod(float(p[s] if s_on else 1 - p[s]) for s, s_on in zip(siblings, on, strict=True))
                survives += chance / (sum(on) if exclusive else 1)
        expected[i] = expected[parent] * survives
    assert_rates((drawn(model) > 0).sum(0), expected)
    if not compensate:
        assert torch.equal(model.firing_probabilities, zipf_probabilities(model.cfg))


def test_what_fires_is_correlated_as_the_latent_gaussians_are():
    model = small(n_roots=0, n_features=24, correlation_rank=3, correlation_scale=0.5, min_firing_probability=0.1)
    fires = (drawn(model) > 0).double()
    assert_rates(fires.sum(0), model.firing_probabilities)
    correlations = (model.correlation_factor @ model.correlation_factor.T).double()
    pairs = [(int(i), int(j)) for i, j in zip(*torch.triu_indices(24, 24, 1), strict=True)]
    pairs.sort(key=lambda pair: float(correlations[pair]))
    for i, j in [*pairs[:3], pairs[len(pairs) // 2], *pairs[-3:]]:
        rho = float(correlations[i, j])
        thresholds = [float(torch.special.ndtri(model.firing_probabilities[f].double())) for f in (i, j)]  # P(g < -t) = P(g > t)
        together = float(multivariate_normal.cdf(thresholds, cov=[[1, rho], [rho, 1]]))
        assert_rates((fires[:, i] * fires[:, j]).sum(), torch.tensor(together))
    assert float(correlations[pairs[0]]) < -0.3
    assert float(correlations[pairs[-1]]) > 0.3


def test_correlations_of_parents_reach_their_children():
    """A child's Gaussian shares the factors of its own sample, not those of another."""
    model = small(correlation_rank=1, correlation_scale=3.0, branching_factor=2, depth=1, mutually_exclusive_children=False, seed=1)
    factor = model.correlation_factor[:, 0]
    assert (factor.square() < 0.991).all()
    fires = (drawn(model) > 0).double()
    checked = 0
    for child in range(3, 9):
        parent = int(model.parents[child])
        rho = float(factor[child] * factor[parent])
        thresholds = [float(torch.special.ndtri(model.firing_probabilities[f].double())) for f in (child, parent)]
        together = float(multivariate_normal.cdf(thresholds, cov=[[1, rho], [rho, 1]]))
        assert_rates(fires[:, child].sum(), torch.tensor(together))
        checked += abs(rho) > 0.9
    assert checked > 0


@pytest.mark.parametrize("exclusive", [True, False])
def test_children_fire_with_their_parents_and_alone_among_their_siblings(exclusive):
    model = small(mutually_exclusive_children=exclusive)
    fires = drawn(model, 20_000) > 0
    children = (model.parents >= 0).nonzero().flatten()
    assert (~fires[:, children] | fires[:, model.parents[children]]).all()
    siblings = torch.zeros(20_000, 60, dtype=torch.int64).index_add(1, model.parents[children], fires[:, children].long())
    assert int(siblings.max()) == (1 if exclusive else 3)


def test_magnitudes_are_normal_rectified_and_scaled_by_the_parent():
    model = small(magnitude_spread_mean=3.0, correlation_rank=0)
    amounts = drawn(model).double()
    m, s = model.mean_magnitudes.double(), model.magnitude_spreads.double()
    free = (model.parents < 0).nonzero().flatten().tolist()
    for i in (free[0], free[5], free[-1]):
        positive = amounts[:, i][amounts[:, i] > 0]
        a = -m[i] / s[i]  # a normal number above 0: mean m + s l, variance s^2 (1 + a l - l^2), with l = phi(a) / Q(a)
        ratio = torch.exp(-a * a / 2) / math.sqrt(2 * math.pi) / torch.special.ndtr(-a)
        spread = s[i] * (1 + a * ratio - ratio**2).sqrt()
        assert float(positive.mean()) == pytest.approx(float(m[i] + s[i] * ratio), abs=5 * float(spread) / len(positive) ** 0.5)
        assert float(positive.std()) == pytest.approx(float(spread), rel=0.03)
        assert len(positive) / N == pytest.approx(float(model.firing_probabilities[i] * torch.special.ndtr(-a)), rel=0.1)
    unscaled = drawn(small(magnitude_spread_mean=3.0, correlation_rank=0, scale_children_by_parent=False)).double()
    child, parent = 4, int(model.parents[4])
    both = amounts[:, child] > 0
    own = amounts[both, child] * m[parent] / amounts[both, parent]
    assert float(own.mean()) == pytest.approx(float(unscaled[both, child].mean()), rel=0.05)
    assert torch.allclose(own, unscaled[both, child], rtol=1e-5)


def test_spreads_are_folded_normal():
    model = SyntheticModel(SyntheticModelConfig(n_features=20_000, d_model=2, n_roots=0, orthogonalization_steps=0))
    s = model.magnitude_spreads.double()
    mean = 0.5 * math.sqrt(2 / math.pi) * math.exp(-0.5) + 0.5 * math.erf(1 / math.sqrt(2))
    assert (s >= 0).all()
    assert float(s.mean()) == pytest.approx(mean, abs=0.02)
    assert float(s.square().mean()) == pytest.approx(0.5**2 + 0.5**2, abs=0.02)
    assert torch.equal(model.mean_magnitudes[[0, -1]], torch.tensor([5.0, 4.0]))


def test_directions_are_pushed_apart_along_the_gradient_of_their_overlaps():
    torch.manual_seed(0)
    start = torch.randn(30, 6)
    vectors = torch.nn.functional.normalize(start, dim=1).requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        products = vectors @ vectors.T
        others = products - torch.diag(products.diagonal())
        (others.square().sum() + 30 * (products.diagonal() - 1).square().sum()).backward()
        optimizer.step()
    found = spread_out(start, 20, 0.01)
    torch.testing.assert_close(found, torch.nn.functional.normalize(vectors.detach(), dim=1), rtol=0, atol=1e-4)
    excess = lambda d: float((d @ d.T).square().sum()) - 30**2 / 6  # noqa: E731  above the least there is, N^2 / D
    assert excess(found) < 0.1 * excess(spread_out(start, 0, 0.01))


def test_the_common_share_of_a_gaussian_is_capped():
    factor = torch.tensor([[3.0, 4.0], [0.6, 0.0]])
    assert capped(factor).square().sum(1).tolist() == pytest.approx([0.99, 0.36])


def test_activations_are_sums_of_directions():
    model = small(bias_norm=0.7)
    activations, features = model.sample(500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(activations, features.to_dense() @ model.directions + model.bias)
    assert float(model.bias.norm()) == pytest.approx(0.7)
    assert model.directions.norm(dim=1).tolist() == pytest.approx([1.0] * 60)
    assert (features.values > 0).all()
    keys = features.rows * 60 + features.indices
    assert (keys.diff() > 0).all(), "entries are sorted by row, then feature, none twice"


@pytest.fixture(scope="module")
def mini() -> SyntheticModel:
    return SyntheticModel(SyntheticModelConfig.preset("mini"))


def test_mini_is_pinned(mini):
    """The figures that the documentation names."""
    batches = SyntheticStream(mini, 1024, seed=3, n_batches=20)
    rates = sum(torch.bincount(batch["features"].indices, minlength=2048) for batch in batches) / (20 * 1024)
    assert float(rates.sum()) == pytest.approx(10.9, abs=0.2)
    assert float(rates[:512].sum()) == pytest.approx(8.3, abs=0.2)
    cosines = (mini.directions @ mini.directions.T).fill_diagonal_(0).abs()
    assert float(cosines.amax(1).mean()) == pytest.approx(0.210, abs=0.002)


def test_presets():
    paper = SyntheticModelConfig.preset("16k")
    assert (paper.n_features, paper.d_model, paper.n_hierarchical) == (16_384, 768, 10_880)
    assert SyntheticModelConfig.preset("mini", seed=3) == SyntheticModelConfig(seed=3)


def batches(stream: SyntheticStream, n: int) -> list[torch.Tensor]:
    return [next(stream)[SYNTHETIC_HOOK] for _ in range(n)]


def test_a_stream_goes_on_where_it_was():
    model = small()
    stream = SyntheticStream(model, 32, seed=5, n_batches=6)
    whole = batches(stream, 6)
    with pytest.raises(StopIteration):
        next(stream)
    stopped = SyntheticStream(model, 32, seed=5, n_batches=6)
    batches(stopped, 2)
    state = stopped.state_dict()
    batches(stopped, 1)
    resumed = SyntheticStream(small(), 32, seed=5, n_batches=6)
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], batches(resumed, 4), strict=True))
    batch = next(SyntheticStream(model, 32, seed=5))
    assert batch["mask"].all()
    assert batch["tokens"].tolist() == list(range(32))


def test_streams_of_different_seeds_share_no_batch():
    model = small(n_features=60)
    different = {tuple(x.flatten().tolist()) for seed in range(4) for x in batches(SyntheticStream(model, 16, seed), 8)}
    assert len(different) == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_roots": 30}, "30 trees of depth 3 with 4 children each hold 2550 features, n_features is 2048"),
        ({"min_firing_probability": 0.5}, "min_firing_probability must be below max_firing_probability = 0.4, got 0.5"),
        ({"n_feature": 3}, "did you mean 'n_features'"),
    ],
)
def test_errors_name_the_field_and_the_way_out(changes, message):
    with pytest.raises(ConfigError, match=message):
        validated(SyntheticModelConfig, changes)
