"""What the rest of the library asks of a language model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm_saes.config import LanguageModelConfig
from lm_saes.errors import DataError, LanguageModelError, LmSaesError
from lm_saes.lm import tokenization
from lm_saes.lm.tokenization import TokenizedText

Span = tuple[int, int]
Edit = Callable[[Tensor], Tensor]


class _Rows(NamedTuple):
    """Raw texts as padded rows."""

    ids: Tensor
    attention_mask: Tensor
    spans: list[list[Span | None]]


class MLP(NamedTuple):
    """The MLP of one layer as a function."""

    hook_in: str
    """Hook point of what it reads."""
    hook_out: str
    """Hook point of what it gives."""
    neurons: Tensor | None
    """[M, D]: the direction that each hidden neuron (with a gated MLP: its gate) reads; None for a mixture of experts."""
    respond: Callable[[Tensor], Tensor]
    """[N, D] -> [N, D]: what it gives for rows of its input, in float32 on the rows' device."""


@contextmanager
def forward_errors(name: str, ids: Tensor) -> Iterator[None]:
    """What a forward raises on rows of ids, in one line.

    Raises:
        LanguageModelError: whatever it was; the cause is kept.
    """
    try:
        yield
    except LmSaesError:
        raise
    except Exception as error:  # code of a model may raise anything
        rows, positions = ids.shape
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)
        fix = "lower model_batch_size or context_size" if out_of_memory else "what was written before is kept; run again to go on (train: --resume)"
        what = "ran out of memory" if out_of_memory else f"failed ({type(error).__name__}: {str(error)[:300]})"
        raise LanguageModelError(f"the language model {name} {what} on {rows} rows of {positions} tokens; {fix}") from error


class LanguageModel(ABC):
    """A language model: text to tokens, tokens to the activations inside.

    Letters: B rows, S positions, W width of a hook point, V vocabulary.
    """

    cfg: LanguageModelConfig
    tokenizer: Any
    device: torch.device
    d_model: int
    n_layers: int
    is_causal: bool
    max_context: int
    """Most tokens in one row, BOS included: the configured `max_length`, or the model's own limit if that is smaller."""

    def __init__(self, cfg: LanguageModelConfig, tokenizer: Any) -> None:
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.bos_token_id: int | None = _first_id(cfg.bos_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id)
        self.eos_token_id: int | None = _first_id(cfg.eos_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id)
        self.pad_token_id: int | None = _first_id(cfg.pad_token_id, tokenizer.pad_token_id)
        chosen = {self.bos_token_id, self.eos_token_id, self.pad_token_id} - {None}
        self.special_token_ids: frozenset[int] = tokenization.special_ids(tokenizer) | frozenset(index for index in chosen if index is not None)

    # ------------------------------------------------------------------------------------------ tokens

    @property
    def separator_ids(self) -> list[int]:
        """What stands between packed documents: the EOS token, else the BOS token, else nothing."""
        separator = _first_id(self.eos_token_id, self.bos_token_id)
        return [] if separator is None else [separator]

    def tokenize(self, text: str) -> TokenizedText:
        """Ids of a text of any length and the characters each stands for; no special tokens are added.

        Raises:
            LanguageModelError: the tokenizer cannot say where its tokens are.
        """
        return tokenization.tokenize(self.tokenizer, text)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """What to print for each token; joined they are the text. Of a character cut into several tokens the first shows it, the others are empty."""
        return tokenization.texts(self.tokenizer, ids)

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer."""
        return tokenization.fingerprint(self.tokenizer)

    # ------------------------------------------------------------------------------------------ the model

    @abstractmethod
    def hook_width(self, hook_point: str) -> int:
        """Width of the activations at a hook point.

        Raises:
            HookPointError: no such hook point; the message lists near ones.
        """

    @abstractmethod
    def capture(
        self, ids: Int[Tensor, "B S"], attention_mask: Bool[Tensor, "B S"] | Int[Tensor, "B S"] | None, hook_points: Sequence[str]
    ) -> dict[str, Tensor]:
        """Activations `{hook point: [B, S, W]}`, without gradient. The forward stops after the deepest hook.

        Raises:
            HookPointError: a hook point that the model does not have.
            LanguageModelError: the row is longer than the model's context.
        """

    @abstractmethod
    def logits(
        self,
        ids: Int[Tensor, "B S"],
        attention_mask: Bool[Tensor, "B S"] | Int[Tensor, "B S"] | None = None,
        edits: Mapping[str, Edit] | None = None,
    ) -> Float[Tensor, "B S V"]:
        """Logits of the whole forward, without gradient, with the activations at each hook point in `edits` replaced by the function of them.
        Encoder models have none: their final hidden state `[B, S, d_model]` is returned instead."""

    def mlp(self, layer: int) -> MLP:  # noqa: ARG002
        """The MLP of a layer, to be asked what it answers to vectors of one's own.

        Raises:
            HookPointError: there is no such layer.
            LanguageModelError: this kind of language model cannot take its MLPs apart.
        """
        raise LanguageModelError(f"{type(self).__name__} does not show its MLPs; use the Hugging Face backend")

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """What identifies the model in a saved dictionary: JSON-ready."""

    # ------------------------------------------------------------------------------------------ raw text

    def preprocess_raw_data(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """`{"text": [...], "meta": [...]}` made complete: one text becomes a list of one, absent `meta` becomes empty dicts.

        Raises:
            DataError: no texts, or `meta` of another length.
        """
        texts = raw.get("text")
        texts = [texts] if isinstance(texts, str) else list(texts or [])
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError("raw data must be {'text': [one or more strings], 'meta': [...]}")
        meta = list(raw.get("meta") or ({} for _ in texts))
        if len(meta) != len(texts):
            raise DataError(f"'meta' must have one entry for each of the {len(texts)} texts, got {len(meta)}")
        return {**raw, "text": texts, "meta": meta}

    def trace(self, raw: Mapping[str, Any], n_context: int | None = None) -> list[list[Span | None]]:
        """For each row of `to_activations`, the characters `(start, end)` behind each position; None for special tokens and padding."""
        return self._rows(raw, n_context).spans

    def to_activations(self, raw: Mapping[str, Any], hook_points: Sequence[str], n_context: int | None = None) -> dict[str, Any]:
        """Activations of raw texts, one row each: `{hook point: [B, S, W], "tokens", "mask", "attention_mask"}` and `meta`.

        Rows begin with the BOS token where `prepend_bos` says so (encoder models: with their special tokens at both ends), are cut to `n_context`
        tokens (else to the model's longest) and padded on the right to `n_context` (else to the longest row).
        `mask` is false at padding and special tokens.
        """
        rows = self._rows(raw, n_context)
        special = torch.isin(rows.ids, torch.tensor(sorted(self.special_token_ids), dtype=torch.long))
        return {
            **self.capture(rows.ids, rows.attention_mask, hook_points),
            "tokens": rows.ids.to(self.device),
            "mask": (rows.attention_mask & ~special).to(self.device),
            "attention_mask": rows.attention_mask.to(self.device),
            "meta": self.preprocess_raw_data(raw)["meta"],
        }

    def _rows(self, raw: Mapping[str, Any], n_context: int | None) -> _Rows:
        limit = self.max_context if n_context is None else n_context
        if not 1 <= limit <= self.max_context:
            raise LanguageModelError(f"n_context must be between 1 and the model's longest context, {self.max_context}, got {limit}")
        bos = self.bos_token_id if self.cfg.prepend_bos or not self.is_causal else None
        front = [] if bos is None else [bos]
        back = [] if self.is_causal or self.eos_token_id is None else [self.eos_token_id]
        documents = [self.tokenize(text) for text in self.preprocess_raw_data(raw)["text"]]
        room = max(limit - len(front) - len(back), 0)
        rows = [[*front, *document.ids[:room], *back] for document in documents]
        spans: list[list[Span | None]] = [[*(None for _ in front), *document.spans[:room], *(None for _ in back)] for document in documents]
        longest = limit if n_context is not None else max(1, *(len(row) for row in rows))
        padding = _first_id(self.pad_token_id, self.eos_token_id, 0)
        ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows])
        for row in spans:
            row.extend([None] * (longest - len(row)))
        special = self.special_token_ids
        spans = [
            [None if token in special else span for token, span in zip(row, places, strict=True)]
            for row, places in zip(ids.tolist(), spans, strict=True)
        ]
        return _Rows(ids, torch.arange(longest)[None, :] < lengths[:, None], spans)


class TokenizerOnlyLanguageModel(LanguageModel):
    """A tokenizer without weights: for work on text that needs no activations.

    Raises:
        LanguageModelError: the tokenizer cannot be loaded.
    """

    def __init__(self, cfg: LanguageModelConfig) -> None:
        from lm_saes.lm.huggingface import load_tokenizer  # transformers is loaded when a model is

        super().__init__(cfg, load_tokenizer(cfg))
        self.device = torch.device("cpu")
        self.d_model = self.n_layers = 0
        self.is_causal = self.tokenizer.cls_token_id is None
        self.max_context = cfg.max_length

    def _no_weights(self, wanted: str) -> LanguageModelError:
        return LanguageModelError(f"{self.cfg.model_name} was loaded as a tokenizer only and has no activations ({wanted}); use backend='auto'")

    def hook_width(self, hook_point: str) -> int:
        raise self._no_weights(hook_point)

    def capture(self, ids: Tensor, attention_mask: Tensor | None, hook_points: Sequence[str]) -> dict[str, Tensor]:  # noqa: ARG002
        raise self._no_weights(", ".join(hook_points))

    def logits(self, ids: Tensor, attention_mask: Tensor | None = None, edits: Mapping[str, Edit] | None = None) -> Tensor:  # noqa: ARG002
        raise self._no_weights("logits")

    def provenance(self) -> dict[str, Any]:
        return {"model_name": self.cfg.model_name, "revision": self.cfg.revision, "tokenizer_hash": self.tokenizer_hash, "backend": "tokenizer_only"}


def _first_id(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)


def load_model(cfg: LanguageModelConfig) -> LanguageModel:
    """The language model that a configuration describes.

    Raises:
        LanguageModelError: it cannot be found, opened or run; the message names its page and what to do.
        DeviceError: the device does not exist here.
    """
    match cfg.backend:
        case "tokenizer_only":
            return TokenizerOnlyLanguageModel(cfg)
        case "transformer_lens":
            from lm_saes.lm.transformer_lens import TransformerLensLanguageModel

            return TransformerLensLanguageModel(cfg)
        case "huggingface" | "auto":
            from lm_saes.lm.huggingface import HuggingFaceLanguageModel

            return HuggingFaceLanguageModel(cfg)
