"""The contexts in which each latent fires hardest.

One pass over a 2D stream: a batch's codes are reduced to the peak of every latent in every row, and merged into a running list of the best
rows per latent. Nothing of size latents x tokens is kept. The windows of tokens around the peaks are cut at the end, for the latents asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

if TYPE_CHECKING:
    from lm_saes.models.sparse_dictionary import SparseDictionary

SPARE = 4
"""Candidates kept for each context that is shown, so that repetitions can be passed over."""
ALIKE = 4
"""Two contexts are the same when they agree on this many tokens up to and including the peak."""


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
        """The feature that `as_dict` wrote.

        Raises:
            ValueError: it is something else.
        """
        feature = TypeAdapter(cls).validate_python(table)
        if any(not len(one.texts) == len(one.activations) > one.peak >= 0 for one in feature.contexts):
            raise ValueError("contexts need an activation for each token, and a peak among them")
        return feature


class FeatureFinder:
    """Collects the strongest contexts of every latent from 2D batches.

    Args:
        sae: The dictionary, in eval mode; it is given raw activations.
        n_contexts: Rows kept per latent.
        before, after: Tokens of a window before and after the peak.
    """

    def __init__(self, sae: SparseDictionary, n_contexts: int = 5, before: int = 24, after: int = 8):
        self.sae, self.n_contexts, self.before, self.after = sae, n_contexts, before, after
        n_latents, kept = sae.cfg.d_sae, SPARE * n_contexts
        self.counts = torch.zeros(n_latents, dtype=torch.int64)
        self.n_tokens = 0
        self._peaks = torch.zeros(kept, n_latents)
        self._row = torch.full((kept, n_latents), -1, dtype=torch.int64)
        self._position = torch.zeros(kept, n_latents, dtype=torch.int64)
        self._rows: list[torch.Tensor] = []  # token ids of every row seen; a few bytes a token
        self._spans: list[Sequence[tuple[str, int, int]]] = []  # the documents that each row is made of
        self._inputs: list[torch.Tensor] = []  # its input activations in two bytes, to recompute the codes of the chosen windows
        self._masks: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, batch: dict[str, Any]) -> None:
        """Take one 2D batch: hook points `[B, S, D]`, `tokens` and `mask` `[B, S]`."""
        hook = self.sae.cfg.hooks_in[0]
        spans = [meta.get("spans", []) for meta in batch.get("meta", [{}] * len(batch["tokens"]))]
        for tokens, mask, x, of_row in zip(batch["tokens"], batch["mask"], batch[hook], spans, strict=True):
            codes = self.sae.features({hook: x}).float().masked_fill(~mask[:, None], 0)  # row by row: [S, F] is the largest thing there is
            self.counts += (codes > 0).sum(0).cpu()
            self.n_tokens += int(mask.sum())
            self._merge(*(best.cpu() for best in codes.max(0)))
            self._rows.append(tokens.cpu())
            self._masks.append(mask.cpu())
            self._spans.append(of_row)
            half = x.half()  # more exact than bfloat16, where it is wide enough
            self._inputs.append((half if half.isfinite().all() else x.bfloat16()).cpu())

    def _merge(self, peaks: torch.Tensor, positions: torch.Tensor) -> None:
        """Let the row that comes next take the place of each latent's weakest candidate, where it is stronger."""
        weakest, place = self._peaks.min(0)
        better = (peaks > weakest).nonzero().flatten()
        place = place[better]
        self._peaks[place, better] = peaks[better]
        self._row[place, better] = len(self._rows)
        self._position[place, better] = positions[better]

    def density(self) -> torch.Tensor:
        """Share of tokens on which each latent fired, `[F]`."""
        return self.counts.double() / max(1, self.n_tokens)

    def contexts(self, index: int) -> list[tuple[int, int, float]]:
        """(row, position, activation) of a latent's strongest peaks, strongest first, without repetitions of the same few tokens."""
        found: list[tuple[int, int, float]] = []
        seen: set[tuple[int, ...]] = set()
        for candidate in self._peaks[:, index].argsort(descending=True, stable=True).tolist():
            row, position, peak = int(self._row[candidate, index]), int(self._position[candidate, index]), float(self._peaks[candidate, index])
            if peak <= 0 or len(found) == self.n_contexts:
                break
            ending = tuple(self._rows[row][max(0, position + 1 - ALIKE) : position + 1].tolist())
            if ending not in seen:
                seen.add(ending)
                found.append((row, position, peak))
        return found

    @torch.no_grad()
    def feature(self, index: int, token_texts: Callable[[list[int]], list[str]]) -> Feature:
        """The record of one latent; `token_texts` says what to print for each of a row's ids (`LanguageModel.token_texts`)."""
        contexts = []
        hook = self.sae.cfg.hooks_in[0]
        for row, position, peak in self.contexts(index):
            start, end = max(0, position - self.before), min(len(self._rows[row]), position + self.after + 1)
            x = self._inputs[row][start:end].float().to(self._device())
            activations = self.sae.features({hook: x})[:, index].float().cpu().masked_fill(~self._masks[row][start:end], 0)
            activations[position - start] = peak
            tokens = self._rows[row][start:end].tolist()
            contexts.append(Context(tokens, token_texts(tokens), [round(value, 4) for value in activations.tolist()], position - start))
        return Feature(index, float(self.density()[index]), self.max_activation(index), contexts)

    def max_activation(self, index: int) -> float:
        """The largest activation of a latent; 0 if it never fired."""
        return float(self._peaks[:, index].max())

    def peak_tokens(self, index: int) -> list[int]:
        """The ids at a latent's peaks."""
        return [int(self._rows[row][position]) for row, position, _ in self.contexts(index)]

    def sources(self, index: int) -> set[str]:
        """Where a latent's contexts come from: their documents, or the top folders of documents that are files in folders."""
        found = set()
        for row, position, _ in self.contexts(index):
            name = next((name for name, start, end in self._spans[row] if start <= position < end), "")
            found.add(name.partition("/")[0])
        return found

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

    Only latents that fire on between `lowest` and `highest` of the tokens are considered; among neighbours in density the one is taken whose
    contexts come from the most places and then agree best on the token at the peak. A sample for the eye, and no measure of quality.
    """
    density = finder.density()
    alive = ((density >= lowest) & (density <= highest)).nonzero().flatten()
    ordered = [index for index in alive[density[alive].argsort()].tolist() if len(finder.contexts(index)) == finder.n_contexts]
    if not ordered:
        return density.argsort(descending=True)[:n].tolist()
    chosen, tokens = [], set()
    for group in torch.tensor(ordered).tensor_split(min(n, len(ordered))):
        fresh = [index for index in group.tolist() if finder.peak_tokens(index)[0] not in tokens] or group.tolist()
        best = max(fresh, key=lambda index: (len(finder.sources(index)), _agreement(finder.peak_tokens(index)), finder.max_activation(index)))
        chosen.append(best)
        tokens.update(finder.peak_tokens(best))
    return chosen


def _agreement(tokens: list[int]) -> int:
    return max(tokens.count(token) for token in tokens)
