"""How well a dictionary finds known features: one function per metric, as SynthSAEBench defines them (arXiv 2602.14687).

Letters: N tokens, F latents, M true features, D width. A latent is compared with features by the absolute cosine of its decoder row
with their directions; its own feature is the one of largest absolute cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lm_saes.errors import ConfigError
from lm_saes.ops import Codes, SparseCodes, to_dense


def absolute_cosines(decoder: Float[Tensor, "F D"], directions: Float[Tensor, "M D"]) -> Float[Tensor, "F M"]:
    """|cos| of each decoder row with each direction, in float32. A zero row has cosine 0 with all."""
    rows, features = (torch.nn.functional.normalize(matrix.detach().float(), dim=1, eps=1e-8) for matrix in (decoder, directions))
    return (rows @ features.T.to(rows.device)).abs()


def mean_matched_cosine(cosines: Float[Tensor, "F M"]) -> float:
    """MCC: the mean absolute cosine under the one-to-one matching of latents and features that makes it largest (the Hungarian method;
    arXiv 2505.20254). min(F, M) pairs are matched.

    Raises:
        ConfigError: SciPy, which does the matching, is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError("matching latents with features needs SciPy; install it with: pip install 'lm-saes[bench]'") from None
    values = cosines.double().cpu().numpy()
    return float(values[linear_sum_assignment(values, maximize=True)].mean())


def own_features(cosines: Float[Tensor, "F M"]) -> Int64[Tensor, " F"]:
    """The feature of each latent; the first of equals."""
    return cosines.argmax(1)


def uniqueness(cosines: Float[Tensor, "F M"]) -> float:
    """The number of different features that latents have as their own, over the number of latents."""
    return len(own_features(cosines).unique()) / len(cosines)


@dataclass(frozen=True)
class Detection:
    """Means over latents (macro averages). What is undefined for a latent, for lack of a firing, counts as 0."""

    precision: float
    """Of a latent's firings, the share in which its feature is there."""
    recall: float
    """Of its feature's firings, the share in which the latent fires."""
    f1: float
    """The harmonic mean of the two, taken latent by latent."""


class DetectionCounts:
    """How often each latent fires together with its own feature, gathered batch by batch.

    Args:
        features: the feature of each latent.
    """

    def __init__(self, features: Int64[Tensor, " F"]) -> None:
        self._features = features
        self.both, self.latent, self.feature = (torch.zeros(len(features), dtype=torch.int64, device=features.device) for _ in range(3))
        """On how many tokens latent and feature fired, the latent, the feature."""

    def update(self, codes: Codes, truth: SparseCodes) -> None:
        """Take in the codes [N, F] and the true features [N, M] of the same tokens. A latent fires where its code is not zero, a feature
        where its magnitude is positive."""
        self.update_firings(to_dense(codes) != 0, truth)

    def update_firings(self, fires: Bool[Tensor, "N F"], truth: SparseCodes) -> None:
        """The same from where each latent fires."""
        there = truth.to_dense()[:, self._features.to(truth.values.device)].to(self.both.device) > 0
        fires = fires.to(self.both.device)
        self.both += (fires & there).sum(0)
        self.latent += fires.sum(0)
        self.feature += there.sum(0)

    def result(self) -> Detection:
        """The metrics of all tokens seen."""
        both, latent, feature = self.both.double(), self.latent.double(), self.feature.double()
        precision = torch.where(latent > 0, both / latent.clamp(min=1), 0.0)
        recall = torch.where(feature > 0, both / feature.clamp(min=1), 0.0)
        # 2 P R / (P + R) = 2 both / (latent + feature), wherever it is defined
        f1 = 2 * both / (latent + feature).clamp(min=1)
        return Detection(float(precision.mean()), float(recall.mean()), float(f1.mean()))
