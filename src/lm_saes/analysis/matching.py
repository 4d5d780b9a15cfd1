"""Which latents of one dictionary are those of another, judged by their directions.

Letters: F latents of the first dictionary, G of the second, D width. Cosines are signed: codes are not negative, so a latent that points the
other way is another feature. The F x G cosines are made in blocks of rows; all of them are held at once only for an assignment.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from lm_saes.errors import ConfigError, NonFiniteError
from lm_saes.models.sae import SparseAutoEncoder

ASSIGNMENT_LIMIT = 8192**2
"""F * G up to which the best assignment is sought: 0.8 GiB, and about half a minute on one core."""
CHANCE_SEED = 250_520_254
"""Of the random directions. An unlikely one: a dictionary that was drawn from the same seed would be its own chance."""
BLOCK = 2048
"""Rows whose cosines are made at a time."""
SHARED = 0.7
"""Decoder and encoder cosine from which on a pair counts as the same feature (Paulo and Belrose, arXiv 2501.16615)."""
THRESHOLDS = (0.7, 0.9)


class Nearest(NamedTuple):
    """For each latent of the first dictionary the one of the second with the largest cosine, and the other way round."""

    forward: Float[Tensor, " F"]
    forward_index: Int64[Tensor, " F"]
    backward: Float[Tensor, " G"]
    backward_index: Int64[Tensor, " G"]


class Pairs(NamedTuple):
    """A one-to-one matching."""

    first: Int64[Tensor, " M"]
    second: Int64[Tensor, " M"]
    cosines: Float[Tensor, " M"]
    """Of the decoder rows."""
    method: str
    """"optimal assignment": the one-to-one matching with the largest mean cosine, of min(F, G) pairs. "mutual best": the pairs each of which is
    the other's nearest, which leaves latents out and so has the larger mean."""


@dataclass(frozen=True)
class DictionaryMatch:
    """How alike two dictionaries are. Pairs of numbers are: first in second, second in first."""

    latents: tuple[int, int]
    method: str
    """How latents were matched, see `Pairs`."""
    pairs: int
    mean_matched_cosine: float
    """Of the decoder rows over the matched pairs. With the optimal assignment: PW-MCC, the seed stability of Song et al. (arXiv 2505.20254),
    but for the sign."""
    mean_matched_encoder_cosine: float
    """Of the encoder's columns over the same pairs."""
    shared: float
    """Matched pairs whose decoder and encoder cosines both reach 0.7, over min(F, G) (Paulo and Belrose, arXiv 2501.16615)."""
    mean_max_cosine: tuple[float, float]
    """Mean over latents of the largest cosine (MMCS); several latents may have the same partner."""
    share_with_partner: dict[str, tuple[float, float]]
    """Threshold → share of latents with a partner whose cosine reaches it."""
    chance: float
    """The mean largest cosine that the first dictionary's latents have with as many random directions as the second has latents."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def compare_dictionaries(first: SparseAutoEncoder, second: SparseAutoEncoder, assignment_limit: int = ASSIGNMENT_LIMIT) -> DictionaryMatch:
    """How alike two dictionaries of the same hook points are.

    Args:
        first, second: any numbers of latents, folded or not: only directions are compared.
        assignment_limit: F * G up to which latents are matched by the optimal assignment, which needs SciPy; by mutual best beyond, and without.

    Raises:
        ConfigError: the dictionaries read or reconstruct different hook points, or are of different widths.
        NonFiniteError: NaN or infinity in the weights.
    """
    _check(first, second)
    rows, others = _directions(first.W_D), _directions(second.W_D)
    nearest = nearest_latents(rows, others)
    pairs = match_latents(rows, others, nearest, assignment_limit)
    encoder = (_directions(first.W_E.T)[pairs.first] * _directions(second.W_E.T)[pairs.second]).sum(1)
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(CHANCE_SEED))
    smaller = min(len(rows), len(others))
    return DictionaryMatch(
        latents=(len(rows), len(others)),
        method=pairs.method,
        pairs=len(pairs.cosines),
        mean_matched_cosine=_mean(pairs.cosines),
        mean_matched_encoder_cosine=_mean(encoder),
        shared=int(((pairs.cosines >= SHARED) & (encoder >= SHARED)).sum()) / smaller,
        mean_max_cosine=(_mean(nearest.forward), _mean(nearest.backward)),
        share_with_partner={f"{at:g}": (_mean(nearest.forward >= at), _mean(nearest.backward >= at)) for at in THRESHOLDS},
        chance=_mean(nearest_latents(rows, normalize(noise, dim=1)).forward),
    )


def match_latents(
    rows: Float[Tensor, "F D"], others: Float[Tensor, "G D"], nearest: Nearest | None = None, assignment_limit: int = ASSIGNMENT_LIMIT
) -> Pairs:
    """One-to-one pairs of unit rows; see `Pairs`. `nearest` is that of the same rows, if it is known already."""
    assign = _assignment() if len(rows) * len(others) <= assignment_limit else None
    if assign is not None:
        cosines = torch.cat([_cosines(block, others) for block in rows.split(BLOCK)])
        first, second = (torch.as_tensor(indices) for indices in assign(cosines.numpy(), maximize=True))
        return Pairs(first, second, cosines[first, second], "optimal assignment")
    nearest = nearest or nearest_latents(rows, others)
    first = torch.arange(len(rows))
    first = first[nearest.backward_index[nearest.forward_index] == first]
    return Pairs(first, nearest.forward_index[first], nearest.forward[first], "mutual best")


def nearest_latents(rows: Float[Tensor, "F D"], others: Float[Tensor, "G D"]) -> Nearest:
    """The nearest neighbours of unit rows in both directions; the first of equals."""
    forward, forward_index = [], []
    backward = torch.full((len(others),), -math.inf)
    backward_index = torch.zeros(len(others), dtype=torch.int64)
    for start in range(0, len(rows), BLOCK):
        cosines = _cosines(rows[start : start + BLOCK], others)
        values, indices = cosines.max(1)
        forward.append(values)
        forward_index.append(indices)
        values, indices = cosines.max(0)
        better = values > backward
        backward = torch.where(better, values, backward)
        backward_index = torch.where(better, indices + start, backward_index)
    return Nearest(torch.cat(forward), torch.cat(forward_index), backward, backward_index)


def _cosines(rows: Float[Tensor, "n D"], others: Float[Tensor, "G D"]) -> Float[Tensor, "n G"]:
    return (rows @ others.T).clamp_(-1, 1)  # rounding may leave 1 by an ulp


def _directions(rows: Float[Tensor, "F D"]) -> Float[Tensor, "F D"]:
    """Rows of unit length on the CPU in float32; a zero row stays zero, and has cosine 0 with all."""
    return normalize(rows.detach().float().cpu(), dim=1, eps=1e-30)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0


def _assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        return None
    return linear_sum_assignment


def _check(first: SparseAutoEncoder, second: SparseAutoEncoder) -> None:
    for what, one, other in (
        ("read", first.cfg.hooks_in, second.cfg.hooks_in),
        ("reconstruct", first.cfg.hooks_out, second.cfg.hooks_out),
        ("are of width", first.cfg.d_model, second.cfg.d_model),
    ):
        if one != other:
            raise ConfigError(f"only dictionaries of the same hook points can be compared; these {what} {one} and {other}")
    for name, dictionary in (("first", first), ("second", second)):
        if not (dictionary.W_D.isfinite().all() and dictionary.W_E.isfinite().all()):
            raise NonFiniteError(f"the weights of the {name} dictionary hold NaN or infinity; there is nothing to compare")
