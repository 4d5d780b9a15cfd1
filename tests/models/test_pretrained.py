"""Files that are missing, damaged or do not match are told apart, in one line."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_saes.config import PretrainedSAE, SAEConfig
from lm_saes.errors import ConfigError, LmSaesError, WeightsError
from lm_saes.models import SparseAutoEncoder, SparseDictionary, pretrained
from tests.models.variants import batch, build


@pytest.fixture
def folder(tmp_path):
    build({"act_fn": "jumprelu", "norm_activation": "inference"}).save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


def rewrite(folder, change):
    tensors = load_file(folder / "sae_weights.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae_weights.safetensors")


def refused(folder, message, **options):
    with pytest.raises(LmSaesError, match=message) as caught:
        SparseDictionary.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_names_on_disk(folder):
    assert {name: list(tensor.shape) for name, tensor in load_file(folder / "sae_weights.safetensors").items()} == {
        "W_E": [5, 12], "b_E": [12], "W_D": [12, 5], "b_D": [5], "activation_function.log_jumprelu_threshold": [12],
    }  # fmt: skip
    table = json.loads((folder / "config.json").read_text())
    assert table["schema_version"] == 1
    assert table["provenance"] == {}


def test_missing_files(tmp_path, folder):
    assert isinstance(refused(tmp_path / "nowhere", "no config.json in"), WeightsError)
    (folder / "sae_weights.safetensors").unlink()
    assert isinstance(refused(folder, "no sae_weights.safetensors in"), WeightsError)


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "header", "folder"])
def test_damaged_weights(folder, damage):
    path = folder / "sae_weights.safetensors"
    whole = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
        refused(folder, "no sae_weights.safetensors")
        return
    path.write_bytes({"empty": b"", "cut": whole[:-7], "garbage": os.urandom(200), "header": whole[:40] + b"\xff" + whole[41:]}[damage])
    assert isinstance(refused(folder, "sae_weights.safetensors is damaged or not safetensors"), WeightsError)


def test_damaged_config(folder):
    whole = (folder / "config.json").read_text()
    (folder / "config.json").write_text(whole[:50])
    assert isinstance(refused(folder, "cannot be read as JSON"), WeightsError)
    (folder / "config.json").write_text(whole.replace('"sae_type": "sae"', '"sae_type": "lorsa"'))
    assert isinstance(refused(folder, "sae_type must be one of sae, got 'lorsa'"), ConfigError)
    (folder / "config.json").write_text(whole.replace('"schema_version": 1', '"schema_version": 2'))
    refused(folder, "schema version 2")
    (folder / "config.json").write_text(whole.replace('"d_model": 5', '"d_model": 6'))
    refused(folder, r"W_E has shape \[5, 12\], wanted \[6, 14\]")


def test_tensors_that_do_not_match(folder):
    rewrite(folder, lambda tensors: (tensors.pop("b_E"), tensors.update(extra=torch.zeros(1))))
    refused(folder, "b_E is missing, extra is unexpected; check config.json, or pass strict_loading=False")
    loaded = SparseDictionary.from_pretrained(folder, strict_loading=False)
    assert torch.equal(loaded.b_E, torch.zeros(12, dtype=torch.float64))
    rewrite(folder, lambda tensors: tensors.update(b_D=torch.zeros(4)))
    refused(folder, r"b_D has shape \[4\], wanted \[5\]", strict_loading=False)
    rewrite(folder, lambda tensors: tensors.update(b_D=torch.zeros(5, dtype=torch.int32)))
    refused(folder, r"wanted float16, bfloat16, float32 or float64, got b_D \(int32\)")


def test_weights_of_another_normalisation_are_found_out(folder, tmp_path):
    build({"act_fn": "jumprelu", "norm_activation": "dataset-wise"}).save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / "config.json", folder / "config.json")
    refused(folder, "holds weights of norm_activation 'inference', its config.json says 'dataset-wise'")


def test_a_bit_that_has_flipped_is_found_and_files_without_a_checksum_are_read(folder):
    path = folder / "sae_weights.safetensors"
    content = path.read_bytes()
    for place in (-1, -100):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert isinstance(refused(folder, "is damaged: its tensors are not what was written; copy or download it anew"), WeightsError)
    path.write_bytes(content)
    tensors = load_file(path)
    for metadata in (None, {"norm_activation": "inference"}, {"lm_saes": "no JSON"}, {"lm_saes": "[]"}, {"lm_saes": '{"xxh3": []}'}):
        save_file(tensors, path, metadata=metadata)
        if metadata != {"lm_saes": '{"xxh3": []}'}:
            SparseDictionary.from_pretrained(folder)
    refused(folder, "not what was written")
    save_file(tensors, path, metadata={"norm_activation": "dataset-wise"})
    refused(folder, "holds weights of norm_activation 'dataset-wise'")


def test_the_same_weights_give_the_same_bytes(folder, tmp_path):
    SparseDictionary.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in ("sae_weights.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_tensors_decide_the_data_type(folder, tmp_path, dtype):
    dictionary = SparseDictionary.from_pretrained(folder).to(dtype)
    dictionary.save_pretrained(tmp_path / "narrow")
    saved = load_file(tmp_path / "narrow" / "sae_weights.safetensors")
    assert saved["W_E"].dtype == dtype
    assert saved["activation_function.log_jumprelu_threshold"].dtype == torch.float32
    loaded = SparseDictionary.from_pretrained(tmp_path / "narrow", dtype=None)
    assert loaded.dtype == loaded.cfg.dtype == dtype
    assert torch.equal(loaded.W_E, dictionary.W_E)
    wide = SparseDictionary.from_pretrained(tmp_path / "narrow", dtype="float64")
    assert wide.dtype == wide.cfg.dtype == torch.float64


def test_mixed_data_types_become_the_widest(folder):
    rewrite(
        folder,
        lambda tensors: tensors.update(
            W_E=tensors["W_E"].bfloat16(), b_E=tensors["b_E"].float(), W_D=tensors["W_D"].half(), b_D=tensors["b_D"].half()
        ),
    )
    loaded = SparseDictionary.from_pretrained(folder)
    assert {loaded.W_E.dtype, loaded.b_E.dtype, loaded.W_D.dtype} == {torch.float32}
    assert loaded(batch()["in"]).dtype == torch.float32


def test_overrides_and_the_ways_to_load(folder):
    loaded = SparseAutoEncoder.from_local(folder, jumprelu_threshold_window=0.125)
    assert loaded.cfg.jumprelu_threshold_window == loaded.activation_function.window == 0.125
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    refused(folder, "has no field 'topk'", topk=3)
    refused(folder, "device_mesh must be None", device_mesh=object())
    reference = PretrainedSAE(pretrained_name_or_path=folder)
    again = SparseDictionary.from_pretrained(
        reference.pretrained_name_or_path,
        fold_activation_scale=reference.fold_activation_scale,
        strict_loading=reference.strict_loading,
        device=reference.device,
        dtype=reference.dtype,
    )
    assert torch.equal(again.W_E, loaded.W_E)
    assert SAEConfig.from_pretrained(folder).d_sae == 12


def test_loading_draws_no_random_number(folder):
    state = torch.random.get_rng_state()
    SparseDictionary.from_pretrained(folder)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_failed_save_leaves_the_old_files(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        build({"act_fn": "relu"}).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(OSError, match="No space left"):
        build({"act_fn": "relu"}).save_checkpoint(folder / "x.safetensors")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_save_checkpoint_writes_weights_alone(tmp_path):
    dictionary = build({"act_fn": "topk"})
    dictionary.save_checkpoint(tmp_path / "deep" / "weights.safetensors")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["weights.safetensors"]
    assert torch.equal(load_file(tmp_path / "deep" / "weights.safetensors")["W_D"], dictionary.W_D)
    with pytest.raises(ConfigError, match=r"saved as .safetensors, got 'weights.pt'"):
        dictionary.save_checkpoint(tmp_path / "weights.pt")
