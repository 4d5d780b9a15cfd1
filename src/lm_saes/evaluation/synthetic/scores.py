"""The scores of a dictionary on a synthetic model: against the truth, and as a reconstruction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_saes.errors import DataError
from lm_saes.evaluation import firing, reconstruction
from lm_saes.evaluation.synthetic.generator import SYNTHETIC_HOOK
from lm_saes.evaluation.synthetic.metrics import DetectionCounts, absolute_cosines, mean_matched_cosine, own_features, uniqueness
from lm_saes.models.sae import SparseAutoEncoder

Scores = dict[str, float | None]
"""Scores by name; `None` where one is undefined."""


@torch.no_grad()
def score(sae: SparseAutoEncoder, batches: Iterable[dict[str, Any]], directions: Float[Tensor, "M D"]) -> Scores:
    """How well a dictionary finds the features that activations are made of.

    Args:
        sae: is put into eval mode.
        batches: of a `SyntheticStream` (at least the activations and "features"); all of them are used.
        directions: of the true features.

    Returns:
        "f1", "precision", "recall", "mcc", "uniqueness" (`metrics`); "explained_variance", "shrinkage" (`evaluation.reconstruction`), "l0",
        "dead_fraction" (`evaluation.firing`), all over these batches; "true_l0", the mean number of features that fire.

    Raises:
        DataError: there is no batch.
    """
    sae.eval()
    cosines = absolute_cosines(sae.W_D, directions)
    detections, firings, truth = DetectionCounts(own_features(cosines)), firing.FiringCounts(), firing.FiringCounts()
    sums = reconstruction.ReconstructionSums()
    for batch in batches:
        codes, reconstructed = sae.features_and_reconstruction({SYNTHETIC_HOOK: batch[SYNTHETIC_HOOK].to(sae.device)})
        detections.update(codes, batch["features"])
        firings.update(codes)
        truth.update(batch["features"])
        sums.update(batch[SYNTHETIC_HOOK], reconstructed.to(batch[SYNTHETIC_HOOK].device))
    if sums.n_tokens == 0:
        raise DataError("nothing to score: the stream holds no batch; give it at least one (n_batches)")
    detection = detections.result()
    return {
        "f1": detection.f1,
        "precision": detection.precision,
        "recall": detection.recall,
        "mcc": mean_matched_cosine(cosines),
        "uniqueness": uniqueness(cosines),
        "explained_variance": reconstruction.explained_variance(sums),
        "shrinkage": reconstruction.shrinkage(sums),
        "l0": firing.l0(firings),
        "dead_fraction": firing.dead_fraction(firings),
        "true_l0": firing.l0(truth),
    }
