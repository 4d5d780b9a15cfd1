"""Explained variance is scikit-learn's `r2_score(label, reconstruction, multioutput="variance_weighted")` (tests/golden/r2_score.json)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lm_saes.evaluation.reconstruction import ReconstructionSums, explained_variance
from lm_saes.training.metrics import reconstruction_metrics
from tests.evaluation.recipes import PAIRS, pair

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "r2_score.json").read_text())["r2_score"]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_explained_variance_is_the_variance_weighted_r2(name, batch_size):
    label, reconstruction = (torch.from_numpy(array) for array in pair(name))
    sums = ReconstructionSums()
    for x, y in zip(label.split(batch_size), reconstruction.split(batch_size), strict=True):
        sums.update(x, y)
    assert explained_variance(sums) == pytest.approx(GOLDEN[name], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_that_of_a_training_batch_too(name):
    label, reconstruction = (torch.from_numpy(array) for array in pair(name))
    metrics = reconstruction_metrics(reconstruction, label, torch.ones(len(label), dtype=torch.bool))
    assert metrics["metrics/explained_variance"].item() == pytest.approx(GOLDEN[name], rel=1e-6, abs=1e-6)
