"""Codes and reconstructions equal those of sae-lens 6.54.12, which wrote the folders in tests/golden/sae_lens (scripts/make_sae_lens_golden.py)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lm_saes.errors import ConfigError, FoldingError, WeightsError
from lm_saes.interop import from_saelens, to_saelens
from lm_saes.models import SparseAutoEncoder
from tests.parity import recipes
from tests.parity.recipes import GOLDEN, HOOK, HOOK_OUT, D, F, K

READ = sorted(path.name for path in (GOLDEN / "read").iterdir())
NEED_A_FACTOR = {"standard_scaled"}
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def check_outputs(dictionary: SparseAutoEncoder, expected: dict[str, torch.Tensor]) -> None:
    batch = {HOOK: expected["x"], HOOK_OUT: torch.zeros_like(expected["x"])}
    assert not dictionary.training
    with torch.no_grad():
        torch.testing.assert_close(dictionary.features(batch), expected["codes"], **TOLERANCE)
        torch.testing.assert_close(dictionary.reconstruct(batch), expected["reconstruction"], **TOLERANCE)


@pytest.mark.parametrize("case", READ)
def test_what_sae_lens_wrote_computes_the_same_here(case):
    expected = load_file(GOLDEN / "read" / case / "outputs.safetensors")
    options = {"scaling_factor": float(expected["scaling_factor"])} if case in NEED_A_FACTOR else {}
    dictionary = from_saelens(GOLDEN / "read" / case, **options)
    assert (expected["codes"] != 0).any(1).all()
    check_outputs(dictionary, expected)
    assert dictionary.cfg.hook_point_in == HOOK
    assert dictionary.cfg.hook_point_out == (HOOK_OUT if "transcoder" in case else HOOK)
    assert dictionary.provenance["format"] == "sae-lens"


@pytest.mark.parametrize("case", sorted(set(READ) - NEED_A_FACTOR))
def test_from_pretrained_knows_the_folder(case):
    fold = "constant_norm" not in case
    dictionary = SparseAutoEncoder.from_pretrained(GOLDEN / "read" / case, fold_activation_scale=fold)
    check_outputs(dictionary, load_file(GOLDEN / "read" / case / "outputs.safetensors"))


def test_a_scale_for_each_token_is_not_folded_silently():
    with pytest.raises(FoldingError, match="fold_activation_scale=False"):
        SparseAutoEncoder.from_pretrained(GOLDEN / "read" / "standard_constant_norm")


def test_reading_it_wrongly_would_be_seen():
    """The weights are such that each convention matters: the subtraction of b_dec, the factor on the input, the norms, the thresholds below zero."""
    plain, without = (load_file(GOLDEN / "read" / case / "outputs.safetensors") for case in ("standard", "standard_without_subtraction"))
    assert (plain["codes"] - without["codes"]).abs().max() > 0.5
    topk, rescaled = (load_file(GOLDEN / "read" / case / "outputs.safetensors") for case in ("topk", "topk_rescaled"))
    assert ((topk["codes"] != 0) != (rescaled["codes"] != 0)).any()
    assert (recipes.weights()["threshold"] < 0).any()
    assert (load_file(GOLDEN / "read/jumprelu/outputs.safetensors")["codes"] != plain["codes"]).any()


@pytest.mark.parametrize("case", recipes.EXPORTS)
def test_what_we_write_computes_the_same_in_sae_lens(case, tmp_path):
    """The files that sae-lens loaded are those that are written now, and what it computed from them is what ours computes from raw activations."""
    dictionary = recipes.ours(case)
    to_saelens(dictionary, tmp_path)
    path = GOLDEN / "written" / f"{case}.safetensors"
    expected = load_file(path)
    with safe_open(path, "pt") as file:
        assert json.loads((tmp_path / "cfg.json").read_text()) == json.loads(file.metadata()["cfg"])
    for name, tensor in load_file(tmp_path / "sae_weights.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    factor = dictionary.decoder_norm().detach() if case == "topk_including_norm" else 1.0
    batch = {HOOK: expected["x"], HOOK_OUT: torch.zeros_like(expected["x"])}
    if dictionary.cfg.norm_activation == "dataset-wise":
        dictionary.fold_activation_scale()
    with torch.no_grad():
        torch.testing.assert_close(dictionary.features(batch) * factor, expected["codes"], **TOLERANCE)
        torch.testing.assert_close(dictionary.reconstruct(batch), expected["reconstruction"], **TOLERANCE)
    assert (expected["codes"] != 0).sum(1).max() <= (K if dictionary.cfg.act_fn == "topk" else F)
    check_outputs(from_saelens(tmp_path), expected)  # and back again


def test_exporting_leaves_the_dictionary_alone(tmp_path):
    dictionary = recipes.ours("jumprelu_including_norm")
    before = {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}
    dictionary.to_saelens(tmp_path)
    assert dictionary.cfg.norm_activation == "dataset-wise"
    assert all(torch.equal(tensor, before[name]) for name, tensor in dictionary.state_dict().items())


def test_a_latent_with_a_zero_decoder_row_stays_silent(tmp_path):
    dictionary = recipes.ours("batchtopk")
    with torch.no_grad():
        dictionary.W_D[3] = 0
        dictionary.activation_function.threshold.zero_()
    to_saelens(dictionary, tmp_path)
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"][3] == torch.inf
    back = from_saelens(tmp_path)
    x = {HOOK: recipes.inputs()}
    dictionary.fold_activation_scale()
    with torch.no_grad():
        torch.testing.assert_close(back.features(x), dictionary.features(x), **TOLERANCE)


def test_objects_are_taken_too():
    """Upstream's `from_saelens` takes an object of sae-lens; what is asked of it is `cfg.to_dict()` and `state_dict()`."""
    folder = GOLDEN / "read" / "topk_rescaled"
    cfg, tensors = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    sae = SimpleNamespace(cfg=SimpleNamespace(to_dict=lambda: cfg), state_dict=lambda: tensors)
    check_outputs(SparseAutoEncoder.from_saelens(sae), load_file(folder / "outputs.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_glu_encoder": True}, "gated linear unit"),
        ({"act_fn": "topk", "hook_point_out": HOOK_OUT}, "transcoder with TopK"),
        ({"norm_activation": "token-wise", "hook_point_out": HOOK_OUT}, "token-wise"),
    ],
)
def test_what_sae_lens_does_not_have_is_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.EXPORTS, "refused", options)
    with pytest.raises(ConfigError, match=message):
        to_saelens(recipes.ours("refused"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' is not read"),
        ({"architecture": "skip_transcoder"}, "W_skip is missing"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm' has no counterpart"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening' has no counterpart"),
        ({"normalize_activations": "expected_average_only_in"}, "scaling_factor="),
        ({"hook_head_index": 3}, "head 3 alone"),
        ({"architecture": "jumprelu"}, "threshold is missing"),
        ({"architecture": "gated"}, "b_gate is missing"),
        ({"activation_fn": "tanh-relu"}, "'tanh-relu' is not read"),
        ({"metadata": {}}, "pass hook_point_in"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(changes, message, tmp_path):
    source = GOLDEN / "read" / "standard"
    (tmp_path / "cfg.json").write_text(json.dumps({**json.loads((source / "cfg.json").read_text()), **changes}))
    (tmp_path / "sae_weights.safetensors").write_bytes((source / "sae_weights.safetensors").read_bytes())
    error = ConfigError if "hook_point_in" in message else WeightsError
    with pytest.raises(error, match=message) as caught:
        SparseAutoEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    if "hook_point_in" in message:
        assert SparseAutoEncoder.from_pretrained(tmp_path, hook_point_in="a").cfg.hook_point_out == "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_enc": torch.zeros(F - 1)}, r"b_enc has shape \[23\], wanted \[24\]"),
        ({"W_dec": torch.zeros(F, D + 2), "b_dec": torch.zeros(D + 2)}, "reads width 8 and writes width 10"),
        ({"surprise": torch.zeros(1)}, "surprise is unexpected"),
        ({"b_enc": torch.zeros(F, dtype=torch.int64)}, "b_enc is int64"),
        ({"scaling_factor": torch.full((F,), 2.0)}, "fine-tuned"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    source = GOLDEN / "read" / "standard"
    (tmp_path / "cfg.json").write_bytes((source / "cfg.json").read_bytes())
    save_file({**load_file(source / "sae_weights.safetensors"), **change}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(WeightsError, match=message):
        from_saelens(tmp_path)


def test_damaged_files_are_said_in_one_line(tmp_path):
    (tmp_path / "sae_weights.safetensors").write_bytes(b"nothing")
    for text, message in (("{", "cannot be read as JSON"), ("[]", "must hold a JSON object"), ("{}", "damaged or not safetensors")):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(WeightsError, match=message) as caught:
            SparseAutoEncoder.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)


def test_factors_of_one_that_old_versions_wrote_are_dropped(tmp_path):
    source = GOLDEN / "read" / "topk_before_version_6"
    (tmp_path / "cfg.json").write_bytes((source / "cfg.json").read_bytes())
    save_file({**load_file(source / "sae_weights.safetensors"), "scaling_factor": torch.ones(F)}, tmp_path / "sae_weights.safetensors")
    check_outputs(from_saelens(tmp_path), load_file(source / "outputs.safetensors"))
