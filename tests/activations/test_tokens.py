"""Rows: what is packed, padded and cut, what is marked special, and that resumption is exact."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.activations.documents import DocumentStream, ListedDocuments
from lm_saes.activations.tokens import TokenRows, Tokens, token_rows
from tests.activations.fake import BOS, EOS, PAD, FakeLanguageModel

texts_strategy = st.lists(st.text("abcde", min_size=1, max_size=25), min_size=1, max_size=8)


def rows_of(
    texts: list[Any], model: FakeLanguageModel | None = None, *, context_size: int = 8, piece: int = 10**6, tokenized: bool = False, **options: Any
) -> TokenRows:
    documents = DocumentStream(ListedDocuments("d", texts, tokenized), piece_characters=piece)
    return token_rows(documents, model or FakeLanguageModel(), context_size=context_size, meta={"dataset_name": "d"}, **options)


def in_order(texts: list[str]) -> list[str]:
    return [document.text for document in DocumentStream(ListedDocuments("d", texts))]


def flat(items: list[Tokens]) -> list[list[int]]:
    return [row for item in items for row in item.ids.tolist()]


def same(one: list[Tokens], other: list[Tokens]) -> bool:
    return len(one) == len(other) and all(
        all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "attention_mask", "special")) and a.meta == b.meta
        for a, b in zip(one, other, strict=True)
    )


@given(texts=texts_strategy, context_size=st.integers(2, 12), rows_per_item=st.integers(1, 3), piece=st.integers(3, 30), bos=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_packed_rows_are_the_documents_one_behind_the_other(texts: list[str], context_size: int, rows_per_item: int, piece: int, bos: bool) -> None:
    rows = rows_of(texts, context_size=context_size, rows_per_item=rows_per_item, piece=piece, prepend_bos=bos)
    items = list(rows)
    assert all(bool(item.attention_mask.all()) for item in items)
    assert all(len(item.ids) == rows_per_item for item in items[:-1])
    packed = flat(items)
    if bos:
        assert all(row[0] == BOS for row in packed)
    text = bytes(token for row in packed for token in row if token < 256).decode()
    joined = "".join(in_order(texts))
    n_separators = sum(row.count(EOS) for row in packed)
    assert joined.startswith(text)
    assert n_separators <= len(texts) - 1
    # every token of the text is in a row or counted as the partial row, separators included unless a BOS took their place
    left = len(joined) - len(text)
    assert left <= rows.counts["partial_row"] <= left + len(texts) - 1 - n_separators
    assert rows.counts["partial_row"] < context_size
    assert rows.counts["cut"] == 0


def test_a_packed_row_by_hand() -> None:
    first, second = in_order(["aaaaa", "bbb"])
    rows = rows_of(["aaaaa", "bbb"], context_size=4)
    letters = [ord(letter) for letter in (first + "|" + second)]
    letters[len(first)] = EOS
    assert flat(list(rows)) == [[BOS, *letters[start : start + 3]] for start in (0, 3, 6)]
    (item,) = rows_of(["aaaaa", "bbb"], context_size=10)
    assert item.meta[0]["spans"][0][1:] == (1, 1 + len(first))
    assert item.meta[0]["spans"][1][1:] == (2 + len(first), 10)
    assert item.special[0].nonzero().flatten().tolist() == [0, 1 + len(first)]


def test_a_separator_is_not_put_behind_the_bos() -> None:
    packed = flat(list(rows_of(["aaa", "bbb", "ccc"], context_size=4)))
    assert sorted(packed) == [[BOS, *[ord(letter)] * 3] for letter in "abc"]
    without = flat(list(rows_of(["aaa", "bbb", "ccc"], context_size=4, prepend_bos=False)))
    assert without[0][3] == EOS


def test_models_without_bos_or_separator() -> None:
    rows = rows_of(["aaaa", "bbbb"], FakeLanguageModel(bos=None, eos=None, pad=None), context_size=4)
    assert sorted(flat(list(rows))) == [[97] * 4, [98] * 4]


@given(texts=texts_strategy, context_size=st.integers(3, 12), causal=st.booleans(), packing=st.booleans(), piece=st.integers(3, 30))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_spans_lead_back_to_the_text(texts: list[str], context_size: int, causal: bool, packing: bool, piece: int) -> None:
    model = FakeLanguageModel(causal=causal)
    where: dict[str, int] = {}
    rows = rows_of(texts, model, context_size=context_size, packing=packing, piece=piece)
    n_text = 0
    for item in rows:
        for ids, special, attention_mask, meta in zip(item.ids, item.special, item.attention_mask, item.meta, strict=True):
            covered = torch.zeros(context_size, dtype=torch.bool)
            for name, start, end in meta["spans"]:
                text, offset = texts[int(name[2:-1])], where.get(name, 0)
                assert bytes(ids[start:end].tolist()).decode() == text[offset : offset + end - start]
                where[name] = offset + end - start
                covered[start:end] = True
                n_text += end - start
            assert torch.equal(covered, attention_mask & ~special)
            assert bool((ids[~attention_mask] == PAD).all())
    lost = rows.counts["cut"] + rows.counts["partial_row"]
    total = sum(map(len, texts))
    assert n_text + lost >= total
    if not (causal and packing):
        assert n_text + lost == total


def test_without_packing_a_document_is_cut_and_padded() -> None:
    rows = rows_of(["a" * 20, "b"], packing=False, rows_per_item=2)
    (item,) = rows
    lengths = sorted(item.attention_mask.sum(1).tolist())
    assert lengths == [2, 8]
    assert rows.counts == {"partial_row": 0, "cut": 13}


def test_encoder_rows_have_begin_and_end_tokens_and_long_documents_go_on() -> None:
    rows = flat(list(rows_of(["abcdefgh"], FakeLanguageModel(causal=False), context_size=5, prepend_bos=False)))
    assert rows == [[BOS, *b"abc", EOS], [BOS, *b"def", EOS], [BOS, *b"gh", EOS, PAD]]


def test_padding_is_known_by_position_not_by_id() -> None:
    model = FakeLanguageModel(bos=EOS, eos=EOS, pad=EOS)
    (item,) = rows_of(["ab"], model, context_size=5, packing=False)
    assert item.ids.tolist() == [[EOS, 97, 98, EOS, EOS]]
    assert item.attention_mask.tolist() == [[True, True, True, False, False]]
    assert item.special.tolist() == [[True, False, False, False, False]]


def test_only_the_added_tokens_are_special_when_bos_is_an_ordinary_token() -> None:
    model = FakeLanguageModel(bos=97)
    model.special_token_ids = frozenset({EOS})
    (item,) = rows_of(["aaa"], model, context_size=4)
    assert item.special.tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("causal", [True, False])
def test_tokenised_documents_get_one_bos(causal: bool) -> None:
    end = [] if causal else [EOS]
    tokens = [[BOS, 1, 2, *end], [1, 2]]
    rows = rows_of(tokens, FakeLanguageModel(causal=causal), context_size=5, packing=False, tokenized=True)
    assert flat(list(rows)) == [[BOS, 1, 2, *end, *[PAD] * (2 - len(end))]] * 2


def test_special_tokens_of_tokenised_documents_are_special() -> None:
    (item,) = rows_of([[1, EOS, 2]], context_size=4, packing=False, tokenized=True)
    assert item.special.tolist() == [[True, False, True, False]]


@given(texts=texts_strategy, causal=st.booleans(), packing=st.booleans(), piece=st.integers(3, 30), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_resumed_equals_uninterrupted(texts: list[str], causal: bool, packing: bool, piece: int, seed: int) -> None:
    def make() -> TokenRows:
        return rows_of(texts, FakeLanguageModel(causal=causal), context_size=5, packing=packing, piece=piece, rows_per_item=2)

    n_items = len(list(make()))
    whole = make()
    for _ in range(random.Random(seed).randint(0, n_items)):
        next(whole)
    state = whole.state_dict()
    rest = list(whole)
    resumed = make()
    resumed.load_state_dict(state)
    assert same(list(resumed), rest)
    assert resumed.counts == whole.counts
