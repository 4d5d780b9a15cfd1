"""The numbers of shuffling: what they are for orders that are known, and that reading a cache comes near the ideal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lm_saes.activations import writer as writer_module
from lm_saes.activations.shuffle_quality import order_quality, shuffle_quality
from lm_saes.errors import CacheError
from tests.activations.caches import TWO, write

N, S = 40_000, 50


def test_a_random_permutation_is_ideal():
    quality = order_quality(torch.randperm(N), S, 500)
    assert abs(quality.rank_correlation) < 0.03
    assert quality.distance < 0.02
    assert abs(quality.same_context_in_batch - 1) < 0.05


def test_text_from_front_to_back_is_the_opposite():
    quality = order_quality(torch.arange(N), S, 500)
    assert quality.rank_correlation == pytest.approx(1)
    assert quality.distance > 0.99
    assert quality.same_context_in_batch == pytest.approx(N / 500, rel=0.02)  # a batch holds ten whole contexts instead of one of each


def test_shuffled_contexts_that_stay_whole():
    """No trend, but clumps: only the second and third number see them."""
    order = (torch.randperm(N // S)[:, None] * S + torch.arange(S)).flatten()
    quality = order_quality(order, S, 500)
    assert abs(quality.rank_correlation) < 0.1
    assert quality.distance > 0.99
    assert quality.same_context_in_batch == pytest.approx(N / 500, rel=0.02)


def test_shuffled_blocks_in_order():
    order = torch.cat([block[torch.randperm(len(block))] for block in torch.arange(N).split(N // 10)])
    quality = order_quality(order, S, 500)
    assert quality.rank_correlation > 0.98
    assert 0.7 < quality.distance < 0.95
    assert quality.same_context_in_batch == pytest.approx(10, rel=0.1)


def test_nothing_to_judge():
    with pytest.raises(CacheError, match="fewer than two contexts"):
        order_quality(torch.arange(10), 50, 5)
    with pytest.raises(CacheError, match="of more than one token"):
        order_quality(torch.arange(10) * 50, 50, 5)


def test_reading_with_a_buffer_is_better_than_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 1000)
    write(tmp_path / "1d", n_samples_per_chunk=500)
    write(tmp_path / "2d", target=TWO, n_samples_per_chunk=50)
    for name, limits in {"1d": (1.4, 0.08), "2d": (6.0, 0.6)}.items():
        in_order = shuffle_quality(str(tmp_path / name), buffer_size=None, batch_size=64)
        shuffled = shuffle_quality(str(tmp_path / name), buffer_size=512, batch_size=64)
        assert in_order.rank_correlation > 0.9
        assert abs(shuffled.rank_correlation) < 0.15
        assert shuffled.same_context_in_batch < min(limits[0], in_order.same_context_in_batch)
        assert shuffled.distance < min(limits[1], in_order.distance)
        assert shuffled.tokens == 3136
