"""Activations in eight bits: x ≈ scale · q with a scale per vector, and a few dimensions kept apart.

Some language models have dimensions that are many times larger than the others at every token. They would set the scale of each vector and
round everything else away, so they are stored beside, in float32, and the scale is that of the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

LEVELS = 127
WORTH_KEEPING_APART = 0.9
"""Dimensions are kept apart as long as the fewer of them leave more than the least mean squared rounding error over this share."""
DIMENSIONS_PER_OUTLIER = 64
"""At most one dimension in so many is kept apart, so that the cache stays near half of float16."""


class Quantized(NamedTuple):
    """Vectors of width D in eight bits, K of their dimensions in float32."""

    values: Int8[Tensor, "*shape D"]
    """Zero in the dimensions that are kept apart."""
    scale: Float[Tensor, "*shape"]
    outliers: Float[Tensor, "*shape K"]


def quantize(x: Float[Tensor, "*shape D"], outlier_dimensions: Int[Tensor, " K"]) -> Quantized:
    """Round to the nearest of 255 levels between ± the largest magnitude of each vector's ordinary dimensions. Each of those dimensions is off by at
    most half a scale. Takes finite numbers."""
    x = x.float()
    ordinary = x.index_fill(-1, outlier_dimensions, 0.0)
    scale = ordinary.abs().amax(-1) / LEVELS
    values = (ordinary / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return Quantized(values, scale, x.index_select(-1, outlier_dimensions))


def dequantize(quantized: Quantized, outlier_dimensions: Int[Tensor, " K"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape D"]:
    """The vectors again; the dimensions that were kept apart are exact in float32."""
    x = quantized.values.float() * quantized.scale.unsqueeze(-1)
    x.index_copy_(-1, outlier_dimensions, quantized.outliers)
    return x.to(dtype)


def find_outlier_dimensions(x: Float[Tensor, "n D"]) -> Int[Tensor, " K"]:
    """The dimensions to keep apart, from a sample of vectors; ascending, possibly none.

    The squared rounding error of a vector is proportional to the square of its largest ordinary magnitude. Greedily, the dimension that weighs most
    among the largest goes apart; of all numbers of dimensions, the smallest is taken whose error is within 11 % of the least.
    """
    magnitudes = x.float().abs().flatten(0, -2)
    order: list[int] = []
    largest, where = magnitudes.max(-1)
    errors = [float(largest.double().square().mean())]
    for _ in range(magnitudes.shape[-1] // DIMENSIONS_PER_OUTLIER):
        weight = torch.zeros(magnitudes.shape[-1], dtype=torch.float64).index_add_(0, where, largest.double().square())
        order.append(int(weight.argmax()))
        magnitudes = magnitudes.index_fill(-1, torch.tensor(order[-1:]), 0.0)
        largest, where = magnitudes.max(-1)
        errors.append(float(largest.double().square().mean()))
    n = next(n for n, error in enumerate(errors) if error * WORTH_KEEPING_APART <= min(errors))
    return torch.tensor(sorted(order[:n]), dtype=torch.int64)
