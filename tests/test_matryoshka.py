"""Nested prefixes: the loss and every gradient against the definition, which decodes each prefix anew; what the option leaves alone."""

from __future__ import annotations

import pytest
import torch

from lm_saes import losses, ops
from lm_saes.config import MatryoshkaConfig, SAEConfig
from lm_saes.config.base import validated
from lm_saes.errors import ConfigError
from lm_saes.losses import LossInputs, LossWeights
from lm_saes.models import SparseDictionary
from lm_saes.ops import SparseCodes
from lm_saes.training.trainer import Trainer, TrainerConfig
from tests.models.variants import FACTORS, batch, build, name_of, pairwise
from tests.training.synthetic import HOOK, SyntheticStream, make_dictionary

WIDTHS, WEIGHTS = (2, 5, 9), (0.5, 1.0, 2.0)
VARIANTS = pairwise(
    {name: FACTORS[name] for name in ("act_fn", "use_glu_encoder", "use_decoder_bias", "sparsity_include_decoder_norm", "transcoder")}
)
IMPLEMENTATIONS = ["reference", "sparse"]


def definition(dictionary, x, y, mask, detach) -> torch.Tensor:
    """Every prefix decoded on its own, with dense codes."""
    codes = ops.to_dense(dictionary.run(x, mask=mask).codes)
    rest = (0 if dictionary.b_D is None else dictionary.b_D) + (0 if dictionary.W_skip is None else x @ dictionary.W_skip)
    total = torch.zeros((), dtype=x.dtype)
    for level, (width, weight) in enumerate(zip(WIDTHS, WEIGHTS, strict=True)):
        inner = WIDTHS[level - 1] if level else 0
        known = codes[:, :inner] @ dictionary.W_D[:inner] + rest
        if detach and level:
            known = known.detach()
        reconstruction = known + codes[:, inner:width] @ dictionary.W_D[inner:width]
        total = total + weight * (reconstruction - y)[mask].square().sum(-1).mean()
    return total


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_loss_and_every_gradient_are_those_of_the_definition(variant, detach, implementation, monkeypatch):
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, implementation)
    matryoshka = MatryoshkaConfig(widths=WIDTHS, weights=WEIGHTS, detach=detach)
    dictionary, raw = build(variant, matryoshka=matryoshka).train(), batch()
    y = raw["out"].clone().requires_grad_()
    x = raw["in"].clone().requires_grad_()
    forward = dictionary.run(x, mask=raw["mask"])
    found = losses.prefix_loss(dictionary, LossInputs(x, y, forward, raw["mask"]))
    expected = definition(dictionary, x, y, raw["mask"], detach)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    at = [x, y, *dictionary.parameters()]
    for name, ours, theirs in zip(
        ["x", "y", *(name for name, _ in dictionary.named_parameters())],
        torch.autograd.grad(found, at, allow_unused=True),
        torch.autograd.grad(expected, at, allow_unused=True),
        strict=True,
    ):
        if name == "y" and detach:
            continue  # a label has no gradient in training; the definition detaches the reconstruction, not the label
        if theirs is None:
            assert ours is None, name
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda message, name=name: f"{name}: {message}")


def test_detached_prefixes_move_only_what_they_add():
    dictionary, raw = build({"act_fn": "topk"}, matryoshka=MatryoshkaConfig(widths=WIDTHS, detach=True)).train(), batch()
    codes = dictionary.run(raw["in"], mask=raw["mask"]).codes
    for level, error in enumerate(dictionary.prefix_errors(codes, raw["out"], WIDTHS, detach=True)):
        (gradient,) = torch.autograd.grad(error.sum(), [dictionary.W_D], retain_graph=True)
        moved = gradient.abs().sum(1) > 0
        inner, outer = ([0, *WIDTHS][level], WIDTHS[level])
        assert moved[inner:outer].any()
        assert not moved[:inner].any()
        assert not moved[outer:].any()


def test_the_whole_dictionary_is_the_last_level():
    """Prefix d_sae would be the reconstruction loss; total_loss has both terms."""
    dictionary, raw = build({"act_fn": "relu"}, matryoshka=MatryoshkaConfig(widths=WIDTHS)).train(), batch()
    forward = dictionary.run(raw["in"], target=raw["out"])
    inputs = LossInputs(raw["in"], raw["out"], forward, raw["mask"])
    (whole,) = dictionary.prefix_errors(forward.codes, raw["out"], [dictionary.cfg.d_sae])
    torch.testing.assert_close(whole, forward.squared_error)
    loss, terms = losses.total_loss(dictionary, inputs, LossWeights())
    assert set(terms) == {"mse_loss", "prefix_loss"}
    prefixes = [losses.masked_mean(error, raw["mask"]) for error in dictionary.prefix_errors(forward.codes, raw["out"], WIDTHS)]
    assert terms["prefix_loss"].item() == pytest.approx(sum(error.item() for error in prefixes))
    assert loss.item() == pytest.approx(terms["mse_loss"].item() + terms["prefix_loss"].item())


def test_a_range_of_latents_keeps_its_entries():
    dense = torch.randn(6, 9).where(torch.rand(6, 9) < 0.4, 0.0)
    for start, stop in ((0, 9), (2, 5), (8, 9), (4, 4)):
        part = ops.latent_range(SparseCodes.from_dense(dense), start, stop)
        torch.testing.assert_close(ops.to_dense(part), dense[:, start:stop])
        torch.testing.assert_close(ops.latent_range(dense, start, stop), dense[:, start:stop])
    zeros = SparseCodes(torch.tensor([0.0, 1.0]), torch.tensor([1, 0]), torch.tensor([0, 1, 1, 2]), 2)  # a stored zero, an empty row
    assert ops.to_dense(ops.latent_range(zeros, 0, 1)).tolist() == [[0.0], [0.0], [1.0]]


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
def test_training_makes_the_first_prefix_reconstruct(act_fn, tmp_path):
    options = {"sparsity_loss_type": "power", "l1_coefficient": 0.05} if act_fn in {"relu", "jumprelu"} else {}
    errors = {}
    for name, matryoshka in {"plain": None, "nested": MatryoshkaConfig(widths=(8, 24))}.items():
        sae = make_dictionary(act_fn, matryoshka=matryoshka)
        cfg = TrainerConfig(total_training_tokens=150 * 256, lr=3e-3, n_checkpoints=0, exp_result_path=str(tmp_path / name), **options)
        Trainer(cfg).fit(sae, SyntheticStream(batch_size=256))
        held_out = sae.normalize_activations({HOOK: SyntheticStream(batch_size=512, seed=9).activations(0)})
        with torch.no_grad():
            (error,) = sae.prefix_errors(sae.run(held_out[HOOK]).codes, held_out[HOOK], [8])
        errors[name] = error.mean().item()
    assert errors["nested"] < 0.8 * errors["plain"]
    assert "losses/prefix_loss" in (tmp_path / "nested/metrics.jsonl").read_text()
    assert "losses/prefix_loss" not in (tmp_path / "plain/metrics.jsonl").read_text()


def test_saving_folding_and_evaluation_do_not_look_at_it(tmp_path):
    plain, nested = make_dictionary(), make_dictionary(matryoshka=MatryoshkaConfig(widths=(8, 24), weights=(1, 0.5)))
    nested.save_pretrained(tmp_path / "nested")
    loaded = SparseDictionary.from_pretrained(tmp_path / "nested")
    assert loaded.cfg.matryoshka == MatryoshkaConfig(widths=(8, 24), weights=(1.0, 0.5))
    plain.fold_activation_scale()
    x = SyntheticStream().activations(0)
    torch.testing.assert_close(loaded(x), plain(x))


@pytest.mark.parametrize(
    ("matryoshka", "message"),
    [
        ({"widths": [8, 8]}, "widths must be positive and ascending, got"),
        ({"widths": []}, "widths must be positive and ascending, got"),
        ({"widths": [0, 4]}, "widths must be positive and ascending, got"),
        ({"widths": [4, 8], "weights": [1.0]}, "weights must be 2 numbers"),
        ({"widths": [4], "weights": [-1.0]}, "weights must be 1 numbers that are not negative"),
        ({"widths": [4, 64]}, r"matryoshka.widths must lie below d_sae = 64, which is always the last level, got \[4, 64\]"),
        ({"width": [4]}, "did you mean 'widths'"),
    ],
)
def test_errors_name_the_field(matryoshka, message):
    with pytest.raises(ConfigError, match=message):
        validated(SAEConfig, {"hook_point_in": "x", "d_model": 16, "expansion_factor": 4, "matryoshka": matryoshka})
