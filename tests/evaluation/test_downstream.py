"""Splicing into a model whose forward pass is three matrix products."""

from __future__ import annotations

import math

import pytest
import torch

from lm_saes.errors import ConfigError
from lm_saes.evaluation.downstream import DownstreamSums, Splicer, final_hidden_cosines, kl_divergences, next_token_losses, recovered_fraction
from tests.evaluation.toy import ToyDictionary, ToyModel

IDS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])
EVERYWHERE = torch.ones_like(IDS, dtype=torch.bool)


def test_cross_entropy_counts_positions_with_a_real_next_token() -> None:
    logits = torch.zeros(2, 4, 7)
    attention = torch.tensor([[True, True, False, False], [False, True, True, True]])
    losses = next_token_losses(logits, IDS, attention)
    assert losses.tolist() == pytest.approx([math.log(7)] * 3)  # 1 in the first row, 2 in the second
    logits[0, 0, IDS[0, 1]] = 100
    assert next_token_losses(logits, IDS, attention)[0] == pytest.approx(0, abs=1e-6)


def test_kl_closed_form() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.125, 0.125, 0.75])
    clean, changed = p.log().expand(1, 2, 3), q.log().expand(1, 2, 3) + 5  # a constant shift of logits changes nothing
    expected = (
        0.5 * math.log(4) + 0.25 * math.log(2) + 0.25 * math.log(1 / 3)
    )  # of clean against changed, not the other way: that is 0.564, this 0.592
    assert kl_divergences(clean, changed, torch.ones(1, 2, dtype=torch.bool)).tolist() == pytest.approx([expected])
    assert kl_divergences(clean, clean, torch.ones(1, 2, dtype=torch.bool)).tolist() == [0]
    attention = torch.tensor([[True, True, False, False], [False, True, True, True]])
    assert len(kl_divergences(p.log().expand(2, 4, 3), q.log().expand(2, 4, 3), attention)) == 3, "the positions of the cross-entropy"


def test_recovered_fraction() -> None:
    assert recovered_fraction(2.0, 2.0, 6.0) == 1
    assert recovered_fraction(2.0, 6.0, 6.0) == 0
    assert recovered_fraction(2.0, 3.0, 6.0) == 0.75
    assert recovered_fraction(2.0, 3.0, 2.0) is None
    assert recovered_fraction(2.0, 3.0, 1.0) is None, "an ablation that helps is no yardstick"


def test_hidden_state_cosines_leave_padding_out() -> None:
    clean = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    changed = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    assert final_hidden_cosines(clean, changed, torch.tensor([[True, True, False]])).tolist() == [1, 0]


def test_splice_changes_the_chosen_positions_only() -> None:
    model, mask = ToyModel(), torch.tensor([[True, False, True, False], [False, True, False, True]])
    splicer = Splicer(model, IDS, EVERYWHERE)
    dictionary = ToyDictionary(lambda x: -3 * x)
    clean, spliced = splicer.clean(), splicer.reconstructed(dictionary, mask)
    torch.testing.assert_close(spliced[mask], -3 * clean[mask])
    assert torch.equal(spliced[~mask], clean[~mask])
    ablated = splicer.constant("a", mask, 0.0)
    assert torch.equal(ablated[mask], torch.zeros_like(ablated[mask]))
    assert torch.equal(ablated[~mask], clean[~mask])
    assert torch.equal(splicer.reconstructed(dictionary, ~EVERYWHERE), clean)


def test_a_transcoder_reads_and_writes_in_one_forward() -> None:
    model = ToyModel()
    perfect = ToyDictionary(lambda x: x @ model.W_1, hook_in="a", hook_out="b")
    splicer = Splicer(model, IDS, EVERYWHERE)
    clean, before = splicer.clean(), model.n_forwards
    torch.testing.assert_close(splicer.reconstructed(perfect, EVERYWHERE), clean)
    assert model.n_forwards == before + 1
    twice = ToyDictionary(lambda x: 2 * x @ model.W_1, hook_in="a", hook_out="b")
    torch.testing.assert_close(splicer.reconstructed(twice, EVERYWHERE), 2 * clean)


def test_a_dictionary_against_the_current_is_refused() -> None:
    backwards = ToyDictionary(lambda x: x, hook_in="b", hook_out="a")
    with pytest.raises(ConfigError, match="reaches a first"):
        Splicer(ToyModel(), IDS, EVERYWHERE).reconstructed(backwards, EVERYWHERE)


def losses_by_hand(model: ToyModel, a: torch.Tensor) -> float:
    logits = a @ model.W_1 @ model.W_U
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))


def test_all_losses_of_a_stream_by_hand() -> None:
    model = ToyModel()
    successor = 8 * torch.eye(7)[(torch.arange(7) + 1) % 7]
    model.W_U = torch.linalg.pinv(model.embedding @ model.W_1) @ successor  # it has learned something that an ablation can spoil
    mask = EVERYWHERE.clone()
    mask[:, 0] = False
    dictionary = ToyDictionary(lambda x: x / 2)
    sums = DownstreamSums(model, dictionary)
    a = model.embedding[IDS]
    for row in range(2):
        sums.update(IDS[row : row + 1], EVERYWHERE[:1], mask[:1], a[row : row + 1])
    result = sums.result()

    kept = mask[..., None]
    means = torch.stack([a[0, 1:].mean(0), a[:, 1:].mean((0, 1))])[:, None]  # the running mean at each of the two batches
    expected = {
        "original": losses_by_hand(model, a),
        "reconstructed": losses_by_hand(model, torch.where(kept, a / 2, a)),
        "reconstructed_everywhere": losses_by_hand(model, a / 2),
        "ablated": losses_by_hand(model, torch.where(kept, 0.0, a)),
        "mean_ablated": losses_by_hand(model, torch.where(kept, means, a)),
    }
    for name, loss in expected.items():
        assert result[f"metrics/downstream_loss_{name}"] == pytest.approx(loss, rel=1e-5), name
    log_p, log_q = ((x @ model.W_1 @ model.W_U)[:, :-1].log_softmax(-1) for x in (a, torch.where(kept, a / 2, a)))
    assert result["metrics/kl_divergence"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-5)
    damage = expected["reconstructed"] - expected["original"]
    assert result["metrics/delta_ce"] == pytest.approx(damage, rel=1e-4)
    for name, key in (("ablated", "recovered_fraction"), ("ablated", "downstream_loss_ratio"), ("mean_ablated", "recovered_fraction_mean")):
        total = expected[name] - expected["original"]
        assert total > 0.1
        assert result[f"metrics/{key}"] == pytest.approx(1 - damage / total, rel=1e-3)
    assert result["metrics/recovered_fraction"] != pytest.approx(result["metrics/recovered_fraction_mean"], rel=0.01)


def test_an_encoder_gives_cosines_and_no_loss() -> None:
    model = ToyModel(is_causal=False)
    sums = DownstreamSums(model, ToyDictionary(lambda x: -x))
    sums.update(IDS, EVERYWHERE, EVERYWHERE, model.embedding[IDS])
    result = sums.result()
    assert result["metrics/final_hidden_cosine"] == pytest.approx(-1)
    assert result["metrics/final_hidden_cosine_ablated"] == 0
    assert not any("loss" in name or "kl" in name for name in result)


def test_no_position_counts() -> None:
    sums = DownstreamSums(ToyModel(), ToyDictionary(lambda x: x))
    ids = torch.tensor([[3], [2]])
    sums.update(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool), sums.model.logits(ids)[..., :4])
    assert set(sums.result().values()) == {None}
