"""How well a cache is shuffled when it is read, against an ideal shuffle (a random permutation of all tokens).

Three numbers, of the order in which a training would get the tokens:

- `rank_correlation`: Spearman's, between the place in the read order and the place in the text. Ideal: 0, within 1/√n. It sees a trend: text that is
  read from front to back has 1.
- `distance`: between tokens that follow each other in a context, how far apart are they in the read order? In a random permutation of n tokens the
  distance d has P(d ≤ x·n) = 2x − x². The number is the largest difference between that and the observed distribution (Kolmogorov and Smirnov).
  Ideal: 0; tokens that stay together have almost 1. It sees clumps.
- `same_context_in_batch`: pairs of tokens of one context in one batch, over their expected number if batches were drawn at random. Ideal: 1. It is what
  the gradient sees: the higher, the fewer independent contexts a step averages over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lm_saes.activations.cache import ActivationCache
from lm_saes.activations.cache_read import cached_stream
from lm_saes.activations.stored import ORIGIN
from lm_saes.config import ActivationFactoryActivationsSource, ActivationFactoryConfig, ActivationFactoryTarget
from lm_saes.errors import CacheError


@dataclass(frozen=True)
class ShuffleQuality:
    """The three numbers, and of how many tokens."""

    tokens: int
    rank_correlation: float
    distance: float
    same_context_in_batch: float

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, for printing."""
        return [
            ("rank correlation of place read and place in the text", f"{self.rank_correlation:+.4f} (ideal 0)"),
            ("distances of neighbours against a random order's", f"{self.distance:.4f} (ideal 0)"),
            ("pairs of one context in a batch against a random batch's", f"{self.same_context_in_batch:.2f} (ideal 1)"),
        ]


def order_quality(origins: Int[Tensor, " n"], context_size: int, batch_size: int) -> ShuffleQuality:
    """The numbers of a read order. `origins[i]`: place in the text, context · context_size + position, of the token that is read as number i.

    Raises:
        CacheError: there are fewer than two contexts, or no context has two tokens, so that there is nothing to compare.
    """
    n = len(origins)
    ranks = origins.argsort().argsort()
    read = torch.arange(n, dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack([read, ranks.double()]))[0, 1] if n > 1 else torch.tensor(0.0)
    by_place = origins.argsort()
    neighbours = origins[by_place].div(context_size, rounding_mode="floor")
    together = neighbours[1:] == neighbours[:-1]
    distances = (by_place[1:] - by_place[:-1]).abs()[together].double().sort().values / n
    _, sizes = neighbours.unique_consecutive(return_counts=True)
    pairs = float((sizes.double() * (sizes.double() - 1)).sum())
    if len(sizes) < 2 or pairs == 0:
        raise CacheError("shuffling cannot be judged: there are fewer than two contexts of more than one token")
    steps = torch.arange(1, len(distances) + 1, dtype=torch.float64) / len(distances)
    ideal = 2 * distances - distances.square()
    largest = torch.maximum((steps - ideal).abs(), (steps - 1 / len(distances) - ideal).abs()).max()
    return ShuffleQuality(n, float(correlation), float(largest), _pairs_in_batches(origins, context_size, batch_size) / (pairs / (n * (n - 1))))


def _pairs_in_batches(origins: Tensor, context_size: int, batch_size: int) -> float:
    """Among the ordered pairs of one batch, the share that are of one context."""
    whole = origins[: len(origins) // batch_size * batch_size] if len(origins) >= batch_size else origins
    together = total = 0.0
    for batch in whole.div(context_size, rounding_mode="floor").split(batch_size):
        sizes = batch.unique(return_counts=True)[1].double()
        together += float((sizes * (sizes - 1)).sum())
        total += len(batch) * (len(batch) - 1)
    return together / max(total, 1.0)


def shuffle_quality(path: str, *, buffer_size: int | None, batch_size: int, seed: int = 0) -> ShuffleQuality:
    """The numbers of a cache, read as a training with this `buffer_size`, `batch_size` and `seed` would; the activations are not read. `buffer_size` None:
    not shuffled when it is read.

    Raises:
        CacheError: there is no cache, or it does not record where its activations come from.
    """
    cache = ActivationCache(path)
    batch_size = min(batch_size, cache.manifest.tokens)
    cfg = ActivationFactoryConfig(
        sources=[ActivationFactoryActivationsSource(name="cache", path=path)],
        target=ActivationFactoryTarget.ACTIVATIONS_1D,
        hook_points=list(cache.hook_widths)[:1],
        batch_size=batch_size,
        buffer_size=None if buffer_size is None else max(buffer_size, batch_size),
        prefetch=0,
    )
    stream = cached_stream(cfg, None, seed, origins_only=True)
    origins = torch.cat([batch[ORIGIN] for batch in stream])
    if cache.context_size is None:
        raise CacheError(f"{path} does not record where its activations come from")
    return order_quality(origins, cache.context_size, batch_size)
