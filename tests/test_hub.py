"""The hub, with its client replaced by a local folder: nothing here goes online."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import errors

from lm_saes import LanguageModelConfig, PretrainedSAE, SAEConfig, SparseAutoEncoder, SparseDictionary
from lm_saes.errors import WeightsError
from lm_saes.hub import split_name


@pytest.fixture
def sae() -> SparseAutoEncoder:
    return SparseAutoEncoder.from_config(SAEConfig(hook_point_in="h", d_model=4, expansion_factor=2, norm_activation="inference"))


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> Path:
    """A hub with the one repository `lab/saes`."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            (root / repo_id).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, repo_id, folder_path, path_in_repo):
            import shutil

            shutil.copytree(folder_path, root / repo_id / path_in_repo, dirs_exist_ok=True)

    def download(repo_id, allow_patterns, token=None):
        assert all(pattern.endswith((".json", ".safetensors", "/ae.pt", "/params.npz")) and "*" not in pattern for pattern in allow_patterns)
        if not (root / repo_id).is_dir():
            raise errors.RepositoryNotFoundError("404", response=httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co")))
        return str(root / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return root


def test_uploaded_and_loaded_again_by_either_name(sae, hub_folder):
    sae.upload_to_hf("lab/saes", "layer-3", LanguageModelConfig(model_name="demo"))
    assert (hub_folder / "lab/saes/layer-3/lm_config.json").is_file()
    for loaded in (SparseDictionary.from_pretrained("lab/saes:layer-3"), SparseAutoEncoder.from_hf("lab/saes", "layer-3")):
        assert torch.equal(loaded.W_D, sae.W_D)  # pyright: ignore[reportAttributeAccessIssue]
    assert PretrainedSAE(pretrained_name_or_path="lab/saes:layer-3").pretrained_name_or_path == "lab/saes:layer-3"


def test_an_unknown_repository_names_the_page(hub_folder):
    with pytest.raises(WeightsError, match=r"huggingface\.co/lab/none"):
        SparseDictionary.from_pretrained("lab/none:x")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lab/saes", ("lab/saes", "")),
        ("lab/saes:a/b", ("lab/saes", "a/b")),
        ("./lab/saes", None),
        ("/lab/saes", None),
        ("lab/saes:../x", None),
        ("lab", None),
        ("a/b/c", None),
    ],
)
def test_names_and_paths_are_told_apart(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_name(name) == expected


def test_a_missing_folder_beside_others_is_a_missing_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(WeightsError, match=r"no config\.json in runs/demo"):
        SparseDictionary.from_pretrained("runs/demo")
