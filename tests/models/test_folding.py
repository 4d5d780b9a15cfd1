"""Folding the activation scale into the weights changes nothing that a user of raw activations sees."""

import pytest
import torch

from lm_saes.errors import FoldingError
from lm_saes.models import SparseDictionary
from tests.models.variants import FACTORS, NORMS, batch, build, combinations, name_of, pairwise

FOLDABLE = {**FACTORS, "norm_activation": ["dataset-wise", "batch-wise"]}
PAIRWISE = pairwise(FOLDABLE)
every_foldable = pytest.mark.parametrize(
    "variant",
    [
        *(pytest.param(combination, id=name_of(combination)) for combination in PAIRWISE),
        *(
            pytest.param(combination, id=name_of(combination), marks=pytest.mark.slow)
            for combination in combinations(FOLDABLE)
            if combination not in PAIRWISE
        ),
    ],
)


@every_foldable
def test_folding_is_an_identity(variant):
    dictionary, raw = build(variant).eval(), batch(n=200)
    before, codes = dictionary.reconstruct(raw), dictionary.features(raw)
    dictionary.fold_activation_scale()
    s_in = dictionary.cfg.d_model**0.5 / NORMS["in"]
    torch.testing.assert_close(dictionary.reconstruct(raw), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dictionary(raw["in"]), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dictionary.features(raw) * s_in, codes, rtol=1e-9, atol=1e-9)
    assert dictionary.cfg.norm_activation == "inference"
    assert dictionary.cfg.dataset_average_activation_norm is None
    assert "running_activation_norms" not in dictionary.state_dict()
    with pytest.raises(FoldingError, match="folded already"):
        dictionary.fold_activation_scale()


@every_foldable
def test_files_are_folded_when_saving_or_when_loading(variant, tmp_path):
    dictionary, raw = build(variant).eval(), batch()
    before = dictionary.reconstruct(raw)
    dictionary.save_pretrained(tmp_path / "plain")
    dictionary.save_pretrained(tmp_path / "folded", fold_activation_scale=True)
    assert dictionary.cfg.norm_activation == variant["norm_activation"], "the dictionary itself stays as it is"
    assert torch.equal(dictionary.reconstruct(raw), before)
    for folder in ("plain", "folded"):
        loaded = SparseDictionary.from_pretrained(tmp_path / folder)
        assert loaded.cfg.norm_activation == "inference"
        torch.testing.assert_close(loaded.reconstruct(raw), before, rtol=1e-9, atol=1e-9)


def test_token_wise_is_refused_by_name(tmp_path):
    dictionary = build({"act_fn": "relu", "norm_activation": "token-wise"})
    weights = {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}
    with pytest.raises(FoldingError, match=r"'token-wise' .* cannot be folded"):
        dictionary.fold_activation_scale()
    with pytest.raises(FoldingError, match="token-wise"):
        dictionary.save_pretrained(tmp_path, fold_activation_scale=True)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(weights[name], tensor) for name, tensor in dictionary.state_dict().items())
    dictionary.save_pretrained(tmp_path)
    with pytest.raises(FoldingError, match="pass fold_activation_scale=False"):
        SparseDictionary.from_pretrained(tmp_path)
    assert SparseDictionary.from_pretrained(tmp_path, fold_activation_scale=False).cfg.norm_activation == "token-wise"


@pytest.mark.parametrize(("mode", "missing"), [("dataset-wise", "set_dataset_average_activation_norm"), ("batch-wise", "train first")])
def test_folding_needs_a_measured_norm(mode, missing):
    dictionary = build({"act_fn": "relu", "norm_activation": mode})
    dictionary.cfg = dictionary.cfg.replace(dataset_average_activation_norm=None)
    if dictionary.running_activation_norms is not None:
        dictionary.running_activation_norms.zero_()
    with pytest.raises(FoldingError, match=f"no mean norm for hook point 'in'; .*{missing}"):
        dictionary.fold_activation_scale()
    assert dictionary.cfg.norm_activation == mode
