"""The sparse operations with screened selection: a bfloat16 product bounds the gate values, float32 products of the candidates decide.

Codes are those of `SparseOps` up to the rounding of a float32 product; see native/screening.py for what is certain and why. Where
screening does not apply (a gated linear unit, other data types, autocast) or is not worth its pass over the weights (few rows), the
float32 product is made as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lm_saes.ops import native
from lm_saes.ops.native import ScreenedEncoder
from lm_saes.ops.reference import Encoder
from lm_saes.ops.sparse import Found, SparseOps

FEWEST_ROWS = 512
"""Tokens from which on the pass over the weights is worth it: it takes as long as the float32 product of some 200 rows."""


@dataclass(frozen=True)
class ScreenedOps(SparseOps):
    """The operations of `lm_saes.ops` with screened selection."""

    def topk_entries(self, x: Float[Tensor, "N D"], encoder: Encoder, k: int) -> tuple[Float[Tensor, "N k"], Int64[Tensor, "N k"], list[Tensor]]:
        if not _screens(x, encoder):
            return super().topk_entries(x, encoder, k)
        selection = ScreenedEncoder(encoder.W, encoder.b, encoder.gate_norm).topk(x.detach(), k)
        return selection.values, selection.indices, []

    def entries_above(self, x: Float[Tensor, "N D"], encoder: Encoder, floor: Tensor | float) -> Found:
        if not _screens(x, encoder, floor if isinstance(floor, Tensor) else None):
            return super().entries_above(x, encoder, floor)
        entries = ScreenedEncoder(encoder.W, encoder.b, encoder.gate_norm).above(x.detach(), floor)
        return Found(entries.counts, entries.indices, entries.values, entries.gate, [])


def _screens(x: Tensor, encoder: Encoder, floor: Tensor | None = None) -> bool:
    tensors = (x, encoder.W, encoder.b, encoder.gate_norm, floor)
    return len(x) >= FEWEST_ROWS and encoder.W_glu is None and native.applies(*tensors) and not torch.is_autocast_enabled(x.device.type)
