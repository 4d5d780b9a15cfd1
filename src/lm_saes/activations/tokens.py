"""Documents → rows of token ids.

Packing (causal models): the documents of a source run on, one behind the other, with the model's separator between them, and are cut into
rows that are full; each row begins with the BOS token if the model has one and is asked to prepend it. Attention crosses documents, as it
did when the model was pre-trained. What is left at the end and does not fill a row is dropped and counted.

Without packing: one row per document, begun with BOS, cut at the context size (the cut tokens are counted), padded on the right.

Encoder models: one piece of a document per row, between the model's own begin and end tokens (CLS and SEP; `prepend_bos` is for causal models),
padded on the right; with packing a long document goes on in the next row, without it the rest is cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lm_saes.activations.documents import Document, DocumentStream
from lm_saes.activations.stream import State, nested, part

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel


class Tokens(NamedTuple):
    """B rows of S token ids."""

    ids: Int[Tensor, "B S"]
    attention_mask: Bool[Tensor, "B S"]
    """Positions that hold a token (all of them, where documents are packed)."""
    special: Bool[Tensor, "B S"]
    """BOS, separators, CLS and SEP, and every other token that the tokenizer calls special."""
    meta: list[dict[str, Any]]
    """Per row: `dataset_name`, the dataset's metadata, and `spans`: (document, first position, position after the last) for each piece of text."""


class Row(NamedTuple):
    """One row before padding."""

    ids: list[int]
    added: list[int]
    """Positions of the tokens that are not text."""
    spans: list[tuple[str, int, int]]


class TokenRows(ABC):
    """Rows of one source, `rows_per_item` at a time (fewer in the last item). `counts` holds the tokens that never reach a row."""

    def __init__(
        self, documents: DocumentStream, model: LanguageModel, context_size: int, rows_per_item: int, prepend_bos: bool, meta: Mapping[str, Any]
    ) -> None:
        self.documents = documents
        self._model, self._context_size, self._rows_per_item, self._meta = model, context_size, rows_per_item, dict(meta)
        self._bos = [model.bos_token_id] if prepend_bos and model.bos_token_id is not None else []
        self._special_ids = torch.tensor(sorted(model.special_token_ids), dtype=torch.int64)
        self._padding_id = next((token for token in (model.pad_token_id, model.eos_token_id) if token is not None), 0)
        self.counts = {"partial_row": 0, "cut": 0}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tokens:
        rows: list[Row] = []
        while len(rows) < self._rows_per_item and (row := self._row()) is not None:
            rows.append(row)
        if not rows:
            raise StopIteration
        return self._tokens(rows)

    @abstractmethod
    def _row(self) -> Row | None:
        """The next row, None when the documents are used up."""

    @abstractmethod
    def _waiting(self) -> State:
        """The tokens that were read and stand in no row yet."""

    @abstractmethod
    def _load_waiting(self, state: Mapping[str, Any]) -> None: ...

    def state_dict(self) -> State:
        return {"counts": dict(self.counts), **nested("waiting", self._waiting()), **nested("documents", self.documents.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = dict(state["counts"])
        self._load_waiting(part("waiting", state))
        self.documents.load_state_dict(part("documents", state))

    def _text_ids(self, document: Document) -> list[int]:
        if document.ids is None:
            return list(self._model.tokenize(document.text).ids)
        bos = len(self._bos)
        return document.ids[bos:] if bos and document.ids[:bos] == self._bos else document.ids  # the BOS is put in here, once

    def _tokens(self, rows: list[Row]) -> Tokens:
        shape = (len(rows), self._context_size)
        ids = torch.full(shape, self._padding_id, dtype=torch.int64)
        attention_mask, added = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.int64)
            attention_mask[index, : len(row.ids)] = True
            added[index, row.added] = True
        special = (added | torch.isin(ids, self._special_ids)) & attention_mask
        return Tokens(ids, attention_mask, special, [{**self._meta, "spans": row.spans} for row in rows])


class _Piece(NamedTuple):
    """Tokens that stand in no row yet."""

    name: str | None
    """Their document; the separator belongs to none."""
    ids: list[int]
    start: int
    """The first that is left. (Cutting the others off would take time that grows with the square of a long document.)"""


class PackedRows(TokenRows):
    """Full rows of running text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._separator = list(self._model.separator_ids)
        self._begun = False
        self._pieces: deque[_Piece] = deque()

    def _row(self) -> Row | None:
        ids, added = list(self._bos), list(range(len(self._bos)))
        spans: list[tuple[str, int, int]] = []
        while len(ids) < self._context_size:
            if not self._pieces and not self._read():
                self.counts["partial_row"] += len(ids) - len(self._bos)
                return None
            name, piece, start = self._pieces.popleft()
            if name is None and self._bos and len(ids) == len(self._bos):
                continue  # the row's BOS separates already
            end = start + self._context_size - len(ids)
            taken = piece[start:end]
            if end < len(piece):
                self._pieces.appendleft(_Piece(name, piece, end))
            if name is None:
                added.extend(range(len(ids), len(ids) + len(taken)))
            elif spans and spans[-1][0] == name and spans[-1][2] == len(ids):
                spans[-1] = (name, spans[-1][1], len(ids) + len(taken))  # the next piece of the same long document
            else:
                spans.append((name, len(ids), len(ids) + len(taken)))
            ids.extend(taken)
        return Row(ids, added, spans)

    def _read(self) -> bool:
        """Put the next document's tokens behind the pieces, after a separator if it is not the first."""
        for document in self.documents:
            if ids := self._text_ids(document):
                if self._begun and document.first and self._separator:
                    self._pieces.append(_Piece(None, self._separator, 0))
                self._pieces.append(_Piece(document.name, ids, 0))
                self._begun = True
                return True
        return False

    def _waiting(self) -> State:
        rest = [piece.ids[piece.start :] for piece in self._pieces]
        ids = torch.tensor([token for tokens in rest for token in tokens], dtype=torch.int64)
        return {"begun": self._begun, "names": [piece.name for piece in self._pieces], "lengths": [len(tokens) for tokens in rest], "ids": ids}

    def _load_waiting(self, state: Mapping[str, Any]) -> None:
        pieces = [piece.tolist() for piece in torch.split(state["ids"], state["lengths"])] if state["lengths"] else []
        self._begun = state["begun"]
        self._pieces = deque(_Piece(name, piece, 0) for name, piece in zip(state["names"], pieces, strict=True))


class SeparateRows(TokenRows):
    """Rows that hold tokens of one document only. `end`: tokens that close each row; `goes_on`: a long document fills several rows."""

    def __init__(self, *args: Any, end: list[int], goes_on: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._end, self._goes_on = end, goes_on
        self._name, self._ids, self._start = "", list[int](), 0  # of the document that is being cut into rows: its tokens, the first that is left

    def _row(self) -> Row | None:
        while self._start == len(self._ids):
            document = next(self.documents, None)
            if document is None:
                return None
            self._name, self._ids, self._start = document.name, self._text_ids(document), 0
            if not document.first and not self._goes_on:
                self._cut()
        begin = len(self._bos)
        room = self._context_size - begin - len(self._end)
        body = self._ids[self._start : self._start + room]
        self._start += len(body)
        if not self._goes_on:
            self._cut()
        end = begin + len(body)
        ids = self._bos + body + self._end
        return Row(ids, [*range(begin), *range(end, len(ids))], [(self._name, begin, end)])

    def _text_ids(self, document: Document) -> list[int]:
        ids = super()._text_ids(document)
        closed = document.ids is not None and self._end and ids[-len(self._end) :] == self._end
        return ids[: -len(self._end)] if closed else ids

    def _cut(self) -> None:
        self.counts["cut"] += len(self._ids) - self._start
        self._start = len(self._ids)

    def _waiting(self) -> State:
        return {"name": self._name, "ids": torch.tensor(self._ids[self._start :], dtype=torch.int64)}

    def _load_waiting(self, state: Mapping[str, Any]) -> None:
        self._name, self._ids, self._start = state["name"], state["ids"].tolist(), 0


def token_rows(
    documents: DocumentStream,
    model: LanguageModel,
    *,
    context_size: int,
    rows_per_item: int = 1,
    packing: bool = True,
    prepend_bos: bool = True,
    meta: Mapping[str, Any],
) -> TokenRows:
    """The rows of one source in the form that suits the model: packed, one document each, or (encoders) one document piece each."""
    shared = (documents, model, context_size, rows_per_item, prepend_bos or not model.is_causal, meta)
    if not model.is_causal:
        return SeparateRows(*shared, end=[model.eos_token_id] if model.eos_token_id is not None else [], goes_on=packing)
    return PackedRows(*shared) if packing else SeparateRows(*shared, end=[], goes_on=False)


def restored_meta(meta: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Meta that went through JSON, with its spans as tuples again."""
    return [{**row, "spans": [tuple(span) for span in row["spans"]]} for row in meta]
