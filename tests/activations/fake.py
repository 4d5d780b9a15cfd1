"""A language model one can see through: bytes are tokens, activations are an embedding plus a running mean of what the row held so far."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lm_saes.config import LanguageModelConfig
from lm_saes.errors import HookPointError
from lm_saes.lm.language_model import LanguageModel, TokenizedText

BOS, EOS, PAD, WIDTH = 256, 257, 258, 6
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


class FakeLanguageModel(LanguageModel):
    """`scale[token]` multiplies the activations of a token at the second hook point. `calls` lists the shapes that were run."""

    def __init__(
        self, *, bos: int | None = BOS, eos: int | None = EOS, pad: int | None = PAD, causal: bool = True, context: int = 64, **cfg: Any
    ) -> None:
        self.cfg = LanguageModelConfig(model_name="fake", **cfg)
        self.device = torch.device("cpu")
        self.tokenizer = SimpleNamespace()
        self.d_model, self.n_layers, self.is_causal, self.max_context = WIDTH, 2, causal, context
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad
        self.special_token_ids = frozenset(token for token in (bos, eos, pad) if token is not None)
        self.embedding = torch.randn(259, WIDTH, generator=torch.Generator().manual_seed(5))
        self.embedding /= self.embedding.norm(dim=1, keepdim=True)
        self.scale = torch.ones(259)
        self.calls: list[tuple[int, ...]] = []
        self.masks: list[Tensor | None] = []

    def tokenize(self, text: str) -> TokenizedText:
        ids = list(text.encode("utf-8"))
        return TokenizedText(ids, [(0, 0)] * len(ids))

    def hook_width(self, hook_point: str) -> int:
        if hook_point not in HOOKS:
            raise HookPointError(f"no hook point '{hook_point}'")
        return WIDTH

    def capture(self, ids: Tensor, attention_mask: Tensor | None, hook_points: Any) -> dict[str, Tensor]:
        self.calls.append(tuple(ids.shape))
        self.masks.append(attention_mask)
        embedded = self.embedding[ids]
        mean = embedded.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[None, :, None]
        values = {HOOKS[0]: embedded, HOOKS[1]: (embedded + 0.1 * mean) * self.scale[ids][..., None]}
        return {hook: values[hook] for hook in hook_points}

    def logits(self, ids: Any, attention_mask: Any = None, edits: Any = None) -> Tensor:
        raise AssertionError("streams never ask for logits")

    def provenance(self) -> dict[str, Any]:
        return {"model_name": "fake"}
