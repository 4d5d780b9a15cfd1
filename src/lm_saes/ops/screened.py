"""The sparse operations with screened selection: a low-precision product bounds the gate values, float32 products of the candidates decide.

Codes are those of `SparseOps` up to the rounding of a float32 product; see native/screening.py for what is certain and why. Where
screening does not apply (a gated linear unit, other data types, autocast) or is not worth its pass over the weights (few rows), the
float32 product is made as there.

The product is of integers where the processor is fast at them and they tell enough, which some rows of the batch show; else it is in
bfloat16 where that is fast; else in float32. The codes do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lm_saes.ops import native
from lm_saes.ops.native import Bfloat16, Integers, ScreenedEncoder
from lm_saes.ops.native.screening import Entries, Selection
from lm_saes.ops.reference import Encoder
from lm_saes.ops.sparse import Found, SparseOps

FEWEST_ROWS = 512
"""Tokens from which on the pass over the weights is worth it: it takes as long as the float32 product of some 200 rows."""
SAMPLED_ROWS = 256
"""Tokens from which is seen how much integers tell."""
WASTED = 12
"""Integers do not pay where more than F / 12 entries of a token, on average, were looked at in vain."""


@dataclass(frozen=True)
class ScreenedOps(SparseOps):
    """The operations of `lm_saes.ops` with screened selection."""

    def topk_entries(self, x: Float[Tensor, "N D"], encoder: Encoder, k: int) -> tuple[Float[Tensor, "N k"], Int64[Tensor, "N k"], list[Tensor]]:
        if not _screens(x, encoder):
            return super().topk_entries(x, encoder, k)
        selection = _screened(x.detach(), encoder, lambda screened, rows: screened.topk(rows, k))
        if selection is None:
            return super().topk_entries(x, encoder, k)
        return selection.values, selection.indices, []

    def entries_above(self, x: Tensor, encoder: Encoder, floor: Tensor | float) -> Found:
        if not _screens(x, encoder, floor if isinstance(floor, Tensor) else None):
            return super().entries_above(x, encoder, floor)
        entries = _screened(x.detach(), encoder, lambda screened, rows: screened.above(rows, floor))
        if entries is None:
            return super().entries_above(x, encoder, floor)
        return Found(entries.counts, entries.indices, entries.values, entries.gate, [])


def _screens(x: Tensor, encoder: Encoder, floor: Tensor | None = None) -> bool:
    tensors = (x, encoder.W, encoder.b, encoder.gate_norm, floor)
    return len(x) >= FEWEST_ROWS and encoder.W_glu is None and native.applies(*tensors) and not torch.is_autocast_enabled(x.device.type)


Result = TypeVar("Result", Selection, Entries)


def _screened(x: Float[Tensor, "N D"], encoder: Encoder, select: Callable[[ScreenedEncoder, Tensor], Result]) -> Result | None:
    """What `select` makes of all rows, by the kind of product that pays; None if float32 does.

    Bfloat16 is also what serves where none pays and screening was asked for all the same.
    """
    if native.integers_pay():
        screened = ScreenedEncoder(encoder.W, encoder.b, encoder.gate_norm, Integers)
        sample = select(screened, x[:SAMPLED_ROWS])
        if _wasted(sample, encoder.W.shape[1]) <= encoder.W.shape[1] / WASTED:
            return _joined(sample, select(screened, x[SAMPLED_ROWS:]))
        del screened  # before the other kind takes as much memory again
    if native.bfloat16_pays() or not native.integers_pay():
        return select(ScreenedEncoder(encoder.W, encoder.b, encoder.gate_norm, Bfloat16), x)
    return None


def _wasted(result: Result, n_latents: int) -> float:
    """Entries of a token that were computed one by one and not selected, on average; all of them where there were too many candidates."""
    needed = result.counts if isinstance(result, Entries) else result.indices.shape[1]
    return float(torch.where(result.products < 0, n_latents, result.products - needed).float().mean())


def _joined(one: Result, other: Result) -> Result:
    return type(one)(*(torch.cat(parts) for parts in zip(one, other, strict=True)))
