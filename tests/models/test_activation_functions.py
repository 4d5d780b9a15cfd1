"""Thresholds: how they are learned, kept, and used."""

import copy
import math

import numpy as np
import pytest
import torch

from lm_saes import ops
from tests.models import numpy_reference as reference
from tests.models.variants import K, batch, build


def smallest_selected(dictionary, raw):
    weights, mask = reference.arrays(dictionary), raw["mask"].numpy()
    q = reference.gate_values(dictionary.cfg, weights, reference.pre_activations(dictionary.cfg, weights, raw["in"].numpy()))
    chosen = reference.largest(np.where(mask[:, None], q, 0).reshape(1, -1), K * mask.sum())
    return q.reshape(1, -1)[chosen].min()


@pytest.mark.parametrize("include_norm", [True, False])
def test_batchtopk_threshold_is_calibrated_and_then_averaged(include_norm):
    dictionary = build({"act_fn": "batchtopk", "sparsity_include_decoder_norm": include_norm}).train()
    first, second, third = batch(1), batch(2), batch(3)
    threshold = dictionary.activation_function.threshold
    assert threshold.dtype == torch.float64
    dictionary.calibrate([first, second])
    calibrated = (smallest_selected(dictionary, first) + smallest_selected(dictionary, second)) / 2
    assert threshold.item() == pytest.approx(calibrated, rel=1e-12)
    dictionary.update_statistics(dictionary.run(third["in"], mask=third["mask"]), third["in"], third["mask"])
    assert threshold.item() == pytest.approx(0.99 * calibrated + 0.01 * smallest_selected(dictionary, third), rel=1e-12)
    assert dictionary.log_statistics()["metrics/batchtopk_threshold"] == threshold.item()


def test_batchtopk_threshold_without_anything_selected():
    dictionary, raw = build({"act_fn": "batchtopk"}).train(), batch()
    threshold, before = dictionary.activation_function.threshold, dictionary.activation_function.threshold.item()
    nothing = torch.zeros(len(raw["in"]), dtype=torch.bool)
    dictionary.update_statistics(dictionary.run(raw["in"], mask=nothing), raw["in"], nothing)
    dictionary.update_statistics(dictionary.run(raw["in"], k=0), raw["in"])
    dictionary.update_statistics(dictionary.run(raw["in"][:0]), raw["in"][:0])
    assert threshold.item() == before
    threshold.zero_()
    dictionary.update_statistics(dictionary.run(raw["in"], mask=raw["mask"]), raw["in"], raw["mask"])
    assert threshold.item() == pytest.approx(smallest_selected(dictionary, raw)), "the first value is taken whole"
    dictionary.calibrate([{**raw, "mask": nothing}])
    assert threshold.item() == 0


def test_batchtopk_fires_alike_in_both_modes_once_calibrated():
    dictionary, raw = build({"act_fn": "batchtopk"}), batch(n=400)
    dictionary.calibrate([raw])
    l0 = {
        mode: ops.counts(dictionary.train(mode).run(raw["in"], mask=raw["mask"]).codes)[raw["mask"]].double().mean().item() for mode in (True, False)
    }
    assert l0[True] == pytest.approx(K)
    assert l0[False] == pytest.approx(K, abs=0.01)  # the smallest selected value is not above itself


def test_topk_of_masked_rows_is_computed_and_batchtopk_of_them_is_empty():
    raw = batch()
    for act_fn, expected in {"topk": True, "batchtopk": False}.items():
        counts = ops.counts(build({"act_fn": act_fn}).train().run(raw["in"], mask=raw["mask"]).codes)
        assert (counts[~raw["mask"]] > 0).all().item() is expected
        assert counts[raw["mask"]].sum() > 0


def test_thresholds_stay_wide():
    jumprelu, batchtopk = build({"act_fn": "jumprelu"}), build({"act_fn": "batchtopk"})
    exact, threshold = jumprelu.activation_function.log_jumprelu_threshold.float().clone(), 0.1 + 1e-12
    batchtopk.activation_function.threshold.fill_(threshold)
    jumprelu.to(torch.bfloat16)
    assert jumprelu.W_E.dtype == torch.bfloat16
    assert torch.equal(jumprelu.activation_function.log_jumprelu_threshold, exact), "float32 and never rounded through bfloat16"
    for dtype in (torch.bfloat16, torch.float32):
        assert batchtopk.to(dtype).activation_function.threshold.dtype == torch.float64
    assert batchtopk.activation_function.threshold.item() == threshold
    assert build({"act_fn": "jumprelu"}, dtype="bfloat16").activation_function.log_jumprelu_threshold.dtype == torch.float32
    x = batch()["in"]
    for dictionary in (jumprelu.eval(), batchtopk.to(torch.bfloat16).eval()):
        assert dictionary(x).dtype == torch.bfloat16


def test_jumprelu_starts_at_a_tenth():
    from lm_saes.models import SparseDictionary
    from tests.models.variants import config

    dictionary = SparseDictionary.from_config(config({"act_fn": "jumprelu"}))
    torch.testing.assert_close(dictionary.activation_function.learned_threshold(), torch.full((12,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("include_norm", [True, False])
@pytest.mark.parametrize("glu", [True, False])
def test_jumprelu_gradients_equal_the_formulas(include_norm, glu):
    """d code / d theta = -(theta / eps) 1[|q - theta| < eps / 2] 1[h > 0], theta = exp(log theta); d code / d h = 1[fires]."""
    dictionary = build({"act_fn": "jumprelu", "sparsity_include_decoder_norm": include_norm, "use_glu_encoder": glu})
    cfg, weights, x = dictionary.cfg, reference.arrays(dictionary), batch(n=50)["in"]
    g = torch.randn(50, cfg.d_sae, dtype=torch.float64)
    (dictionary.encode(x) * g).sum().backward()
    h = reference.pre_activations(cfg, weights, x.numpy())
    q = reference.gate_values(cfg, weights, h)
    theta, eps = np.exp(weights["activation_function.log_jumprelu_threshold"]), cfg.jumprelu_threshold_window
    near = (np.abs(q - theta) < eps / 2) & (h > 0)
    assert 0 < near.mean() < 1
    to_log_theta = (g.numpy() * -(theta / eps) * near).sum(0) * theta
    np.testing.assert_allclose(dictionary.activation_function.log_jumprelu_threshold.grad, to_log_theta, rtol=1e-12, atol=1e-14)
    fires = (q > theta) & (h > 0)
    to_h = g.numpy() * fires
    gate = reference.sigmoid(x.numpy() @ weights["W_E_glu"] + weights["b_E_glu"]) if glu else 1.0
    np.testing.assert_allclose(dictionary.b_E.grad, (to_h * gate).sum(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dictionary.W_E.grad, x.numpy().T @ (to_h * gate), rtol=1e-12, atol=1e-14)
    assert dictionary.W_D.grad is None, "no gradient flows through the gate"


@pytest.mark.parametrize("include_norm", [True, False])
@pytest.mark.parametrize("norm", [0.25, 1.0, 4.0])
def test_jumprelu_moves_thresholds_as_the_mean_loss_does(norm, include_norm):
    """The straight-through gradient of a whole distribution of inputs is the slope of its mean loss, times the decoder row's norm where the gate
    includes it (docs/training.md says why that does no harm). One latent over a fine grid of inputs, whose mean loss is smooth in the threshold."""
    dictionary = build(
        {"act_fn": "jumprelu", "sparsity_include_decoder_norm": include_norm}, d_model=1, expansion_factor=1, jumprelu_threshold_window=0.02
    )
    log_theta = dictionary.activation_function.log_jumprelu_threshold
    with torch.no_grad():
        dictionary.W_D.fill_(norm)
        dictionary.W_E.fill_(1 / norm)
        dictionary.b_E.zero_()
        dictionary.b_D.fill_(0.1)
        log_theta.fill_(math.log(0.5 if include_norm else 0.5 / norm))  # q = x if the gate includes the norm, else x / norm
    dictionary.activation_function.window = 0.02 if include_norm else 0.02 / norm
    x = torch.linspace(0, 2, 200_001, dtype=torch.float64)[:, None]

    def loss():
        return dictionary.compute_loss({"in": x}, sparsity_loss_type="power", l1_coefficient=3.0, return_aux_data=False)

    loss().backward()
    sides = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            log_theta += step
            sides.append(loss().item())
    slope = (sides[0] - sides[1]) / 2e-3
    assert abs(slope) > 0.1, "the example shows nothing"
    assert log_theta.grad.item() == pytest.approx(slope * (norm if include_norm else 1), rel=0.02)


def test_rescaling_thresholds():
    for act_fn, read in {
        "jumprelu": lambda a: a.learned_threshold().detach(),
        "batchtopk": lambda a: a.threshold,
    }.items():
        function = build({"act_fn": act_fn}).activation_function
        before = copy.deepcopy(read(function))
        function.rescale_gate_(3.0)
        torch.testing.assert_close(read(function), 3 * before)
    assert math.isfinite(function.threshold.item())
