"""Folders that other libraries wrote (scripts/make_interop_golden.py) give the codes and reconstructions that those libraries compute."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_saes.errors import ConfigError, LmSaesError, WeightsError
from lm_saes.interop.equations import expansion_factor
from lm_saes.models import SparseAutoEncoder

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = sorted(path.parent for name in ("sparsify", "dictionary_learning", "gemma_scope") for path in (GOLDEN / name).rglob("outputs.safetensors"))
RESIDUAL = "blocks.3.hook_resid_post"
GEMMA = GOLDEN / "gemma_scope/google--gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_5"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(GOLDEN).as_posix())
def test_computes_the_same_here(folder):
    transcoder = folder.name.endswith("transcoder")  # its folder does not say at which hook points
    hooks = {"hook_point_in": RESIDUAL, "hook_point_out": "blocks.3.hook_mlp_out"} if transcoder else {}
    expected = load_file(folder / "outputs.safetensors")
    dictionary = SparseAutoEncoder.from_pretrained(folder, **hooks)
    assert dictionary.cfg.hook_point_in == RESIDUAL
    assert dictionary.cfg.hook_point_out == ("blocks.3.hook_mlp_out" if transcoder else RESIDUAL)
    assert not dictionary.training
    assert (expected["codes"] != 0).any(1).all()
    batch = {RESIDUAL: expected["x"], "blocks.3.hook_mlp_out": torch.zeros_like(expected["x"])}
    with torch.no_grad():
        torch.testing.assert_close(dictionary.features(batch), expected["codes"], rtol=0, atol=1e-5)
        torch.testing.assert_close(dictionary.reconstruct(batch), expected["reconstruction"], rtol=0, atol=1e-5)


def test_every_format_is_covered():
    assert len(FOLDERS) == 3 + 8 + 1


def test_what_was_read_is_saved_as_ours(tmp_path):
    dictionary = SparseAutoEncoder.from_pretrained(GOLDEN / "dictionary_learning" / "BatchTopKSAE")
    dictionary.save_pretrained(tmp_path)
    again = SparseAutoEncoder.from_pretrained(tmp_path)
    assert again.provenance == dictionary.provenance
    assert again.provenance["format"] == "dictionary_learning"
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in dictionary.state_dict().items())


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def refused(folder: Path, message: str, error: type[LmSaesError] = WeightsError) -> None:
    with pytest.raises(error, match=message) as caught:
        SparseAutoEncoder.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "'groupmax' is not read"),
        ({"skip_connection": True}, "autoencoder with a skip connection"),
        ({"k": None}, "whole number for k"),
    ],
)
def test_sparsify_refusals(changes, message, tmp_path):
    folder = copy(GOLDEN / "sparsify" / "layers.3", tmp_path / "layers.3")
    (folder / "cfg.json").write_text(json.dumps({**json.loads((folder / "cfg.json").read_text()), **changes}))
    refused(folder, message)


def test_sparsify_hook_points_are_asked_for_where_the_name_does_not_tell(tmp_path):
    refused(GOLDEN / "sparsify" / "transcoder", "pass hook_point_in", ConfigError)
    refused(copy(GOLDEN / "sparsify" / "layers.3", tmp_path / "layers.3.mlp"), "pass hook_point_in", ConfigError)


def test_dictionary_learning_refusals(tmp_path):
    source = GOLDEN / "dictionary_learning" / "BatchTopKSAE"
    tensors = torch.load(source / "ae.pt", weights_only=True)
    backup = copy(source, tmp_path / "backup")
    torch.save({"step": 10, "ae": tensors, "norm_factor": 3.0}, backup / "ae.pt")
    refused(backup, "backup made during training")
    other = copy(source, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"trainer": {"dict_class": "IdentityDict"}}))
    refused(other, "'IdentityDict'")
    less = copy(source, tmp_path / "less")
    torch.save({name: tensor for name, tensor in tensors.items() if name != "b_dec"}, less / "ae.pt")
    refused(less, "b_dec is missing")
    listed = copy(source, tmp_path / "listed")
    torch.save([1, 2], listed / "ae.pt")
    refused(listed, "must hold tensors by name")


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_pickles_do_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ae = copy(GOLDEN / "dictionary_learning" / "AutoEncoder", tmp_path / "ae")
    torch.save({"bias": Malicious()}, ae / "ae.pt")
    refused(ae, "holds more than tensors")
    (ae / "ae.pt").write_bytes(pickle.dumps(Malicious()))
    refused(ae, "holds more than tensors")
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "params.npz", W_enc=np.array([Malicious()], dtype=object))
    refused(tmp_path / "npz", "holds more than arrays of numbers")
    (tmp_path / "npz" / "params.npz").write_bytes(b"PK nothing")
    refused(tmp_path / "npz", "damaged")
    assert not (tmp_path / "ran").exists()


def test_gemma_scope_names_hook_points_by_its_place(tmp_path):
    for release, hook_in, hook_out in (
        ("gemma-scope-9b-it-res", "blocks.20.hook_resid_post", "blocks.20.hook_resid_post"),
        ("gemma-scope-2b-pt-mlp", "blocks.20.hook_mlp_out", "blocks.20.hook_mlp_out"),
        ("gemma-scope-2b-pt-att", "blocks.20.attn.hook_z", "blocks.20.attn.hook_z"),
        ("gemma-scope-2b-pt-transcoders", "blocks.20.ln2.hook_normalized", "blocks.20.hook_mlp_out"),
    ):
        cfg = SparseAutoEncoder.from_pretrained(copy(GEMMA, tmp_path / release / "layer_20" / "width_16k")).cfg
        assert (cfg.hook_point_in, cfg.hook_point_out) == (hook_in, hook_out)
    refused(copy(GEMMA, tmp_path / "elsewhere" / "layer_20"), "pass hook_point_in", ConfigError)
    refused(copy(GEMMA, tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k"), "embeddings")


def test_lower_case_names_of_some_releases_are_read(tmp_path):
    arrays = dict(np.load(GEMMA / "params.npz"))
    np.savez(tmp_path / "params.npz", **{name.lower(): array for name, array in arrays.items()})
    dictionary = SparseAutoEncoder.from_pretrained(tmp_path, hook_point_in=RESIDUAL)
    torch.testing.assert_close(dictionary.W_E.detach(), torch.from_numpy(arrays["W_enc"]))


def test_half_precision_is_read_wide_and_a_type_can_be_asked_for(tmp_path):
    folder = copy(GOLDEN / "sparsify" / "layers.3", tmp_path / "layers.3")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "sae.safetensors").items()}
    save_file(tensors, folder / "sae.safetensors")
    dictionary = SparseAutoEncoder.from_pretrained(folder)
    assert dictionary.dtype == torch.float32
    expected = tensors["encoder.bias"].double() - tensors["b_dec"].double() @ tensors["encoder.weight"].double().T
    torch.testing.assert_close(dictionary.b_E.detach().double(), expected, rtol=1e-6, atol=1e-6)
    assert SparseAutoEncoder.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("d_model", [5, 7, 49, 96, 768, 2304])
def test_widths_survive_the_expansion_factor(d_model):
    for d_sae in (1, 24, 49, 103, 4097, 16384, 65537, 1_000_003):
        assert int(d_model * expansion_factor(d_model, d_sae)) == d_sae


def test_a_folder_of_nothing_says_what_was_wanted(tmp_path):
    refused(tmp_path, "a saved dictionary is a folder with")
