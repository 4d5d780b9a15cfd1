"""The scalings that bring activations to norm sqrt(d_model): x is multiplied by s = sqrt(d_model) / (mean norm).

token-wise: each vector by its own norm. batch-wise: the batch's mean norm in training, its running mean in eval mode.
dataset-wise: one constant per hook point. inference: none, s = 1 (the scale is folded into the weights).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lm_saes.ops import at_least_float32

RUNNING_NORM_RATE = 0.01
"""Rate of the moving average of the batch's mean norm."""


def vector_norms(x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape"]:
    """The norm of each vector, in at least float32."""
    return torch.linalg.vector_norm(at_least_float32(x), dim=-1)


def mean_norm(x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None) -> Float[Tensor, ""]:
    """The mean norm of the vectors in the mask (of all without one); zero if there is none."""
    norms = vector_norms(x)
    if mask is None:
        return norms.sum() / max(norms.numel(), 1)
    return torch.where(mask, norms, 0.0).sum() / mask.sum().clamp(min=1)


def scale_for(norm: Tensor, d_model: int) -> Tensor:
    """s = sqrt(d_model) / norm, elementwise; 1 where the norm is zero, so that zero vectors stay zero."""
    return torch.where(norm > 0, math.sqrt(d_model) / torch.where(norm > 0, norm, 1.0), 1.0)


@torch.no_grad()
def update_running_norms_(running: Float[Tensor, " hooks"], measured: Float[Tensor, " hooks"]) -> None:
    """Move running means towards measured ones; the first measurement (running = 0) is taken whole, an empty one (0) not at all."""
    moved = torch.where(running == 0, measured, torch.lerp(running, measured.to(running.dtype), RUNNING_NORM_RATE))
    running.copy_(torch.where(measured > 0, moved, running))
