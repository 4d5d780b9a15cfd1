"""Encoder products in low precision, for screening: with each product what bounds its errors.

Two kinds with the same methods: bfloat16, made by torch, and 8-bit integers (product.cpp), which are faster on processors that have no unit
for matrices, but bound the errors less tightly. Their error is a fixed share of |x| |w|, while typical products shrink with the square root
of the width: the wider the model, the less integers tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor

from lm_saes.ops.native import library
from lm_saes.ops.native.calls import run

PANEL, TILE = 32, 48
"""What the integer product works on is padded to whole panels of 32 latents and to multiples of 48 tokens."""
HEADER = 64
"""Bytes before the two halves of a record, and what each half is padded to."""


class Product(NamedTuple):
    """Some rows of the product. The tensors are buffers: they hold until the next piece."""

    rows: slice
    norms: Float[Tensor, " n"]
    """|y|, of the rows as they were."""
    errors: Float[Tensor, " n"]
    """What rounding took away: |y - y~|."""
    records: UInt8[Tensor, "n bytes"] | None
    """y in two halves of 8 bits (integers.h), if the products are of integers."""
    product: BFloat16[Tensor, "n F"]


class Bfloat16:
    """A product in bfloat16.

    `norms` and `errors` [F] are |w~| and |w - w~|, as in screen.h.

    What is taken for granted: that torch adds up a bfloat16 product in float32, as oneDNN and torch's own loops do.
    """

    rows_at_once = 1024
    """12 MB at 6144 latents."""
    records = None

    def __init__(self, width: int, n_latents: int) -> None:
        self._rounded = torch.empty(width, n_latents, dtype=torch.bfloat16)
        self.norms, self.errors = torch.empty(n_latents), torch.empty(n_latents)

    def update(self, W: Float[Tensor, "D F"], transposed: Float[Tensor, "F D"]) -> None:
        """Take over the weights; `transposed` is written too, on the way."""
        run("screen_weights", W, *W.shape, transposed, self._rounded, self.norms, self.errors)

    def of(self, x: Float[Tensor, "N D"], centre: Float[Tensor, " D"]) -> Iterator[Product]:
        """The product of x - centre, piece by piece; one empty piece if there are no rows."""
        width, n_latents = self._rounded.shape
        shape = min(len(x), self.rows_at_once), n_latents
        rounded, buffer = (torch.empty(shape[0], width, dtype=torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16))
        norms, errors = torch.empty(shape[0]), torch.empty(shape[0])
        for rows, n in _pieces(len(x), self.rows_at_once):
            run("screen_rows", x[rows], centre, n, width, rounded, norms, errors)
            yield Product(rows, norms[:n], errors[:n], None, torch.mm(rounded[:n], self._rounded, out=buffer[:n]))


class Integers:
    """A product of 8-bit integers.

    `norms` and `errors` [F] are |w~| and |w - w~|, as in screen.h; `records` [F, bytes] the weights in two halves of 8 bits, as in integers.h.
    """

    rows_at_once = 480
    """6 MB at 6144 latents: what is selected from it is still in cache."""

    def __init__(self, width: int, n_latents: int) -> None:
        room = _padded(n_latents, PANEL)
        self.width, self.n_latents = width, n_latents
        self._panels = torch.empty(_padded(width, 4) * room, dtype=torch.int8)
        self._scales = torch.empty(room)
        self.norms, self.errors = torch.empty(n_latents), torch.empty(n_latents)
        self._record = HEADER + 2 * _padded(width, HEADER)
        self.records = torch.empty(n_latents, self._record, dtype=torch.uint8)

    def update(self, W: Float[Tensor, "D F"], transposed: Float[Tensor, "F D"]) -> None:
        """Take over the weights; `transposed` is written too, on the way."""
        run("integer_weights", W, *W.shape, transposed, self._panels, self.records, self._scales, self.norms, self.errors)

    def of(self, x: Float[Tensor, "N D"], centre: Float[Tensor, " D"]) -> Iterator[Product]:
        """The product of x - centre, piece by piece; one empty piece if there are no rows."""
        n_rows = min(len(x), self.rows_at_once)
        room = _padded(n_rows, TILE)
        rounded, totals = (torch.empty(room * _padded(self.width, 4), dtype=torch.int8), torch.empty(room, dtype=torch.int32))
        scales, norms, errors = (torch.empty(room) for _ in range(3))
        records = torch.empty(n_rows, self._record, dtype=torch.uint8)
        product = torch.empty(n_rows, self.n_latents, dtype=torch.bfloat16)
        for rows, n in _pieces(len(x), self.rows_at_once):
            run("integer_rows", x[rows], centre, n, self.width, rounded, records, scales, totals, norms, errors)
            run("integer_product", rounded, scales, totals, self._panels, self._scales, n, self.width, self.n_latents, product)
            yield Product(rows, norms[:n], errors[:n], records[:n], product[:n])


Rounding = Bfloat16 | Integers


def bfloat16_pays() -> bool:
    """Whether bfloat16 products are faster than float32 ones on this processor; by its features, hence the same in every run."""
    return library.has_fast_bfloat16() and torch.backends.mkldnn.is_available()


def integers_pay() -> bool:
    """Whether integer products are faster than the others on this processor, as long as they tell enough; by its features, too."""
    return library.has_fast_integers()


def _pieces(n_rows: int, at_once: int) -> Iterator[tuple[slice, int]]:
    for start in range(0, max(n_rows, 1), at_once):
        stop = min(start + at_once, n_rows)
        yield slice(start, stop), stop - start


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
