"""Activations of a chosen effective rank: sparse sums of known directions, stretched to a spectrum.

    s = sum_i a_i d_i            N unit directions in D dimensions; a_i is |1 + n/2|, n normal, with probability p_i (Zipf), else 0
    x = C^(1/2) Cov(s)^(-1/2) (s - E s)

so the covariance of x is C exactly: in a random basis, with standard deviations exp(-decay j / D). The effective rank is a function of
`decay` alone, which is found by bisection. Nothing but the rank differs between two ranks: directions, firing and magnitudes are the same.
"""

from __future__ import annotations

import math

import torch

from lm_saes.models.statistics import effective_rank

WIDTH, FEATURES, L0 = 128, 1024, 16


def standard_deviations(share: float, width: int = WIDTH) -> torch.Tensor:
    """The decaying spectrum [D] whose effective rank is `share` * D, with mean square 1."""
    low, high = 0.0, 200.0
    places = torch.arange(width, dtype=torch.float64) / width
    for _ in range(80):
        decay = (low + high) / 2
        low, high = (decay, high) if effective_rank(torch.exp(-decay * places)) > share * width else (low, decay)
    spectrum = torch.exp(-low * places)
    return spectrum / spectrum.square().mean().sqrt()


def activations(share: float, tokens: int, seed: int, width: int = WIDTH, features: int = FEATURES) -> torch.Tensor:
    """[tokens, D] of effective rank `share` * D."""
    draw = torch.Generator().manual_seed(0)  # the features are the same for all seeds and ranks
    directions = torch.nn.functional.normalize(torch.randn(features, width, generator=draw, dtype=torch.float64), dim=1)
    rates = 1 / torch.arange(1, features + 1, dtype=torch.float64).sqrt()
    rates = (rates * (L0 / rates.sum())).clamp(max=0.5)
    second = 1 + 0.25  # E (1 + n/2)^2; |.| changes the first moment only
    first = math.sqrt(1 / (2 * math.pi)) * math.exp(-2) + math.erf(math.sqrt(2))  # E |1 + n/2|
    covariance = directions.T @ ((rates * second - (rates * first).square())[:, None] * directions)
    values, vectors = torch.linalg.eigh(covariance)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))
    stretch = (vectors / values.sqrt()) @ vectors.T @ (basis * standard_deviations(share, width)) @ basis.T
    mean = (rates * first) @ directions
    draw = torch.Generator().manual_seed(seed)
    pieces = []
    for start in range(0, tokens, 8192):
        n = min(8192, tokens - start)
        fires = torch.rand(n, features, generator=draw) < rates.float()
        magnitudes = (1 + 0.5 * torch.randn(n, features, generator=draw)).abs()
        pieces.append((((fires * magnitudes).double() @ directions - mean) @ stretch).float())
    return torch.cat(pieces)
