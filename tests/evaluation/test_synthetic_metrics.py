"""The metrics of the synthetic benchmark against brute force and hand-made cases; the probe on features that can be told apart."""

from __future__ import annotations

import itertools

import pytest
import torch

from lm_saes.evaluation.synthetic.generator import SYNTHETIC_HOOK
from lm_saes.evaluation.synthetic.metrics import DetectionCounts, absolute_cosines, mean_matched_cosine, own_features, uniqueness
from lm_saes.evaluation.synthetic.probe import LogisticProbe
from lm_saes.ops import SparseCodes


def test_cosines_do_not_look_at_norm_or_sign():
    decoder = torch.tensor([[2.0, 0.0], [-3.0, 3.0], [0.0, 0.0]])
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    half = 0.5**0.5
    torch.testing.assert_close(absolute_cosines(decoder, directions), torch.tensor([[1.0, 0.0], [half, half], [0.0, 0.0]]))


@pytest.mark.parametrize(("n_latents", "n_features"), [(4, 4), (3, 6), (6, 3)])
def test_mcc_is_the_best_of_all_matchings(n_latents, n_features):
    cosines = torch.rand(n_latents, n_features)
    small, large = sorted((n_latents, n_features))
    table = cosines if n_latents <= n_features else cosines.T
    best = max(sum(float(table[i, j]) for i, j in enumerate(chosen)) / small for chosen in itertools.permutations(range(large), small))
    assert mean_matched_cosine(cosines) == pytest.approx(best)


def test_mcc_of_the_truth_is_one():
    directions = torch.randn(30, 8)
    assert mean_matched_cosine(absolute_cosines(-2 * directions[torch.randperm(30)], directions)) == pytest.approx(1.0)


def test_uniqueness_counts_the_features_that_latents_share_once():
    cosines = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.0, 0.1, 0.3], [0.5, 0.4, 0.1]])
    assert own_features(cosines).tolist() == [0, 0, 2, 0]
    assert uniqueness(cosines) == 0.5


def test_detection_is_a_mean_over_latents():
    """Latent 0 misses one of two firings, latent 1 fires once too often, latent 2 is dead, the feature of latent 3 never fires."""
    fires = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    truth = torch.tensor([[2.0, 1.0, 1.0, 0.0], [1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    counts = DetectionCounts(torch.arange(4))
    counts.update(fires.float(), SparseCodes.from_dense(truth))
    result = counts.result()
    assert result.precision == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)
    assert result.recall == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)
    assert result.f1 == pytest.approx((2 / 3 + 4 / 5 + 0 + 0) / 4)


@pytest.mark.parametrize("sparse", [True, False])
def test_detection_equals_brute_force_in_pieces(sparse):
    codes = torch.randn(60, 7).where(torch.rand(60, 7) < 0.3, 0.0)  # negative codes fire too
    truth = torch.rand(60, 11).where(torch.rand(60, 11) < 0.3, 0.0)
    features = torch.randint(11, (7,))
    counts = DetectionCounts(features)
    for rows in (slice(0, 25), slice(25, 26), slice(26, 60)):
        counts.update(SparseCodes.from_dense(codes[rows]) if sparse else codes[rows], SparseCodes.from_dense(truth[rows]))
    precision, recall, f1 = [], [], []
    for latent, feature in enumerate(features.tolist()):
        fired = {n for n in range(60) if codes[n, latent] != 0}
        there = {n for n in range(60) if truth[n, feature] > 0}
        p, r = len(fired & there) / len(fired), len(fired & there) / len(there)
        precision.append(p)
        recall.append(r)
        f1.append(2 * p * r / (p + r) if p + r else 0.0)
    result = counts.result()
    assert (result.precision, result.recall, result.f1) == pytest.approx((sum(precision) / 7, sum(recall) / 7, sum(f1) / 7))


def test_the_probe_learns_what_a_threshold_tells():
    """Two features along two axes: the probe tells them apart; a third, which nothing shows, it never claims."""

    def batches(n: int):
        for _ in range(n):
            truth = (torch.rand(256, 3) < torch.tensor([0.5, 0.2, 0.1])).float()
            yield {SYNTHETIC_HOOK: truth[:, :2] + 0.1 * torch.randn(256, 2), "features": SparseCodes.from_dense(truth)}

    probe = LogisticProbe(2, 3, torch.device("cpu")).fit(batches(300), 300, lr=0.1)
    result = probe.score(batches(10), 10)
    assert result.f1 == pytest.approx(2 / 3, abs=0.01)
    assert result.recall == pytest.approx(2 / 3, abs=0.01)
    chance = float(torch.sigmoid(probe.bias[2] + probe.weight[:, 2] @ torch.tensor([0.5, 0.2])))
    assert chance == pytest.approx(0.1, abs=0.03)
