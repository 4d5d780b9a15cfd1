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
