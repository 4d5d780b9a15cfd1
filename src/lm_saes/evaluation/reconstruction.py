"""How well a dictionary reconstructs: one function per metric, over sums that are gathered batch by batch in float64.

Everything is measured in the space of the raw activations. Letters: N tokens, D width; x an activation, x̂ its reconstruction.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lm_saes.models.statistics import RunningMean, in_float64

EXPLAINED_VARIANCE_DEFINITION = (
    "explained variance = 1 - Σ‖x - x̂‖² / Σ‖x - mean(x)‖²: sums over all tokens and dimensions, mean over tokens, in float64"
)
"""What is meant by explained variance; printed beside the number, because the literature has several meanings."""


class ReconstructionSums:
    """What the metrics below need of all pairs (x, x̂) seen so far."""

    def __init__(self) -> None:
        self.labels = RunningMean()
        self.squared_error = 0.0
        self.squared_label = 0.0
        self.squared_reconstruction = 0.0
        self.inner_product = 0.0
        self.cosine = 0.0
        self.norm_ratio = 0.0
        self.n_nonzero = 0

    @property
    def n_tokens(self) -> int:
        """Tokens seen."""
        return self.labels.count

    def update(self, label: Float[Tensor, "N D"], reconstruction: Float[Tensor, "N D"]) -> None:
        """Take in one batch."""
        self.labels.update(label)
        x, y = in_float64(label), in_float64(reconstruction)
        x_norm, y_norm, inner = x.norm(dim=1), y.norm(dim=1), (x * y).sum(1)
        nonzero = x_norm > 0
        # A reconstruction of zero has no direction; its cosine counts as 0.
        cosine = inner / (x_norm * y_norm).clamp_min(torch.finfo(torch.float64).tiny)
        sums = torch.stack([
            (x - y).square().sum(), x_norm.square().sum(), y_norm.square().sum(), inner.sum(), cosine[nonzero].sum(),
            (y_norm[nonzero] / x_norm[nonzero]).sum(), nonzero.sum(),
        ]).tolist()  # fmt: skip
        self.squared_error += sums[0]
        self.squared_label += sums[1]
        self.squared_reconstruction += sums[2]
        self.inner_product += sums[3]
        self.cosine += sums[4]
        self.norm_ratio += sums[5]
        self.n_nonzero += int(sums[6])


def explained_variance(sums: ReconstructionSums) -> float | None:
    """See `EXPLAINED_VARIANCE_DEFINITION`. 1 is perfect, 0 is as good as the mean; `None` if the activations do not vary."""
    total = sums.labels.total_variation
    return 1 - sums.squared_error / total if total > 0 else None


def normalized_mse(sums: ReconstructionSums) -> float | None:
    """Σ‖x - x̂‖² / Σ‖x‖². The mean of x counts as signal, so it flatters activations with a large mean. `None` if all x are zero."""
    return sums.squared_error / sums.squared_label if sums.squared_label > 0 else None


def cosine_similarity(sums: ReconstructionSums) -> float | None:
    """Mean cosine of x and x̂ over tokens with x ≠ 0; x̂ = 0 counts as 0."""
    return sums.cosine / sums.n_nonzero if sums.n_nonzero else None


def shrinkage(sums: ReconstructionSums) -> float | None:
    """Mean of ‖x̂‖ / ‖x‖ over tokens with x ≠ 0; below 1 the reconstructions are too short."""
    return sums.norm_ratio / sums.n_nonzero if sums.n_nonzero else None


def relative_reconstruction_bias(sums: ReconstructionSums) -> float | None:
    """γ = Σ‖x̂‖² / Σ⟨x, x̂⟩, the γ for which x̂ / γ fits x best (Rajamanoharan et al., arXiv 2404.16014); below 1 means shrinkage.

    `None` where Σ⟨x, x̂⟩ is not positive: no scale of x̂ helps then.
    """
    return sums.squared_reconstruction / sums.inner_product if sums.inner_product > 0 else None
