"""Encoder products in low precision, for screening: what they say of each gate value.

Two kinds with the same methods: bfloat16, made by torch, and 8-bit integers (product.cpp), which are faster on processors that have no unit
for matrices, but bound the errors less tightly. Their error is a fixed share of |x| |w|, while typical products shrink with the square root
of the width: the wider the model, the less integers tell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor

from lm_saes.ops.native import library
from lm_saes.ops.native.calls import run

PANEL, TILE = 32, 48
"""What the kernels work on is padded to whole panels of 32 latents, and for integers to multiples of 48 tokens."""
HEADER = 64
"""Bytes before the two halves of a record, and what each half is padded to."""


ROOM = 1 << 27
"""Bytes of keys, at most, where that leaves rows enough to work on."""


class Bounds(NamedTuple):
    """What is known of the gate values of some rows. The tensors are buffers: they hold until the next piece."""

    rows: slice
    norms: Float[Tensor, " n"]
    """|y|, of the rows as they were."""
    errors: Float[Tensor, " n"]
    """What rounding took away: |y - y~|."""
    records: UInt8[Tensor, "n bytes"] | None
    """y in two halves of 8 bits (integers.h), if the products are of integers."""
    keys: Int16[Tensor, "n padded_F"]
    """Of the largest values there may be: the first 16 bits of the float, rounded up; 0 if not positive."""
    maxima: Int16[Tensor, "n groups"]
    """The largest keys of groups of latents."""


class Rounding(ABC):
    """Weights as a product in low precision needs them, and what bounds it (screen.h): the norms |w~| and errors |w - w~| of the latents.

    Activations x are rounded as x - m. Any m would do; their mean makes them shortest.
    """

    rows_at_once: int
    """At most."""
    records: UInt8[Tensor, "F bytes"] | None = None
    """The weights in two halves of 8 bits (integers.h), if the product is of integers."""

    def __init__(self, width: int, n_latents: int) -> None:
        self.width, self.n_latents = width, n_latents
        self.transposed = torch.empty(n_latents, width)
        self.norms, self.errors, self.centred = torch.empty(3, n_latents)

    def update(self, W: Float[Tensor, "D F"], b: Float[Tensor, " F"], gate_norm: Float[Tensor, " F"] | None, centre: Float[Tensor, " D"]) -> None:
        """Take over the weights, for activations around `centre`."""
        self.b, self.gate_norm, self.centre = b, gate_norm, centre
        self._round(W)
        self.of_bounds = (self.norms, self.errors, self.centred, gate_norm, float(centre.double().norm()))

    @abstractmethod
    def _round(self, W: Float[Tensor, "D F"]) -> None:
        """Write W^T, m W + b, norms, errors and whatever the product takes."""

    @abstractmethod
    def bounds(self, x: Float[Tensor, "N D"], k: int) -> Iterator[Bounds]:
        """The bounds of rows, piece by piece, to select k of each; one empty piece if there are no rows."""


class Bfloat16(Rounding):
    """A product in bfloat16.

    What is taken for granted: that torch adds up a bfloat16 product in float32, as oneDNN and torch's own loops do.
    """

    rows_at_once = 1024

    def __init__(self, width: int, n_latents: int) -> None:
        super().__init__(width, n_latents)
        self._rounded = torch.empty(width, n_latents, dtype=torch.bfloat16)

    def _round(self, W: Float[Tensor, "D F"]) -> None:
        run("screen_weights", W, self.b, self.centre, *W.shape, self.transposed, self.centred, self._rounded, self.norms, self.errors)

    def bounds(self, x: Float[Tensor, "N D"], k: int) -> Iterator[Bounds]:
        at_once = rows_in_room(self.rows_at_once, self.n_latents)
        n_rows = min(len(x), at_once)
        rounded, product = (torch.empty(n_rows, length, dtype=torch.bfloat16) for length in (self.width, self.n_latents))
        (norms, errors), (keys, maxima) = torch.empty(2, n_rows), _room(n_rows, self.n_latents, k)
        for rows, n in _pieces(len(x), at_once):
            run("screen_rows", x[rows], self.centre, n, self.width, rounded, norms, errors)
            torch.mm(rounded[:n], self._rounded, out=product[:n])
            run("screen_bounds", product, norms, errors, *self.of_bounds, n, self.width, self.n_latents, k, keys, maxima)
            yield Bounds(rows, norms[:n], errors[:n], None, keys[:n], maxima[:n])


class Integers(Rounding):
    """A product of 8-bit integers."""

    rows_at_once = 1920
    """What is read once for all of them, the weights in three forms, comes from memory: with 480 a step of D 768, F 6144 takes an eighth longer."""

    def __init__(self, width: int, n_latents: int) -> None:
        super().__init__(width, n_latents)
        room = _padded(n_latents, PANEL)
        self._panels, self._scales = torch.empty(_padded(width, 4) * room, dtype=torch.int8), torch.empty(room)
        self._record = HEADER + 2 * _padded(width, HEADER)
        self.records = torch.empty(n_latents, self._record, dtype=torch.uint8)

    def _round(self, W: Float[Tensor, "D F"]) -> None:
        written = (self.transposed, self.centred, self._panels, self.records, self._scales, self.norms, self.errors)
        run("integer_weights", W, self.b, self.centre, *W.shape, *written)

    def bounds(self, x: Float[Tensor, "N D"], k: int) -> Iterator[Bounds]:
        at_once = rows_in_room(self.rows_at_once, self.n_latents)
        n_rows = min(len(x), at_once)
        room = _padded(n_rows, TILE)
        rounded, totals = (torch.empty(room * _padded(self.width, 4), dtype=torch.int8), torch.empty(room, dtype=torch.int32))
        scales, norms, errors = torch.empty(3, room)
        records = torch.empty(n_rows, self._record, dtype=torch.uint8)
        keys, maxima = _room(n_rows, self.n_latents, k)
        about = (rounded, scales, totals, norms, errors, self._panels, self._scales, *self.of_bounds)
        for rows, n in _pieces(len(x), at_once):
            run("integer_rows", x[rows], self.centre, n, self.width, rounded, records, scales, totals, norms, errors)
            run("integer_product", *about, n, self.width, self.n_latents, k, keys, maxima)
            yield Bounds(rows, norms[:n], errors[:n], records[:n], keys[:n], maxima[:n])


def bfloat16_pays() -> bool:
    """Whether bfloat16 products are faster than float32 ones on this processor; by its features, hence the same in every run."""
    return library.has_fast_bfloat16() and torch.backends.mkldnn.is_available()


def integers_pay() -> bool:
    """Whether integer products are faster than the others on this processor, as long as they tell enough; by its features, too."""
    return library.has_fast_integers()


def kept_bytes(kind: type[Rounding], width: int, n_latents: int) -> int:
    """Bytes that weights take as a kind of product needs them."""
    with torch.device("meta"):
        kept = vars(kind(width, n_latents))
    return sum(part.nbytes for part in kept.values() if isinstance(part, Tensor))


def rows_in_room(most: int, n_latents: int) -> int:
    """Rows whose keys are made at once: `most`, or as many as there is room for."""
    return min(most, max(ROOM // (2 * n_latents), TILE) // TILE * TILE)


def _room(n_rows: int, n_latents: int, k: int) -> tuple[Tensor, Tensor]:
    """For keys and maxima."""
    lengths = _padded(n_latents, PANEL), library.kernels().lm_saes_groups(n_latents, k)
    return torch.empty(n_rows, lengths[0], dtype=torch.int16), torch.empty(n_rows, lengths[1], dtype=torch.int16)


def floor_keys(floors: Float[Tensor, " F"]) -> Int16[Tensor, " padded_F"]:
    """The keys from which on values may lie above the floors; below zero all may."""
    keys = (floors.view(torch.int32) >> 16).clamp(min=1).masked_fill(floors < 0, 0).to(torch.int16)
    return torch.nn.functional.pad(keys, (0, _padded(len(keys), PANEL) - len(keys)))


def _pieces(n_rows: int, at_once: int) -> Iterator[tuple[slice, int]]:
    for start in range(0, max(n_rows, 1), at_once):
        stop = min(start + at_once, n_rows)
        yield slice(start, stop), stop - start


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
