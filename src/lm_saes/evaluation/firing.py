"""How often latents fire: L0, dead and dense latents, the histogram of densities.

A latent fires on a token where its code is not zero. Its density is the share of tokens on which it fires. Letters: N tokens, F latents.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from lm_saes.ops import Codes, latent_sums, map_codes, row_sums

DENSE_ABOVE = 0.1
"""A latent that fires on a larger share of the tokens is dense."""

HISTOGRAM_EDGES = tuple(-6 + step / 2 for step in range(13))
"""Edges of the histogram's bins in log10 of the density: half decades from 10^-6 to 1."""


class FiringCounts:
    """On how many tokens each latent fired."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.per_latent: Int[Tensor, " F"] = torch.zeros(0, dtype=torch.int64)

    def update(self, codes: Codes) -> None:
        """Take in the codes of one batch, dense `[N, F]` or sparse."""
        fired = map_codes(codes, lambda values: (values != 0).float())
        of_rows = row_sums(fired)
        # Sums of ones in float32 are exact below 2^24 rows per batch.
        per_latent = latent_sums(fired, torch.ones_like(of_rows)).long().cpu()
        self.per_latent = per_latent + self.per_latent if self.n_tokens else per_latent
        self.n_tokens += len(of_rows)


def l0(counts: FiringCounts) -> float:
    """Mean number of latents that fire on a token."""
    return int(counts.per_latent.sum()) / counts.n_tokens


def dead_fraction(counts: FiringCounts) -> float:
    """Share of the latents that fired on no token. It falls as more tokens are seen, so it belongs to their number."""
    return int((counts.per_latent == 0).sum()) / len(counts.per_latent)


def dense_fraction(counts: FiringCounts, above: float = DENSE_ABOVE) -> float:
    """Share of the latents that fired on more than `above` of the tokens."""
    return int((counts.per_latent > above * counts.n_tokens).sum()) / len(counts.per_latent)


def density_histogram(counts: FiringCounts) -> list[list[float]]:
    """Rows `[low, high, latents]` over log10 of the density, by `HISTOGRAM_EDGES`; a bin holds its lower edge and the last one also density 1.

    Latents below 10^-6 stand in the first bin; dead ones stand in none, so the rows sum to the living latents.
    """
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64)
    density = counts.per_latent[counts.per_latent > 0].double() / max(counts.n_tokens, 1)
    bins = (torch.bucketize(density.log10(), edges, right=True) - 1).clamp(0, len(edges) - 2)
    filled = torch.bincount(bins, minlength=len(edges) - 1).tolist()
    return [[low, high, float(n)] for low, high, n in zip(HISTOGRAM_EDGES, HISTOGRAM_EDGES[1:], filled, strict=False)]
