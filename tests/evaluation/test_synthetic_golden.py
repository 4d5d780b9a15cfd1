"""Equal to sae-lens' module for the same benchmark. The file of golden figures is made by scripts/make_synthetic_golden.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lm_saes.config import SAEConfig
from lm_saes.config.synthetic import SyntheticModelConfig
from lm_saes.evaluation.synthetic.generator import SYNTHETIC_HOOK, SyntheticModel, spread_out, zipf_probabilities
from lm_saes.models.sae import SparseAutoEncoder
from lm_saes.ops import SparseCodes

MODEL: dict[str, Any] = {"n_features": 64, "d_model": 24, "n_roots": 4, "branching_factor": 3, "depth": 2, "correlation_rank": 5,
    "correlation_scale": 0.3, "min_firing_probability": 0.02, "orthogonalization_steps": 0, "seed": 7}  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(Path(__file__).with_name("synthetic_golden.safetensors"), "pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items()}
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  not a dict


def law(golden) -> dict[str, Tensor]:
    return {name.removeprefix("law."): value for name, value in golden[0].items() if name.startswith("law.")}


def test_the_parts_of_a_model_are_the_same(golden):
    expected, model = law(golden), SyntheticModel(SyntheticModelConfig(**MODEL))
    torch.testing.assert_close(zipf_probabilities(model.cfg), expected["zipf"], rtol=1e-5, atol=0)
    torch.testing.assert_close(model.firing_probabilities, expected["probabilities"], rtol=1e-5, atol=0)
    torch.testing.assert_close(spread_out(expected["start"], 50, 0.01), expected["spread_out"], rtol=0, atol=1e-4)


def test_samples_follow_the_same_law(golden):
    """Firing rates, those of children together with their parents, mean magnitudes, and the spread of L0, each within five standard errors
    of the difference of two samples."""
    expected, drawn, n = law(golden), golden[1]["figures"]["drawn"], 200_000
    model = SyntheticModel(SyntheticModelConfig(**MODEL))
    amounts = model.sample_features(n, torch.Generator().manual_seed(0)).to_dense()
    fires = (amounts > 0).float()
    found = {"firing_counts": fires.sum(0), "with_parent": (fires * fires[:, model.parents.clamp(min=0)]).sum(0)}
    for name, counts in found.items():
        theirs, ours = expected[name].double() / drawn, counts.double() / n
        error = (theirs * (1 - theirs) * (1 / n + 1 / drawn)).sqrt()
        assert ((ours - theirs).abs() < 5 * error + 1e-6).all(), name
    error = amounts.double().std(0) * (1 / n + 1 / drawn) ** 0.5
    assert ((amounts.double().mean(0) - expected["mean_amounts"]).abs() < 5 * error + 1e-6).all()
    l0 = fires.sum(1).square().double()
    assert float(l0.mean()) == pytest.approx(float(expected["mean_squared_l0"]), abs=5 * float(l0.std()) / n**0.5)


def test_metrics_are_the_same(golden):
    from lm_saes.evaluation.synthetic.scores import score

    tensors, metadata = golden
    features = SparseCodes.from_dense(tensors["features"])
    batch = {SYNTHETIC_HOOK: features.to_dense() @ tensors["directions"] + tensors["bias"], "features": features}
    cfg = SAEConfig(
        hook_point_in=SYNTHETIC_HOOK,
        d_model=10,
        expansion_factor=1.2,
        act_fn="relu",
        norm_activation="inference",
        sparsity_include_decoder_norm=False,
    )
    sae = SparseAutoEncoder(cfg)
    sae.load_state_dict({name: tensors[name] for name in ("W_E", "W_D", "b_E", "b_D")})
    ours, theirs = score(sae, [batch], tensors["directions"]), metadata["metrics"]
    names = {"mcc": "mcc", "uniqueness": "uniqueness", "explained_variance": "explained_variance", "shrinkage": "shrinkage", "l0": "sae_l0",
             "true_l0": "true_l0", "f1": "classification/f1_score", "precision": "classification/precision", "recall": "classification/recall"}  # fmt: skip
    for own, other in names.items():
        assert ours[own] == pytest.approx(theirs[other], abs=1e-5), own
    assert ours["dead_fraction"] == theirs["dead_latents"] / 12
