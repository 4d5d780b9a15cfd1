"""Scales: s = sqrt(d_model) / (mean norm)."""

import math

import pytest
import torch

from lm_saes import SAEConfig, SparseAutoEncoder
from lm_saes.models.normalization import mean_norm, scale_for, update_running_norms_
from tests.models.variants import D, batch, build


def test_vectors_come_to_norm_sqrt_d():
    raw = batch()
    token_wise = build({"act_fn": "relu", "norm_activation": "token-wise"})
    scaled = token_wise.normalize_activations(raw)["in"]
    torch.testing.assert_close(scaled.norm(dim=-1), torch.full((9,), math.sqrt(D), dtype=torch.float64))
    batch_wise = build({"act_fn": "relu", "norm_activation": "batch-wise"}).train()
    scaled = batch_wise.normalize_activations(raw)["in"]
    assert scaled[raw["mask"]].norm(dim=-1).mean().item() == pytest.approx(math.sqrt(D))
    assert scaled.norm(dim=-1).mean().item() != pytest.approx(math.sqrt(D)), "tokens outside the mask do not count"


@pytest.mark.parametrize("mode", ["token-wise", "batch-wise"])
def test_zero_vectors_stay_zero(mode):
    dictionary = build({"act_fn": "relu", "norm_activation": mode}).train()
    scaled, factors = dictionary.normalize_activations({"in": torch.zeros(3, D)}, return_scale_factor=True)
    assert torch.equal(scaled["in"], torch.zeros(3, D, dtype=torch.float64))
    assert torch.all(factors["in"] == 1)


def test_running_norms_move_once_per_step_and_never_in_eval_mode():
    dictionary, raw = build({"act_fn": "topk", "norm_activation": "batch-wise", "transcoder": True}).train(), batch()
    norms = dictionary.running_activation_norms
    norms.zero_()
    expected = torch.stack([raw[hook][raw["mask"]].norm(dim=-1).mean() for hook in ("in", "out")])

    def step(scale):
        normalized = dictionary.normalize_activations({**raw, "in": raw["in"] * scale})
        x = dictionary.prepare_input(normalized)
        dictionary.update_statistics(dictionary.run(x, mask=raw["mask"]), x, raw["mask"])

    step(1.0)
    torch.testing.assert_close(norms, expected)
    step(2.0)
    torch.testing.assert_close(norms, expected * torch.tensor([1.01, 1.0], dtype=torch.float64))
    settled = norms.clone()
    dictionary.eval()
    step(5.0)
    assert torch.equal(norms, settled)
    torch.testing.assert_close(dictionary.normalize_activations(raw)["in"], raw["in"] * math.sqrt(D) / settled[0])


def test_norms_are_needed_and_checked():
    dictionary = build({"act_fn": "relu", "norm_activation": "dataset-wise", "transcoder": True})
    with pytest.raises(ValueError, match="missing for \\['out'\\]"):
        dictionary.set_dataset_average_activation_norm({"in": 1.0})
    with pytest.raises(ValueError, match="must hold positive numbers"):
        dictionary.set_dataset_average_activation_norm({"in": 1.0, "out": 0.0})
    with pytest.raises(ValueError, match="belong to norm_activation 'dataset-wise', got 'inference'"):
        build({"act_fn": "relu"}).set_dataset_average_activation_norm({"in": 1.0})
    dictionary.cfg = dictionary.cfg.replace(dataset_average_activation_norm=None)
    with pytest.raises(ValueError, match="no mean norm for hook point 'in'; initialise"):
        dictionary.normalize_activations(batch())
    fresh = build({"act_fn": "relu", "norm_activation": "batch-wise"}).eval()
    fresh.running_activation_norms.zero_()
    with pytest.raises(ValueError, match="no mean norm for hook point 'in'; train first"):
        fresh.normalize_activations(batch())


def test_labels_are_not_needed_where_the_scale_is_constant():
    raw = batch()
    only_input = {"in": raw["in"]}
    for mode in ("dataset-wise", "batch-wise", "inference"):
        dictionary = build({"act_fn": "relu", "norm_activation": mode, "transcoder": True}).eval()
        torch.testing.assert_close(dictionary.reconstruct(only_input), dictionary.reconstruct(raw))
    token_wise = build({"act_fn": "relu", "norm_activation": "token-wise", "transcoder": True})
    assert token_wise.features(only_input).shape == (9, 12)
    with pytest.raises(ValueError, match="takes the scale of 'out' from the batch, which holds \\['in'\\]"):
        token_wise.reconstruct(only_input)


def test_half_precision_activations_are_measured_and_scaled_in_float32():
    x = torch.full((4, 512), 3.0, dtype=torch.bfloat16)
    assert mean_norm(x).dtype == torch.float32
    assert mean_norm(x).item() == pytest.approx(3 * math.sqrt(512))
    dictionary = build({"act_fn": "relu", "norm_activation": "dataset-wise"}, dtype="float32")
    raw = batch(dtype=torch.bfloat16)
    expected = raw["in"].float() * (math.sqrt(D) / 3.0)
    torch.testing.assert_close(dictionary.normalize_activations(raw)["in"], expected)


def test_functions_at_their_edges():
    assert mean_norm(torch.zeros(0, 4)).item() == 0
    assert mean_norm(torch.ones(2, 4), torch.tensor([False, False])).item() == 0
    assert torch.equal(scale_for(torch.tensor([0.0, 2.0]), 4), torch.tensor([1.0, 1.0]))
    running = torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)
    update_running_norms_(running, torch.tensor([2.0, 0.0, 0.0]))
    assert running.tolist() == [2.0, 5.0, 0.0]


def test_running_norms_keep_their_width_through_casts_and_files(tmp_path):
    """A resumed run has to see the same running mean, bit for bit."""
    sae = SparseAutoEncoder.from_config(SAEConfig(hook_point_in="h", d_model=4, expansion_factor=2, norm_activation="batch-wise"))
    assert sae.running_activation_norms is not None
    sae.running_activation_norms.fill_(1 / 3)
    sae.to(torch.float32)
    sae.save_pretrained(tmp_path)
    again = SparseAutoEncoder.from_pretrained(tmp_path, fold_activation_scale=False)
    assert again.running_activation_norms is not None
    assert again.running_activation_norms.dtype == torch.float64
    assert torch.equal(again.running_activation_norms, torch.full((1,), 1 / 3, dtype=torch.float64))
