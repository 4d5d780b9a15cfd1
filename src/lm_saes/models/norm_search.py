"""The scale at which a freshly drawn dictionary reconstructs best.

With decoder rows of unit norm let g = x̂ - b_D be what the dictionary adds to its bias, and let every decoder row get norm r. A tied encoder
scales along, so pre-activations and decoder both grow with r and x̂ = r² g + b_D; an untied encoder stays, and x̂ = r g + b_D. Which latents fire does
not change, as long as selection does not depend on an absolute threshold. So the least squared error is at the scale

    s* = Σ⟨y - b_D, g⟩ / Σ‖g‖²,    r = √s* (tied) or s* (untied),

exactly, in one pass. Where a fixed threshold on the gate value decides what fires (JumpReLU), g depends on r and the scale is searched.

Letters: N tokens, D width; x input, y label, both in the dictionary's own space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lm_saes.models.sae import SparseAutoEncoder
from lm_saes.models.statistics import in_float64

ALIGNED_ABOVE = 0.1
"""Below this cosine between y - b_D and g, over all tokens, least squares would shrink the dictionary to nearly nothing (a transcoder with random
weights); then g gets the size of y - b_D instead."""

SEARCH_TOKENS = 1024
"""Tokens on which a scale is searched that has no closed form."""

_ELEMENTS_AT_ONCE = 2**26
_GRID, _GOLDEN_STEPS, _MOST_DOUBLINGS = 32, 10, 40


class NormChoice(NamedTuple):
    """The norm of the decoder rows, and how it was found."""

    norm: float
    how: str


@dataclass(frozen=True)
class Overlap:
    """Sums over tokens of ‖y - b_D‖², ⟨y - b_D, g⟩ and ‖g‖²."""

    yy: float
    yg: float
    gg: float

    def error(self, scale: float) -> float:
        """Σ‖y - b_D - scale g‖²."""
        return self.yy - 2 * scale * self.yg + scale**2 * self.gg

    @property
    def cosine(self) -> float:
        return self.yg / math.sqrt(self.yy * self.gg) if self.yy > 0 and self.gg > 0 else 0.0

    @property
    def matching_scale(self) -> float:
        """The scale at which g is as large as y - b_D."""
        return math.sqrt(self.yy / self.gg)

    def best_scale(self) -> tuple[float, str]:
        """The scale of least error, or the matching one where that would be nearly zero or negative; g must not be zero."""
        if self.cosine < ALIGNED_ABOVE:
            return self.matching_scale, "norm matching"
        return self.yg / self.gg, "closed form"


def rows_at_once(sae: SparseAutoEncoder) -> int:
    """Tokens whose dense codes fit into a quarter of a gigabyte."""
    return max(1, min(4096, _ELEMENTS_AT_ONCE // sae.cfg.d_sae))


@torch.no_grad()
def overlap(sae: SparseAutoEncoder, x: Float[Tensor, "N D"], y: Float[Tensor, "N D"]) -> Overlap:
    """The sums for the dictionary as it stands."""
    sums = torch.zeros(3, dtype=torch.float64)
    size = rows_at_once(sae)
    for x_rows, y_rows in zip(x.split(size), y.split(size), strict=True):
        target, added = in_float64(y_rows), in_float64(sae.run(x_rows).reconstruction)
        if sae.b_D is not None:
            bias = in_float64(sae.b_D)
            target, added = target - bias, added - bias
        sums += torch.stack([target.square().sum(), (target * added).sum(), added.square().sum()]).cpu()
    return Overlap(*sums.tolist())


@torch.no_grad()
def find_norm(sae: SparseAutoEncoder, x: Float[Tensor, "N D"], y: Float[Tensor, "N D"], tied: bool) -> NormChoice:
    """The best norm of the decoder rows of `sae`, which has them at norm 1 (and a tied encoder accordingly)."""
    norm_of_scale = math.sqrt if tied else float
    gate_power = tied + sae.cfg.sparsity_include_decoder_norm  # gate values grow with this power of the norm
    if sae.activation_function.learned_threshold() is None or gate_power == 0:
        sums = overlap(sae, x, y)
        if sums.gg == 0 or sums.yy == 0:
            return NormChoice(1.0, "nothing to fit")
        scale, how = sums.best_scale()
        return NormChoice(norm_of_scale(scale), how)
    return _search(sae, x[:: -(-len(x) // SEARCH_TOKENS)], y[:: -(-len(y) // SEARCH_TOKENS)], 2 if tied else 1, gate_power)


def _search(sae: SparseAutoEncoder, x: Tensor, y: Tensor, scale_power: int, gate_power: int) -> NormChoice:
    """One-dimensional search over the logarithm of the norm.

    The bracket reaches from where nothing fires any more up to where the reconstruction is so long that its error is four times that of no
    reconstruction; beyond either end the error only stays or grows. The error jumps where a latent begins to fire, so the minimum of a grid is refined by
    golden section and the best of all points tried is taken.
    """
    gate = sae.activation_function
    start = {name: tensor.clone() for name, tensor in gate.state_dict().items()}
    tried: dict[float, tuple[float, Overlap]] = {}

    def error(log_norm: float) -> float:
        if log_norm not in tried:
            # Gate values that are norm ** gate_power times larger pass a threshold as the present ones pass one that much smaller.
            gate.rescale_gate_(math.exp(-gate_power * log_norm))
            sums = overlap(sae, x, y)
            gate.load_state_dict(start)
            tried[log_norm] = sums.error(math.exp(scale_power * log_norm)), sums
        return tried[log_norm][0]

    low = high = 0.0
    for _ in range(_MOST_DOUBLINGS):
        error(low)
        if tried[low][1].gg == 0:
            break
        low -= math.log(2)
    for _ in range(_MOST_DOUBLINGS):
        if error(high) > 4 * tried[high][1].yy:
            break
        high += math.log(2)
    step = (high - low) / (_GRID - 1)
    best = min((low + step * index for index in range(_GRID)), key=error)
    _golden_section(error, best - step, best + step)
    best = min(tried, key=error)
    if tried[best][1].cosine >= ALIGNED_ABOVE:
        return NormChoice(math.exp(best), "search")

    def mismatch(log_norm: float) -> float:
        error(log_norm)
        sums = tried[log_norm][1]
        return abs(scale_power * log_norm - math.log(sums.matching_scale)) if sums.gg > 0 and sums.yy > 0 else math.inf

    best = min(list(tried), key=mismatch)
    if mismatch(best) == math.inf:
        return NormChoice(1.0, "nothing to fit")
    _golden_section(mismatch, best - step, best + step)
    return NormChoice(math.exp(min(list(tried), key=mismatch)), "norm matching")


def _golden_section(function: Callable[[float], float], low: float, high: float) -> None:
    """Evaluate `function` at points that close in on a minimum between `low` and `high`."""
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(_GOLDEN_STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if function(left) <= function(right):
            high = right
        else:
            low = left
