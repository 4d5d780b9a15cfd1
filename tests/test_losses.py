"""Each term: its value against NumPy, its gradient in every parameter against finite differences, its edges."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes import losses, ops
from lm_saes.errors import ConfigError
from lm_saes.losses import LossInputs, LossWeights
from lm_saes.models import Forward
from lm_saes.ops import SparseCodes
from tests.models import numpy_reference as reference
from tests.models.variants import FACTORS, F, batch, build, name_of, pairwise

LOSS_FACTORS = {name: FACTORS[name] for name in ("act_fn", "use_glu_encoder", "use_decoder_bias", "sparsity_include_decoder_norm")}
every_variant = pytest.mark.parametrize("variant", pairwise(LOSS_FACTORS), ids=name_of)
DEAD = torch.arange(F) % 3 == 0
K_AUX = 1
"""Fewer than the dead latents that fire on some tokens: else it would not matter."""
STEP = 1e-6
"""Of finite differences: their rounding is then 1e-8 for a loss of 50, and the curvature of sqrt near its singularity does not show."""

TERMS = {
    "reconstruction": losses.reconstruction_loss,
    "power 1": losses.power_loss,
    "power 0.5": lambda dictionary, inputs: losses.power_loss(dictionary, inputs, 0.5),
    "power 3": lambda dictionary, inputs: losses.power_loss(dictionary, inputs, 3.0),
    "tanh": lambda dictionary, inputs: losses.tanh_loss(dictionary, inputs, 1.5),
    "tanh-quad": lambda dictionary, inputs: losses.tanh_quad_loss(dictionary, inputs, 1.5, 0.2),
    "preactivation": losses.preactivation_loss,
    "auxk": lambda dictionary, inputs: losses.auxk_loss(dictionary, inputs, K_AUX),
}


def inputs_of(dictionary, raw) -> LossInputs:
    x = raw["in"]
    return LossInputs(x, raw["out"], dictionary.run(x, mask=raw["mask"]), raw["mask"], DEAD)


def applies(term, variant):
    return term != "preactivation" or variant["act_fn"] == "jumprelu"


@every_variant
def test_values_equal_the_formulas(variant):
    dictionary, raw = build(variant).train(), batch()
    inputs = inputs_of(dictionary, raw)
    cfg, weights, mask = dictionary.cfg, reference.arrays(dictionary), raw["mask"].numpy()
    x, y = raw["in"].numpy(), raw["out"].numpy()
    f = reference.codes(cfg, weights, x, cfg.top_k, mask, training=True)
    x_hat, norm = reference.decode(weights, f, x), reference.decoder_norm(weights)
    expected = {
        "reconstruction": reference.reconstruction_loss(x_hat, y, mask),
        "power 1": reference.power_loss(f, norm, mask, 1),
        "power 0.5": reference.power_loss(f, norm, mask, 0.5),
        "power 3": reference.power_loss(f, norm, mask, 3),
        "tanh": reference.tanh_loss(f, norm, mask, 1.5),
        "tanh-quad": reference.tanh_quad_loss(f, norm, mask, 1.5, 0.2),
        "auxk": reference.auxk_loss(cfg, weights, x, y, x_hat, mask, DEAD.numpy(), K_AUX),
    }
    if variant["act_fn"] == "jumprelu":
        expected["preactivation"] = reference.preactivation_loss(cfg, weights, x, mask)
    for name, value in expected.items():
        assert TERMS[name](dictionary, inputs).item() == pytest.approx(value, rel=1e-10), name
        assert value > 0, name


@every_variant
@pytest.mark.parametrize("term", TERMS)
def test_gradients_equal_finite_differences(variant, term):
    """In every entry of every parameter. JumpReLU's threshold is left out where its gradient is straight-through: see
    tests/models/test_activation_functions.py. AuxK holds the error and V fixed, hence the forward is made once."""
    if not applies(term, variant):
        return
    dictionary, raw = build(variant).train(), batch()
    fixed = None if term != "auxk" else detached(inputs_of(dictionary, raw))

    def loss():
        inputs = fixed or inputs_of(dictionary, raw)
        return TERMS[term](dictionary, inputs), ops.to_dense(inputs.forward.codes) != 0

    value, fires = loss()
    value.backward()
    for name, parameter in dictionary.named_parameters():
        if name.startswith("activation_function") and term != "preactivation":
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        with torch.no_grad():
            for index in range(parameter.numel()):
                entry = parameter.view(-1)[index : index + 1]
                original, sides = entry.clone(), []
                for step in (STEP, -STEP):
                    entry.copy_(original + step)
                    moved, still_fires = loss()
                    assert torch.equal(fires, still_fires), "the example lies too near a kink"
                    sides.append(moved.item())
                entry.copy_(original)
                difference = (sides[0] - sides[1]) / (2 * STEP)
                assert gradient.view(-1)[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-7), (name, index)


def detached(inputs: LossInputs) -> LossInputs:
    forward = Forward(ops.to_dense(inputs.forward.codes).detach(), inputs.forward.reconstruction.detach())
    return dataclasses.replace(inputs, forward=forward)


@every_variant
def test_sparse_and_dense_codes_give_the_same(variant):
    """JumpReLU's thresholds aside: they learn from latents just below them too, which only dense codes carry."""
    dictionary, raw = build(variant).train(), batch()
    parameters = dictionary.get_parameters()[0]["params"]
    sparse = inputs_of(dictionary, raw)
    dense = ops.to_dense(sparse.forward.codes)
    for name, term in TERMS.items():
        if applies(name, variant):
            results = []
            for codes in (dense, SparseCodes.from_dense(dense)):
                value = term(dictionary, dataclasses.replace(sparse, forward=Forward(codes, sparse.forward.reconstruction)))
                results.append((value, *torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)))
            for first, second in zip(*results, strict=True):
                torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


def test_auxk_teaches_dead_latents_and_no_other():
    for variant in pairwise(LOSS_FACTORS):
        dictionary, raw = build(variant).train(), batch()
        losses.auxk_loss(dictionary, inputs_of(dictionary, raw), K_AUX).backward()
        for name in ("W_E", "b_E", "W_D", "W_E_glu", "b_E_glu", "b_D"):
            parameter = getattr(dictionary, name)
            if parameter is None:
                continue
            if name == "b_D":
                assert parameter.grad is None
                continue
            per_latent = parameter.grad.abs() if parameter.ndim == 1 else parameter.grad.abs().sum(1 if name == "W_D" else 0)
            assert per_latent[DEAD].sum() > 0, name
            assert torch.all(per_latent[~DEAD] == 0), name


def test_auxk_at_its_edges():
    dictionary, raw = build({"act_fn": "topk"}).train(), batch()
    inputs = inputs_of(dictionary, raw)
    for nobody in (None, torch.zeros(F, dtype=torch.bool)):
        assert losses.auxk_loss(dictionary, dataclasses.replace(inputs, dead=nobody)).item() == 0
    all_dead = dataclasses.replace(inputs, dead=torch.ones(F, dtype=torch.bool))
    assert losses.auxk_loss(dictionary, all_dead, k_aux=10 * F).isfinite()
    no_error = dataclasses.replace(all_dead, target=inputs.forward.reconstruction.detach())
    value = losses.auxk_loss(dictionary, no_error)
    assert value.item() == 0
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, [dictionary.W_E, dictionary.W_D]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    codes=st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 50.0]), min_size=2 * F, max_size=2 * F),
    p=st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 4.0]),
    masked=st.booleans(),
)
def test_gradients_of_the_penalties_are_finite_wherever_codes_are_zero(codes, p, masked):
    dictionary = build({"act_fn": "relu"}, dtype="float32")
    f = torch.tensor(codes).view(2, F).requires_grad_()
    mask = torch.tensor([False, not masked])
    zeros = torch.zeros(2, dictionary.cfg.d_model)
    inputs = LossInputs(zeros, zeros, Forward(f, zeros), mask)
    for value in (losses.power_loss(dictionary, inputs, p), losses.tanh_loss(dictionary, inputs), losses.tanh_quad_loss(dictionary, inputs)):
        gradients = torch.autograd.grad(value, [f, dictionary.W_D])
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert torch.all(gradients[0][0] == 0), "a masked token teaches nothing"


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("act_fn", FACTORS["act_fn"])
def test_no_token_one_token_zero_token(act_fn, n):
    dictionary = build({"act_fn": act_fn}).train()
    nothing = torch.zeros(n, dictionary.cfg.d_model, dtype=torch.float64)
    for mask in (None, torch.ones(n, dtype=torch.bool)):
        inputs = LossInputs(nothing, nothing, dictionary.run(nothing, mask=mask), mask, DEAD)
        for kind in ("power", "tanh", "tanh-quad", None):
            loss, _ = losses.total_loss(dictionary, inputs, LossWeights(sparsity_loss_type=kind, p=2.0, auxk=1.0))
            assert loss.isfinite()
            gradients = torch.autograd.grad(loss, list(dictionary.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True)
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_total_is_the_weighted_sum_of_the_terms_asked_for():
    dictionary, raw = build({"act_fn": "jumprelu"}).train(), batch()
    inputs = inputs_of(dictionary, raw)
    plain, terms = losses.total_loss(dictionary, inputs, LossWeights())
    assert list(terms) == ["mse_loss"]
    assert torch.equal(plain, losses.reconstruction_loss(dictionary, inputs))
    weights = LossWeights(sparsity_loss_type="tanh", sparsity=0.5, tanh_stretch_coefficient=1.5, lp=0.25, auxk=2.0, k_aux=K_AUX)
    loss, terms = losses.total_loss(dictionary, inputs, weights)
    expected = {
        "mse_loss": plain,
        "sparsity_loss": 0.5 * TERMS["tanh"](dictionary, inputs),
        "lp_loss": 0.25 * losses.preactivation_loss(dictionary, inputs),
        "aux_loss": 2 * TERMS["auxk"](dictionary, inputs),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(loss, sum(expected.values()))
    with pytest.raises(ConfigError, match="pre-activation loss; got act_fn 'relu'"):
        losses.preactivation_loss(build({"act_fn": "relu"}), inputs)
    with pytest.raises(ConfigError, match="must be power, tanh or tanh-quad, got 'l1'"):
        losses.total_loss(dictionary, inputs, LossWeights(sparsity_loss_type="l1"))  # pyright: ignore[reportArgumentType]


def test_label_variance():
    y, mask = batch()["out"], batch()["mask"]
    assert losses.label_variance(y).item() == pytest.approx(np.var(y.numpy(), axis=0).sum())
    assert losses.label_variance(y, mask).item() == pytest.approx(np.var(y[mask].numpy(), axis=0).sum())


def test_terms_are_summed_in_float32_under_autocast():
    dictionary, raw = build({"act_fn": "jumprelu"}, dtype="float32"), batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = inputs_of(dictionary, raw)
        assert all(term(dictionary, inputs).dtype == torch.float32 for term in TERMS.values())
