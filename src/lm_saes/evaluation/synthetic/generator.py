"""Activations with known features: the synthetic model of SynthSAEBench (arXiv 2602.14687), and a stream of its samples.

An activation is x = sum_i a_i d_i + b, with unit directions d_i that are as far apart as N > D allows. Which features fire and how:

    g = L e + sqrt(1 - |L_i|^2) h,  e, h normal      correlated normal numbers, one for each feature (a Gaussian copula)
    feature i would fire if g_i > t_i                 P(g_i > t_i) = p_i, Zipf's law
    a_i = max(0, m_i + s_i n_i),  n normal            magnitudes: m linear in i, s folded normal
    level by level of the forest:
        a_i <- a_i a_parent / m_parent                a child fires only with its parent, and scaled by it
        of the siblings with a_i > 0 one, drawn at random, keeps it

Letters: N features, D width; n samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lm_saes import ops
from lm_saes.config.synthetic import SyntheticModelConfig
from lm_saes.devices import resolve_device
from lm_saes.ops import SparseCodes

SYNTHETIC_HOOK = "synthetic"
"""The name under which a batch of `SyntheticStream` holds its activations."""


class Sample(NamedTuple):
    """n activations and what they are made of."""

    activations: Float[Tensor, "n D"]
    features: SparseCodes
    """Magnitudes of the features that fire, all positive: [n, N]."""


class SyntheticModel:
    """Features, and the law by which they fire. Depends on nothing but `cfg`; in float32, on `device`.

    Raises:
        DeviceError: this machine does not have `device`.
    """

    def __init__(self, cfg: SyntheticModelConfig, device: str = "cpu") -> None:
        self.cfg = cfg
        self.device = resolve_device(device)
        # Drawn on the CPU, so that a seed means the same model on every device.
        draw = torch.Generator().manual_seed(cfg.seed)
        n, d = cfg.n_features, cfg.d_model
        factor = torch.randn(n, cfg.correlation_rank, generator=draw) * cfg.correlation_scale
        spread = cfg.magnitude_spread_mean + cfg.magnitude_spread_std * torch.randn(n, generator=draw)
        bias = torch.randn(d, generator=draw)
        directions = torch.randn(n, d, generator=draw)

        self.parents: Int64[Tensor, " N"] = forest(cfg).to(self.device)
        """The parent of each feature; -1 where there is none."""
        self.target_probabilities: Float[Tensor, " N"] = zipf_probabilities(cfg).to(self.device)
        """Zipf's law: how often each feature is meant to fire."""
        self.firing_probabilities: Float[Tensor, " N"] = self.target_probabilities
        """p: how often each would fire if it were not for the hierarchy."""
        if cfg.compensate_probabilities:
            self.firing_probabilities = compensated(self.target_probabilities, self.parents, cfg.mutually_exclusive_children)
        self.mean_magnitudes: Float[Tensor, " N"] = torch.linspace(cfg.first_mean_magnitude, cfg.last_mean_magnitude, n).to(self.device)
        """m."""
        self.magnitude_spreads: Float[Tensor, " N"] = spread.abs().to(self.device)
        """s."""
        self.correlation_factor: Float[Tensor, "N rank"] = capped(factor).to(self.device)
        """L: g_i and g_j have the correlation <L_i, L_j>."""
        self.directions: Float[Tensor, "N D"] = spread_out(directions, cfg.orthogonalization_steps, cfg.orthogonalization_lr).to(self.device)
        """d: unit vectors."""
        self.bias: Float[Tensor, " D"] = (bias * (cfg.bias_norm / bias.norm())).to(self.device)
        """b."""
        # g > t divided by the standard deviation of g's own part: L' e + h > t'
        own = (1 - self.correlation_factor.square().sum(1)).sqrt()
        self._factor = self.correlation_factor / own[:, None]
        self._thresholds = math.sqrt(2) * torch.erfinv(1 - 2 * self.firing_probabilities) / own
        self._free = (self.parents < 0).nonzero().flatten()
        self._free_factor, self._free_thresholds = self._factor[self._free].T.contiguous(), self._thresholds[self._free]
        self._siblings = torch.arange(cfg.branching_factor, device=self.device)
        self._first_children = [level.start for level in levels(cfg)]

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Sample:
        """n independent samples; `generator` must live on this model's device."""
        features = self.sample_features(n, generator)
        return Sample(ops.decode(features, self.directions) + self.bias, features)

    @torch.no_grad()
    def sample_features(self, n: int, generator: torch.Generator) -> SparseCodes:
        """What fires in n samples, and with what magnitude."""
        common = self._normal(generator, n, self.cfg.correlation_rank)  # e
        gaussians = self._normal(generator, n, len(self._free)).addmm_(common, self._free_factor)
        rows, free = (gaussians > self._free_thresholds).nonzero(as_tuple=True)
        indices = self._free[free]
        values = self._magnitudes(indices, generator)
        found = [(rows, indices, values)]
        fires = (values > 0) & (indices < self.cfg.n_roots)
        rows, indices, values = rows[fires], indices[fires], values[fires]
        first_parent = 0
        for first_child in self._first_children:  # a generation after the other; only children of parents that fire are looked at
            children = first_child + (indices - first_parent)[:, None] * self.cfg.branching_factor + self._siblings
            amounts = self._family(children, common[rows], generator)
            if self.cfg.scale_children_by_parent:
                amounts = amounts * (values / self.mean_magnitudes[indices])[:, None]
            fires = amounts > 0
            rows, indices, values = rows[:, None].expand_as(fires)[fires], children[fires], amounts[fires]
            found.append((rows, indices, values))
            first_parent = first_child
        rows, indices, values = (torch.cat(column) for column in zip(*found, strict=True))
        return _by_row(rows, indices, values, (n, self.cfg.n_features))

    def _family(self, children: Int64[Tensor, "p b"], common: Float[Tensor, "p rank"], generator: torch.Generator) -> Float[Tensor, "p b"]:
        """Magnitudes of the children of p parents that fire: those that fire themselves, at most one of each family if they exclude
        each other."""
        gaussians = self._normal(generator, *children.shape) + torch.einsum("pr,pbr->pb", common, self._factor[children])
        would_fire = gaussians > self._thresholds[children]
        amounts = torch.where(would_fire, self._magnitudes(children, generator), 0.0)
        if self.cfg.mutually_exclusive_children:
            scores = torch.rand(children.shape, generator=generator, device=self.device)
            chosen = torch.where(amounts > 0, scores, -1.0).argmax(1, keepdim=True)
            amounts = torch.zeros_like(amounts).scatter(1, chosen, amounts.gather(1, chosen))
        return amounts

    def _magnitudes(self, indices: Int64[Tensor, "*shape"], generator: torch.Generator) -> Float[Tensor, "*shape"]:
        return (self.mean_magnitudes[indices] + self.magnitude_spreads[indices] * self._normal(generator, *indices.shape)).relu()

    def _normal(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=self.device)


class SyntheticStream:
    """Batches `{"synthetic": [n, D], "tokens": [n], "mask": [n], "features": SparseCodes [n, N]}` of a synthetic model's samples.

    A stream as the trainer and the initializer take it, and evaluation against the truth beside it: "features" is what the
    activations are made of. The tokens are the samples' numbers. Batch i depends on the model, the batch size, the seed and i only.

    Args:
        seed: of the samples; streams of different seeds hold different samples of the same model.
        n_batches: the stream's length; `None`: it does not end.
    """

    def __init__(self, model: SyntheticModel, batch_size: int, seed: int = 0, n_batches: int | None = None) -> None:
        self.model, self.batch_size, self.seed, self.n_batches = model, batch_size, seed, n_batches
        self._position = 0
        self._generator = torch.Generator(model.device)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.n_batches is not None and self._position >= self.n_batches:
            raise StopIteration
        # The CPU's generator looks at the lower 32 bits of a seed only: there, batches count on from a place that the stream's seed draws.
        self._generator.manual_seed((_scrambled(self.seed) + self._position) % 2**32)
        sample = self.model.sample(self.batch_size, self._generator)
        first = self._position * self.batch_size
        self._position += 1
        return {
            SYNTHETIC_HOOK: sample.activations,
            "tokens": torch.arange(first, first + self.batch_size, device=self.model.device),
            "mask": torch.ones(self.batch_size, dtype=torch.bool, device=self.model.device),
            "features": sample.features,
        }

    def state_dict(self) -> dict[str, Any]:
        """How many batches were given."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after as many batches."""
        self._position = int(state["position"])


# ------------------------------------------------------------------------------------------------- the parts of a model


def zipf_probabilities(cfg: SyntheticModelConfig) -> Float[Tensor, " N"]:
    """Firing probabilities ~ rank^-a, rescaled so that the first and the last are those of `cfg`."""
    weights = torch.arange(1, cfg.n_features + 1, dtype=torch.float64) ** -cfg.zipf_exponent
    share = (weights - weights[-1]) / (weights[0] - weights[-1])
    return (cfg.min_firing_probability + (cfg.max_firing_probability - cfg.min_firing_probability) * share).float()


def levels(cfg: SyntheticModelConfig) -> list[range]:
    """The features of each generation below the roots."""
    sizes = [cfg.n_roots * cfg.branching_factor**level for level in range(cfg.depth + 1)]
    starts = [sum(sizes[:level]) for level in range(cfg.depth + 2)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts[1:])] if cfg.n_roots else []


def forest(cfg: SyntheticModelConfig) -> Int64[Tensor, " N"]:
    """The parent of each feature, -1 for roots and for features outside the forest."""
    parents = torch.full((cfg.n_features,), -1, dtype=torch.int64)
    first_parent = 0
    for level in levels(cfg):
        parents[level.start : level.stop] = first_parent + torch.arange(len(level)) // cfg.branching_factor
        first_parent = level.start
    return parents


def compensated(probabilities: Float[Tensor, " N"], parents: Int64[Tensor, " N"], exclusive: bool) -> Float[Tensor, " N"]:
    """Probabilities before the hierarchy, chosen as SynthSAEBench does, so that those after it are near the given ones: divided by the
    parent's, and with exclusive siblings times 1 + the expected number of siblings that would fire along; at most 1."""
    children = (parents >= 0).nonzero().flatten()
    of_parent = probabilities[parents[children]]
    given_parent = probabilities[children] / of_parent
    if exclusive:
        families = torch.zeros_like(probabilities).index_add(0, parents[children], probabilities[children])
        given_parent = given_parent * (1 + (families[parents[children]] - probabilities[children]).clamp(min=0) / of_parent)
    return probabilities.index_copy(0, children, given_parent.clamp(max=1))


def capped(factor: Float[Tensor, "N rank"], most: float = 0.99) -> Float[Tensor, "N rank"]:
    """Rows scaled down where their squared norm, the share of g's variance that is common to all features, exceeds `most`."""
    squared = factor.square().sum(1, keepdim=True)
    return torch.where(squared > most, factor * (most / squared).sqrt(), factor)


def spread_out(directions: Float[Tensor, "N D"], steps: int, lr: float) -> Float[Tensor, "N D"]:
    """Unit vectors after `steps` of Adam down sum_{i != j} <d_i, d_j>^2 + N sum_i (|d_i|^2 - 1)^2."""
    vectors = torch.nn.functional.normalize(directions, dim=1).requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        squared = vectors.square().sum(1)
        # The sum of <d_i, d_j>^2 over all pairs is |d^T d|^2 as well: D x D products instead of N x N ones.
        overlap = (vectors.T @ vectors).square().sum() - squared.square().sum()
        (overlap + len(vectors) * (squared - 1).square().sum()).backward()
        optimizer.step()
    return torch.nn.functional.normalize(vectors.detach(), dim=1)


def _by_row(rows: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> SparseCodes:
    """Entries in any order as sparse codes, without those that are zero."""
    fires = values > 0
    places, order = (rows[fires] * shape[1] + indices[fires]).sort()
    counts = torch.bincount(places // shape[1], minlength=shape[0])
    return SparseCodes(values[fires][order], places % shape[1], torch.cat([counts.new_zeros(1), counts.cumsum(0)]), shape[1])


def _scrambled(seed: int) -> int:
    """32 bits that look unlike those of the neighbouring seeds (the finalizer of MurmurHash3)."""
    bits = seed & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
