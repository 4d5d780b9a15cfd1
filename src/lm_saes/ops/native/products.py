"""Encoder products in low precision, for screening: what they say of each gate value.

Two kinds with the same methods: bfloat16, made by torch, and 8-bit integers (product.cpp), which are faster on processors that have no unit
for matrices, but bound the errors less tightly. Their error is a fixed share of |x| |w|, while typical products shrink with the square root
of the width: the wider the model, the less integers tell.
"""

from __future__ import annotations

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


ROOM = 1 << 26
"""Bytes of keys, at most, where that leaves rows enough to work on."""


class Latents(NamedTuple):
    """What, beside the weights, makes gate values of tokens."""

    centre: Float[Tensor, " D"]
    """The m that is taken away from x before it is rounded (screen.h). Any would do; the mean makes rows shortest."""
    centre_norm: float
    centred: Float[Tensor, " F"]
    """m W + b."""
    gate_norm: Float[Tensor, " F"] | None


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


class Bfloat16:
    """A product in bfloat16.

    `norms` and `errors` [F] are |w~| and |w - w~|, as in screen.h.

    What is taken for granted: that torch adds up a bfloat16 product in float32, as oneDNN and torch's own loops do.
    """

    rows_at_once = 1024
    """At most."""
    records = None

    def __init__(self, width: int, n_latents: int) -> None:
        self._rounded = torch.empty(width, n_latents, dtype=torch.bfloat16)
        self.norms, self.errors = torch.empty(n_latents), torch.empty(n_latents)

    def update(self, W: Float[Tensor, "D F"], transposed: Float[Tensor, "F D"]) -> None:
        """Take over the weights; `transposed` is written too, on the way."""
        run("screen_weights", W, *W.shape, transposed, self._rounded, self.norms, self.errors)

    def bounds(self, x: Float[Tensor, "N D"], latents: Latents, k: int) -> Iterator[Bounds]:
        """The bounds of rows, piece by piece, to select k of each; one empty piece if there are no rows."""
        shape = width, n_latents = self._rounded.shape
        at_once = rows_in_room(self.rows_at_once, n_latents)
        n_rows = min(len(x), at_once)
        rounded, product = (torch.empty(n_rows, length, dtype=torch.bfloat16) for length in shape)
        (norms, errors), (keys, maxima) = torch.empty(2, n_rows), _room(n_rows, n_latents, k)
        about_latents = (self.norms, self.errors, latents.centred, latents.gate_norm, latents.centre_norm)
        for rows, n in _pieces(len(x), at_once):
            run("screen_rows", x[rows], latents.centre, n, width, rounded, norms, errors)
            torch.mm(rounded[:n], self._rounded, out=product[:n])
            run("screen_bounds", product, norms, errors, *about_latents, n, width, n_latents, k, keys, maxima)
            yield Bounds(rows, norms[:n], errors[:n], None, keys[:n], maxima[:n])


class Integers:
    """A product of 8-bit integers.

    `norms` and `errors` [F] are |w~| and |w - w~|, as in screen.h; `records` [F, bytes] the weights in two halves of 8 bits, as in integers.h.
    """

    rows_at_once = 1920
    """At most. What is read once for all of them, the weights in three forms, comes from memory: with 480 a step of D 768, F 6144 takes an eighth longer."""

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

    def bounds(self, x: Float[Tensor, "N D"], latents: Latents, k: int) -> Iterator[Bounds]:
        """The bounds of rows, piece by piece, to select k of each; one empty piece if there are no rows."""
        at_once = rows_in_room(self.rows_at_once, self.n_latents)
        n_rows = min(len(x), at_once)
        room = _padded(n_rows, TILE)
        rounded, totals = (torch.empty(room * _padded(self.width, 4), dtype=torch.int8), torch.empty(room, dtype=torch.int32))
        scales, norms, errors = torch.empty(3, room)
        records = torch.empty(n_rows, self._record, dtype=torch.uint8)
        keys, maxima = _room(n_rows, self.n_latents, k)
        about_latents = (self._panels, self._scales, self.norms, self.errors, latents.centred, latents.gate_norm, latents.centre_norm)
        for rows, n in _pieces(len(x), at_once):
            run("integer_rows", x[rows], latents.centre, n, self.width, rounded, records, scales, totals, norms, errors)
            about_rows = (rounded, scales, totals, norms, errors)
            run("integer_product", *about_rows, *about_latents, n, self.width, self.n_latents, k, keys, maxima)
            yield Bounds(rows, norms[:n], errors[:n], records[:n], keys[:n], maxima[:n])


Rounding = Bfloat16 | Integers


def bfloat16_pays() -> bool:
    """Whether bfloat16 products are faster than float32 ones on this processor; by its features, hence the same in every run."""
    return library.has_fast_bfloat16() and torch.backends.mkldnn.is_available()


def integers_pay() -> bool:
    """Whether integer products are faster than the others on this processor, as long as they tell enough; by its features, too."""
    return library.has_fast_integers()


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
