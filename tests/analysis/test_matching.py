"""Matching the latents of two dictionaries: permuted, rotated, split and noisy copies, whose answers are known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from lm_saes.analysis import matching
from lm_saes.analysis.matching import compare_dictionaries, match_latents, nearest_latents
from lm_saes.config import SAEConfig
from lm_saes.errors import ConfigError, NonFiniteError
from lm_saes.models.sae import SparseAutoEncoder

HOOK = "blocks.0.hook_resid_post"
scipy = pytest.importorskip("scipy")


def dictionary(rows: torch.Tensor, columns: torch.Tensor | None = None, hook: str = HOOK) -> SparseAutoEncoder:
    """One with these decoder rows [F, D], and these encoder directions [F, D] (the same if left out)."""
    cfg = SAEConfig(hook_point_in=hook, d_model=rows.shape[1], expansion_factor=len(rows) / rows.shape[1], norm_activation="inference")
    sae = SparseAutoEncoder(cfg)
    assert cfg.d_sae == len(rows)
    with torch.no_grad():
        sae.W_D.copy_(rows)
        sae.W_E.copy_((rows if columns is None else columns).T)
    return sae


def rows(n: int = 24, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_a_permuted_and_rescaled_copy_is_the_same_dictionary() -> None:
    a = rows()
    permutation = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    b = a[permutation] * torch.linspace(0.1, 10, 24)[:, None]
    match = compare_dictionaries(dictionary(a), dictionary(b))
    assert match.method == "optimal assignment"
    assert (match.latents, match.pairs) == ((24, 24), 24)
    assert match.mean_matched_cosine == pytest.approx(1, abs=1e-6)
    assert match.mean_matched_encoder_cosine == pytest.approx(1, abs=1e-6)
    assert match.mean_max_cosine == pytest.approx((1, 1), abs=1e-6)
    assert match.shared == 1
    assert match.share_with_partner == {"0.7": (1, 1), "0.9": (1, 1)}
    assert match.chance < 0.95
    pairs = match_latents(normalize(a, dim=1), normalize(b, dim=1))
    assert permutation[pairs.second].tolist() == pairs.first.tolist()


def test_opposite_directions_are_different_features() -> None:
    a = torch.eye(8)
    match = compare_dictionaries(dictionary(a), dictionary(-a))
    assert match.mean_max_cosine == pytest.approx((0, 0), abs=1e-6)
    assert match.share_with_partner["0.7"] == (0, 0)


def test_the_encoder_decides_whether_a_pair_is_the_same_feature() -> None:
    a = torch.eye(8)
    encoder = a.clone()
    encoder[:3] = -a[:3]
    match = compare_dictionaries(dictionary(a), dictionary(a, encoder))
    assert match.mean_matched_cosine == pytest.approx(1)
    assert match.mean_matched_encoder_cosine == pytest.approx(2 / 8)
    assert match.shared == pytest.approx(5 / 8)


def test_a_split_latent_has_one_partner_in_the_assignment_and_two_neighbours() -> None:
    a = torch.eye(8)
    b = torch.cat([a, normalize(a[:4] + 0.3 * a[4:], dim=1)])  # four latents more, near the first four
    match = compare_dictionaries(dictionary(a), dictionary(b))
    near = 1 / math.sqrt(1.09)
    assert match.pairs == 8
    assert match.mean_matched_cosine == pytest.approx(1)
    assert match.mean_max_cosine == pytest.approx((1, (8 + 4 * near) / 12))


def test_without_scipy_or_beyond_the_limit_pairs_are_mutual_best(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.eye(3), torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1.0]])
    beyond = compare_dictionaries(dictionary(a), dictionary(b), assignment_limit=8)
    monkeypatch.setattr(matching, "_assignment", lambda: None)
    without = compare_dictionaries(dictionary(a), dictionary(b))
    for match in (beyond, without):
        assert match.method == "mutual best"
        assert match.pairs == 2  # the second row's own nearest is e1, so e2 has no partner
        assert match.mean_matched_cosine == pytest.approx(1)
        assert match.shared == pytest.approx(2 / 3), "of the latents, not of those that found a partner"
    monkeypatch.undo()
    assert compare_dictionaries(dictionary(a), dictionary(b)).mean_matched_cosine == pytest.approx((1 + 0.6 + 1) / 3)


@given(n=st.integers(1, 30), m=st.integers(1, 30), seed=st.integers(0, 99), block=st.integers(1, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_blocks_change_nothing_and_the_assignment_is_between_its_bounds(n: int, m: int, seed: int, block: int) -> None:
    a, b = normalize(rows(n, 5, seed), dim=1), normalize(rows(m, 5, seed + 1000), dim=1)
    cosines = a @ b.T
    before, matching.BLOCK = matching.BLOCK, block
    try:
        nearest, pairs = nearest_latents(a, b), match_latents(a, b)
        mutual = match_latents(a, b, nearest, assignment_limit=0)
    finally:
        matching.BLOCK = before
    torch.testing.assert_close(nearest.forward, cosines.max(1).values)
    torch.testing.assert_close(nearest.backward, cosines.max(0).values)
    assert nearest.forward_index.tolist() == cosines.argmax(1).tolist()
    assert nearest.backward_index.tolist() == cosines.argmax(0).tolist()
    assert len(pairs.cosines) == min(n, m)
    assert len(set(pairs.first.tolist())) == len(set(pairs.second.tolist())) == min(n, m)
    assert float(pairs.cosines.sum()) >= float(cosines.diagonal().sum()) - 1e-5  # at least as good as any other matching
    assert (
        float(pairs.cosines.sum())
        <= min(float(nearest.forward.sum()) if n <= m else math.inf, float(nearest.backward.sum()) if m <= n else math.inf) + 1e-5
    )
    for first, second in zip(mutual.first.tolist(), mutual.second.tolist(), strict=True):
        assert cosines[first].argmax() == second
        assert cosines[:, second].argmax() == first


def test_a_latent_without_direction_has_no_partner() -> None:
    a = rows()
    a[5] = 0
    match = compare_dictionaries(dictionary(a), dictionary(a))
    assert match.share_with_partner["0.9"] == pytest.approx((23 / 24, 23 / 24))
    json.dumps(match.as_dict(), allow_nan=False)


def test_chance_is_that_of_random_directions() -> None:
    match = compare_dictionaries(dictionary(rows(256, 16)), dictionary(rows(256, 16, seed=5)))
    assert match.mean_max_cosine[0] == pytest.approx(match.chance, abs=0.03)
    wider = compare_dictionaries(dictionary(rows(128, 16)), dictionary(rows(2048, 16, seed=5)))
    assert wider.mean_max_cosine[0] == pytest.approx(wider.chance, abs=0.02)
    assert wider.chance > match.chance + 0.05, "the more there are, the nearer is the nearest"


@pytest.mark.parametrize(
    ("other", "error", "words"),
    [
        ({"rows": rows(24, 8), "hook": "blocks.1.hook_resid_post"}, ConfigError, "same hook points"),
        ({"rows": rows(24, 6)}, ConfigError, "width 8 and 6"),
        ({"rows": rows(24, 8) * float("nan")}, NonFiniteError, "second"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compare_dictionaries(dictionary(rows(24, 8)), dictionary(**other))
