"""A causal language model, an encoder and dictionaries that are small enough to compute by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


class ToyModel:
    """ids -> embedding ("a") -> W_1 ("b") -> unembedding: each position sees itself only, so it is causal and closed forms are short."""

    def __init__(self, n_vocab: int = 7, d: int = 4, is_causal: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.randn(n_vocab, d, generator=generator)
        self.W_1 = torch.randn(d, d, generator=generator)
        self.W_U = torch.randn(d, n_vocab, generator=generator) if is_causal else torch.eye(d)
        self.is_causal = is_causal
        self.n_forwards = 0

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None, edits: dict[str, Callable[[Tensor], Tensor]] | None = None) -> Tensor:
        self.n_forwards += 1
        edits = edits or {}
        a = edits.get("a", lambda x: x)(self.embedding[ids])
        b = edits.get("b", lambda x: x)(a @ self.W_1)
        return b @ self.W_U

    def batch(self, ids: Tensor, mask: Tensor | None = None, attention_mask: Tensor | None = None) -> dict[str, Any]:
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        a = self.embedding[ids]
        return {
            "a": a,
            "b": a @ self.W_1,
            "tokens": ids,
            "mask": everywhere if mask is None else mask,
            "attention_mask": everywhere if attention_mask is None else attention_mask,
            "meta": [{} for _ in ids],
        }


@dataclass
class Hooks:
    hooks_in: list[str]
    hooks_out: list[str]


class ToyDictionary:
    """A dictionary given as two functions of the raw input rows."""

    def __init__(
        self, reconstruct: Callable[[Tensor], Tensor], codes: Callable[[Tensor], Any] = lambda x: x, hook_in: str = "a", hook_out: str = "a"
    ) -> None:
        self.cfg = Hooks([hook_in], [hook_out])
        self.training = True
        self._reconstruct, self._codes = reconstruct, codes
        self.modes: list[bool] = []

    def train(self, mode: bool = True) -> Self:
        self.training = mode
        return self

    def features_and_reconstruction(self, batch: dict[str, Any]) -> tuple[Any, Tensor]:
        self.modes.append(self.training)
        x = batch[self.cfg.hooks_in[0]]
        return self._codes(x), self._reconstruct(x)
