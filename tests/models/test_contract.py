"""What every dictionary does, whatever its options: pairwise by default, all combinations with `-m slow`."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch

from lm_saes import ops
from lm_saes.models import SparseAutoEncoder, SparseDictionary, sparse_dictionary
from tests.models import numpy_reference as reference
from tests.models.variants import FACTORS, NORMS, D, F, K, batch, build, combinations, name_of, pairs, pairwise

PAIRWISE = pairwise(FACTORS)
ALL = [
    *(pytest.param(combination, id=name_of(combination)) for combination in PAIRWISE),
    *(
        pytest.param(combination, id=name_of(combination), marks=pytest.mark.slow)
        for combination in combinations(FACTORS)
        if combination not in PAIRWISE
    ),
]
every_variant = pytest.mark.parametrize("variant", ALL)


def numpy_space(dictionary, raw, training):
    """Input and label in the dictionary's own space, and the scale of the label, from the formulas."""
    cfg, mask = dictionary.cfg, raw["mask"].numpy()
    s_in = reference.scale(cfg, raw["in"].numpy(), mask, NORMS["in"], training)
    s_out = reference.scale(cfg, raw[cfg.hook_point_out].numpy(), mask, NORMS[cfg.hook_point_out], training)
    return raw["in"].numpy() * s_in, raw[cfg.hook_point_out].numpy() * s_out, s_out


def test_pairwise_shows_every_pair():
    seen = set().union(*(pairs(combination) for combination in PAIRWISE))
    assert seen == set().union(*(pairs(combination) for combination in combinations(FACTORS)))
    assert len(PAIRWISE) < len(combinations(FACTORS)) / 8


@every_variant
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_the_formulas(variant, training):
    dictionary, raw = build(variant).train(training), batch()
    weights, mask = reference.arrays(dictionary), raw["mask"].numpy()
    x, y, _ = numpy_space(dictionary, raw, training)
    f = reference.codes(dictionary.cfg, weights, x, K, mask, training)

    normalized = dictionary.normalize_activations(raw)
    np.testing.assert_allclose(dictionary.prepare_label(normalized).numpy(), y, rtol=1e-13)
    forward = dictionary.run(dictionary.prepare_input(normalized), mask=raw["mask"])
    np.testing.assert_allclose(ops.to_dense(forward.codes).detach(), f, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(forward.reconstruction.detach(), reference.decode(weights, f, x), rtol=1e-10, atol=1e-13)
    assert 0 < (f != 0).mean() < 1, "the example shows nothing"


@every_variant
def test_shapes(variant):
    dictionary, raw = build(variant).eval(), batch(n=6)
    deep = {"in": raw["in"].view(2, 3, D), "out": raw["out"].view(2, 3, D), "mask": raw["mask"].view(2, 3)}
    x = dictionary.prepare_input(dictionary.normalize_activations(deep))
    codes, hidden = dictionary.encode(x, return_hidden_pre=True)
    assert codes.shape == hidden.shape == (2, 3, F)
    assert dictionary.encode(x).shape == (2, 3, F)
    assert dictionary.decode(codes).shape == dictionary(x).shape == (2, 3, D)
    assert dictionary.features(deep).shape == (2, 3, F)
    assert dictionary.reconstruct(deep).shape == (2, 3, D)
    torch.testing.assert_close(dictionary(x), dictionary.decode(codes, x))
    torch.testing.assert_close(dictionary.features(deep).view(6, F), dictionary.features(raw))
    torch.testing.assert_close(dictionary.reconstruct(deep).view(6, D), dictionary.reconstruct(raw))
    assert torch.all((codes == 0) | (codes == hidden)), "a code is the gated h"


@every_variant
def test_reconstruct_leads_back_to_raw_space(variant):
    dictionary, raw = build(variant).eval(), batch()
    weights = reference.arrays(dictionary)
    x, _, s_out = numpy_space(dictionary, raw, training=False)
    f = reference.codes(dictionary.cfg, weights, x, K, raw["mask"].numpy(), training=False)
    np.testing.assert_allclose(dictionary.reconstruct(raw).detach(), reference.decode(weights, f, x) / s_out, rtol=1e-10, atol=1e-13)
    normalized, factors = dictionary.normalize_activations(raw, return_scale_factor=True)
    back = dictionary.denormalize_activations(normalized, factors)
    assert set(factors) == set(dictionary.cfg.associated_hook_points)
    for hook in factors:
        torch.testing.assert_close(back[hook], raw[hook])


@every_variant
def test_a_row_depends_on_itself_alone_in_eval_mode(variant):
    dictionary, raw = build(variant, dtype="float32").eval(), batch(dtype=torch.float32)
    x = dictionary.prepare_input(dictionary.normalize_activations(raw))
    together = dictionary.encode(x)
    for row in range(len(x)):
        torch.testing.assert_close(dictionary.encode(x[row : row + 1])[0], together[row], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dictionary.encode(x.flip(0)).flip(0), together, rtol=1e-6, atol=1e-6)


@every_variant
def test_saved_and_loaded_is_the_same(variant, tmp_path):
    dictionary, raw = build(variant), batch()
    dictionary.provenance = {"model": {"model_name": "demo"}}
    dictionary.save_pretrained(tmp_path / "a")
    loaded = SparseDictionary.from_pretrained(tmp_path / "a", fold_activation_scale=False)
    assert not loaded.training
    assert loaded.cfg == dictionary.cfg
    assert loaded.provenance == dictionary.provenance
    assert loaded.state_dict().keys() == dictionary.state_dict().keys()
    for name, tensor in dictionary.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == tensor.dtype
    assert torch.equal(loaded.reconstruct(raw), dictionary.eval().reconstruct(raw))
    loaded.save_pretrained(tmp_path / "b")
    for file in ("config.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "sae_weights.safetensors"]


@every_variant
def test_loss_has_finite_gradients_everywhere(variant):
    dictionary, raw = build(variant), batch()
    loss, aux = dictionary.compute_loss(
        dictionary.normalize_activations(raw),
        sparsity_loss_type="tanh",
        l1_coefficient=0.1,
        lp_coefficient=0.1 if variant["act_fn"] == "jumprelu" else None,
        auxk_coefficient=0.1,
        update_dead_statistics=lambda codes, mask: torch.arange(F) % 3 == 0,
    )
    torch.testing.assert_close(loss, sum(aux["losses"].values()))
    loss.backward()
    for name, parameter in dictionary.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_one_step_of_training_learns_nothing_from_masked_tokens():
    for variant in PAIRWISE:
        gradients = []
        for noise in (0.0, 1.0, math.nan):
            dictionary, raw = build(variant), batch()
            raw["in"] = torch.where(raw["mask"][:, None], raw["in"], raw["in"] + noise)
            raw["out"] = torch.where(raw["mask"][:, None], raw["out"], raw["out"] - noise)
            loss = dictionary.compute_loss(dictionary.normalize_activations(raw), sparsity_loss_type="tanh-quad", return_aux_data=False)
            gradients.append(torch.autograd.grad(loss, list(dictionary.parameters())))
        for first, second, third in zip(*gradients, strict=True):
            torch.testing.assert_close(first, second)
            torch.testing.assert_close(first, third)


def test_all_masked_batch_gives_zero_loss_and_zero_gradients():
    for variant in PAIRWISE:
        dictionary, raw = build(variant), batch()
        raw["mask"] = torch.zeros(len(raw["in"]), dtype=torch.bool)
        for kind in ("power", "tanh", "tanh-quad"):
            loss = dictionary.compute_loss(
                dictionary.normalize_activations(raw),
                sparsity_loss_type=kind,
                p=0.5,
                lp_coefficient=1.0 if variant["act_fn"] == "jumprelu" else None,
                auxk_coefficient=1.0,
                update_dead_statistics=lambda codes, mask: torch.ones(F, dtype=torch.bool),
                return_aux_data=False,
            )
            assert loss.item() == 0
            for gradient in torch.autograd.grad(loss, list(dictionary.parameters()), allow_unused=True):
                assert gradient is None or torch.all(gradient == 0)


@pytest.mark.parametrize("act_fn", FACTORS["act_fn"])
def test_autocast_keeps_weights_and_decisions_wide(act_fn):
    dictionary, raw = build({"act_fn": act_fn}, dtype="float32"), batch(dtype=torch.float32)
    plain = dictionary.run(raw["in"], mask=raw["mask"])
    with torch.autocast("cpu", torch.bfloat16):
        loss, aux = dictionary.compute_loss(
            raw,
            sparsity_loss_type="tanh-quad",
            lp_coefficient=0.1 if act_fn == "jumprelu" else None,
            auxk_coefficient=1.0,
            update_dead_statistics=lambda codes, mask: torch.arange(F) < 4,
        )
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.dtype == torch.float32 and parameter.grad.dtype == torch.float32 for parameter in dictionary.parameters())
    # bfloat16 carries 8 bits: three products of that accuracy.
    found, expected = aux["forward"].reconstruction.float()[raw["mask"]], plain.reconstruction[raw["mask"]]
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_k_and_widths_are_checked():
    dictionary, raw = build({"act_fn": "topk"}), batch()
    dictionary.set_current_k(0)
    assert torch.all(dictionary.encode(raw["in"]) == 0)
    dictionary.set_current_k(F)
    assert torch.equal(dictionary.encode(raw["in"]), dictionary.encode(raw["in"], True)[1].relu())
    assert torch.all((dictionary.encode(raw["in"], k=1) != 0).sum(-1) <= 1)
    with pytest.raises(ValueError, match=f"between 0 and d_sae = {F}, got {F + 1}"):
        dictionary.set_current_k(F + 1)
    with pytest.raises(ValueError, match="width 2, d_model is 5"):
        dictionary.prepare_input({"in": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="no activations of hook point 'in', it has \\['other'\\]"):
        dictionary.prepare_input({"other": torch.zeros(3, 5)})


def test_parameter_groups_and_statistics():
    for act_fn, groups in {"topk": ["others"], "jumprelu": ["others", "jumprelu"]}.items():
        dictionary = build({"act_fn": act_fn})
        found = dictionary.get_parameters()
        assert [group["name"] for group in found] == groups
        assert {id(p) for group in found for p in group["params"]} == {id(p) for p in dictionary.parameters()}
    statistics = dictionary.log_statistics()
    assert statistics["metrics/decoder_norm"] == pytest.approx(dictionary.W_D.norm(dim=1).mean().item())
    assert statistics["metrics/encoder_norm"] == pytest.approx(dictionary.W_E.norm(dim=0).mean().item())
    assert statistics["metrics/decoder_bias_norm"] == pytest.approx(dictionary.b_D.norm().item())
    assert statistics["metrics/mean_jumprelu_threshold"] == pytest.approx(dictionary.activation_function.log_jumprelu_threshold.exp().mean().item())


def test_kernel_options_warn_once_and_meshes_are_refused(monkeypatch):
    monkeypatch.setattr(sparse_dictionary, "_warned_of_kernel_options", False)
    with pytest.warns(UserWarning, match="use_triton_kernel have no effect: lm_saes.ops chooses"):
        dictionary = build({"act_fn": "relu", "use_triton_kernel": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build({"act_fn": "relu", "use_triton_kernel": True})
    with pytest.raises(ValueError, match="device_mesh must be None"):
        SparseAutoEncoder.from_config(dictionary.cfg, device_mesh=object())


@pytest.mark.parametrize("act_fn", FACTORS["act_fn"])
@pytest.mark.parametrize("include_norm", [True, False])
def test_unit_decoder_norm_keeps_the_reconstruction(act_fn, include_norm):
    dictionary, raw = build({"act_fn": act_fn, "sparsity_include_decoder_norm": include_norm, "use_glu_encoder": True}).eval(), batch()
    before = dictionary(raw["in"])
    if act_fn in ("topk", "batchtopk") and not include_norm:
        untouched = copy.deepcopy(dictionary.state_dict())
        with pytest.raises(Exception, match=f"changes what {act_fn} selects"):
            dictionary.transform_to_unit_decoder_norm()
        assert all(torch.equal(untouched[name], tensor) for name, tensor in dictionary.state_dict().items())
        return
    dictionary.transform_to_unit_decoder_norm()
    torch.testing.assert_close(dictionary.decoder_norm(), torch.ones(F, dtype=torch.float64))
    torch.testing.assert_close(dictionary(raw["in"]), before)


def test_what_the_initializer_uses():
    dictionary, raw = build({"act_fn": "relu", "use_glu_encoder": True}), batch(n=40)
    dictionary.set_decoder_to_fixed_norm(0.5, force_exact=True)
    torch.testing.assert_close(dictionary.decoder_norm(), torch.full((F,), 0.5, dtype=torch.float64))
    with torch.no_grad():
        dictionary.W_D[0] *= 10
        dictionary.W_D[1] *= 0.1
    dictionary.set_decoder_to_fixed_norm(1.0, force_exact=False)
    torch.testing.assert_close(dictionary.decoder_norm()[:3], torch.tensor([1.0, 0.05, 0.5], dtype=torch.float64))
    dictionary.init_encoder_with_decoder_transpose(2.0)
    assert torch.equal(dictionary.W_E, 2 * dictionary.W_D.T)
    dictionary.set_encoder_to_fixed_norm(3.0)
    torch.testing.assert_close(dictionary.encoder_norm(), torch.full((F,), 3.0, dtype=torch.float64))
    dictionary.init_encoder_bias_with_mean_hidden_pre(raw)
    h = dictionary.encode(raw["in"], return_hidden_pre=True)[1][raw["mask"]]
    torch.testing.assert_close(h.mean(0), torch.zeros(F, dtype=torch.float64), atol=1e-5, rtol=0)  # accumulated in float32
    flat = torch.randn(40, 2, dtype=torch.float64) @ torch.randn(2, D, dtype=torch.float64)
    dictionary.init_W_D_with_active_subspace({"in": flat + 5, "mask": raw["mask"]}, 2)
    basis = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:2]
    torch.testing.assert_close(dictionary.W_D @ basis.T @ basis, dictionary.W_D)
    codes = dictionary.encode(raw["in"])
    torch.testing.assert_close(dictionary.decode_coo(codes.to_sparse_coo()), dictionary.decode(codes))
    assert build({"act_fn": "relu", "use_decoder_bias": False}).decoder_bias_norm() == 0


def test_the_active_subspace_is_that_of_the_kept_labels():
    """Not of the inputs, and not of tokens outside the mask."""
    dictionary, raw = build({"act_fn": "relu", "transcoder": True}), batch(n=40)
    basis = torch.linalg.qr(torch.randn(D, 2, dtype=torch.float64)).Q
    labels = torch.randn(40, 2, dtype=torch.float64) @ basis.T
    raw["out"] = torch.where(raw["mask"][:, None], labels, 100 * torch.randn(40, D, dtype=torch.float64))
    dictionary.init_W_D_with_active_subspace(raw, 2)
    torch.testing.assert_close(dictionary.W_D @ basis @ basis.T, dictionary.W_D)
