"""Documents are read once each, in an order that the seed decides, and a stream goes on where it was saved."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.activations.documents import Documents, DocumentStream, JoinedDocuments, ListedDocuments, ShardOfDocuments, StreamedTable
from lm_saes.activations.text import as_documents
from lm_saes.errors import DataError

TEXTS = [f"document {index} " + "word " * index for index in range(7)]


def stream(texts: list[Any], seed: int = 0, **options: Any) -> DocumentStream:
    return DocumentStream(ListedDocuments("x", texts), seed, **options)


def test_each_document_once_in_an_order_of_the_seed() -> None:
    first, again, other = (list(stream(TEXTS, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(document.text for document in first) == sorted(document.text for document in other) == sorted(TEXTS)
    assert [document.text for document in first] != TEXTS
    assert all(document.name == f"x[{TEXTS.index(document.text)}]" for document in first)


def test_it_ends_and_stays_ended() -> None:
    documents = stream(["a"])
    assert len(list(documents)) == 1
    assert list(documents) == []


def test_empty_and_broken_documents_are_counted() -> None:
    documents = stream(["a", "", "  \n", None, "lone \ud800 surrogate"])
    texts = [document.text for document in documents]
    assert documents.counts == {"documents": 5, "empty_documents": 3, "invalid_utf8_documents": 1}
    assert sorted(texts) == ["a", "lone � surrogate"]


def test_surrogate_pairs_become_the_character() -> None:
    assert next(stream(["\ud83d\ude00"])).text == "😀"


@given(lines=st.lists(st.text("ab c", max_size=12), min_size=1, max_size=6), limit=st.integers(1, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_pieces_join_to_the_document(lines: list[str], limit: int) -> None:
    text = "x" + "\n".join(lines)
    pieces = list(stream([text], piece_characters=limit))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert all(0 < len(piece.text) <= limit for piece in pieces)


def test_pieces_end_after_lines_else_words() -> None:
    assert [piece.text for piece in stream(["ab\ncd\nef gh ij"], piece_characters=7)] == ["ab\ncd\n", "ef gh", " ij"]


def iterable(texts: list[str]) -> StreamedTable:
    import datasets

    documents, _ = as_documents("x", datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=2))
    assert isinstance(documents, StreamedTable)
    return documents


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("cut", range(0, 19, 3))
def test_resumed_equals_uninterrupted(streamed: bool, cut: int) -> None:
    texts = [*TEXTS, ""]
    make = (lambda: DocumentStream(iterable(texts), piece_characters=11)) if streamed else (lambda: stream(texts, 3, piece_characters=11))
    whole = make()
    for _ in range(cut):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    expected = list(whole)
    for resumed in (make(), whole):  # a new stream, and one that has moved on
        resumed.load_state_dict(state)
        assert list(resumed) == expected
        assert resumed.counts == whole.counts


def test_streams_over_one_streamed_table_do_not_share_a_position() -> None:
    table = iterable(TEXTS)
    first, second = DocumentStream(table), DocumentStream(table)
    next(first)
    first.load_state_dict(first.state_dict())
    next(first)
    assert [document.text for document in second] == TEXTS


def test_resuming_with_another_text_is_an_error() -> None:
    state = stream(TEXTS).state_dict()
    with pytest.raises(DataError, match="7 documents when the run was saved, 6 now"):
        stream(TEXTS[:6]).load_state_dict(state)


@given(lengths=st.lists(st.integers(0, 4), max_size=5))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_joined_documents_are_the_parts_in_order(lengths: list[int]) -> None:
    parts: list[Documents] = [ListedDocuments(f"p{index}", [f"{index}-{n}" for n in range(length)]) for index, length in enumerate(lengths)]
    joined = JoinedDocuments(parts)
    assert [document.text for document in joined] == [document.text for part in parts for document in part]
    with pytest.raises(IndexError):
        joined[len(joined)]


def test_shards_are_disjoint_and_whole() -> None:
    whole = ListedDocuments("x", TEXTS)
    shards = [[document.text for document in ShardOfDocuments(whole, index, 3)] for index in range(3)]
    assert sorted(itertools.chain(*shards)) == sorted(TEXTS)
    assert [len(shard) for shard in shards] == [3, 2, 2]
