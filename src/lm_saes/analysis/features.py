"""The contexts in which each latent fires hardest.

One pass over a 2D stream: a batch's codes are reduced to the peak of every latent in every row, and merged into a running list of the best
rows per latent. Nothing of size latents x tokens is kept. The windows of tokens around the peaks are cut at the end, for the latents asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lm_saes.models.sparse_dictionary import SparseDictionary


@dataclass(frozen=True)
class Context:
    """A window of tokens around a peak: their ids and texts, the latent's activation at each, the position of the peak in the window."""

    tokens: list[int]
    texts: list[str]
    activations: list[float]
    peak: int


@dataclass(frozen=True)
class Feature:
    """One latent: how often it fires (share of tokens), its largest activation, its strongest contexts (strongest first, one per row of text)."""

    index: int
    density: float
    max_activation: float
    contexts: list[Context]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Feature:
        """The feature that `as_dict` wrote."""
        return cls(**{**table, "contexts": [Context(**context) for context in table["contexts"]]})


class FeatureFinder:
    """Collects the strongest contexts of every latent from 2D batches.

    Args:
        sae: The dictionary, in eval mode; it is given raw activations.
        n_contexts: Rows kept per latent.
        before, after: Tokens of a window before and after the peak.
    """

    def __init__(self, sae: SparseDictionary, n_contexts: int = 5, before: int = 24, after: int = 8):
        self.sae, self.n_contexts, self.before, self.after = sae, n_contexts, before, after
        n_latents = sae.cfg.d_sae
        self.counts = torch.zeros(n_latents, dtype=torch.int64)
        self.n_tokens = 0
        self._peaks = torch.zeros(n_contexts, n_latents)
        self._row = torch.full((n_contexts, n_latents), -1, dtype=torch.int64)
        self._position = torch.zeros(n_contexts, n_latents, dtype=torch.int64)
        self._rows: list[torch.Tensor] = []  # token ids of every row seen; a few bytes a token
        self._inputs: list[torch.Tensor] = []  # and its input activations, in float16, to recompute the codes of the chosen windows

    @torch.no_grad()
    def add(self, batch: dict[str, Any]) -> None:
        """Take one 2D batch: hook points `[B, S, D]`, `tokens` and `mask` `[B, S]`."""
        mask, tokens = batch["mask"], batch["tokens"]
        codes = self.sae.features(batch).float() * mask[..., None]
        self.counts += (codes > 0).sum((0, 1)).cpu()
        self.n_tokens += int(mask.sum())
        peaks, positions = codes.max(1)  # [B, F]
        first = len(self._rows)
        rows = torch.arange(first, first + len(tokens))[:, None].expand(-1, peaks.shape[1])
        self._rows.extend(row.cpu() for row in tokens)
        self._inputs.extend(row.cpu() for row in batch[self.sae.cfg.hooks_in[0]].half())
        candidates = torch.cat([self._peaks, peaks.cpu()])
        self._peaks, order = candidates.topk(self.n_contexts, dim=0)
        self._row = torch.cat([self._row, rows]).gather(0, order)
        self._position = torch.cat([self._position, positions.cpu()]).gather(0, order)

    def density(self) -> torch.Tensor:
        """Share of tokens on which each latent fired, `[F]`."""
        return self.counts.double() / max(1, self.n_tokens)

    @torch.no_grad()
    def feature(self, index: int, token_texts: Callable[[list[int]], list[str]]) -> Feature:
        """The record of one latent; `token_texts` says what to print for each of a row's ids (`LanguageModel.token_texts`)."""
        contexts = []
        for slot in range(self.n_contexts):
            peak = float(self._peaks[slot, index])
            if peak <= 0:
                break
            row, position = int(self._row[slot, index]), int(self._position[slot, index])
            start, end = max(0, position - self.before), min(len(self._rows[row]), position + self.after + 1)
            window = self._inputs[row][start:end].float()
            hook = self.sae.cfg.hooks_in[0]
            activations = self.sae.features({hook: window.to(self._device())})[:, index].float().cpu()
            activations[position - start] = peak
            tokens = self._rows[row][start:end].tolist()
            contexts.append(Context(tokens, token_texts(tokens), [round(value, 4) for value in activations.tolist()], position - start))
        return Feature(index, float(self.density()[index]), float(self._peaks[0, index]), contexts)

    def _device(self) -> torch.device:
        return next(self.sae.parameters()).device


def find_features(sae: SparseDictionary, stream: Iterable[dict[str, Any]], n_tokens: int, n_contexts: int = 5) -> FeatureFinder:
    """Run a `FeatureFinder` over a 2D stream until it has seen `n_tokens` kept tokens or the stream ends."""
    finder = FeatureFinder(sae, n_contexts)
    for batch in stream:
        finder.add(batch)
        if finder.n_tokens >= n_tokens:
            break
    return finder


def pick(finder: FeatureFinder, n: int, lowest: float = 2e-4, highest: float = 1e-2) -> list[int]:
    """A handful of latents worth a first look, spread evenly over the range of densities, rarest first.

    Only latents that fire on between `lowest` and `highest` of the tokens are considered, and among neighbours in density the one whose
    contexts agree best on the token at the peak is taken: it is a sample for the eye and no measure of quality.
    """
    density = finder.density()
    alive = ((density >= lowest) & (density <= highest) & (finder._peaks[-1] > 0)).nonzero().flatten()
    if len(alive) == 0:
        return density.argsort(descending=True)[:n].tolist()
    ordered = alive[density[alive].argsort()]
    chosen = []
    for group in ordered.tensor_split(min(n, len(ordered))):
        chosen.append(max(group.tolist(), key=lambda index: (_agreement(finder, index), float(finder._peaks[0, index]))))
    return chosen


def _agreement(finder: FeatureFinder, index: int) -> int:
    peaks = [int(finder._rows[int(row)][int(position)]) for row, position in zip(finder._row[:, index], finder._position[:, index], strict=True)]
    return max(peaks.count(token) for token in peaks)
