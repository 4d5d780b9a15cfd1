"""Spans that point at the text, and texts that join to it, for the three ways in which tokenizers write their pieces."""

from __future__ import annotations

import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lm_saes.errors import LanguageModelError
from lm_saes.lm import tokenization
from tests.lm.tiny_models import SENTENCES, byte_level_tokenizer, wordpiece_tokenizer

BYTES = byte_level_tokenizer()
WORDS = wordpiece_tokenizer()


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and U+2581 for spaces, as in Llama 2 and Gemma."""
    bytes_ = [AddedToken(f"<0x{byte:02X}>", special=False, normalized=False) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(token.content for token in bytes_)]
    alphabet = list("abcdefghijklmnopqrstuvwxyz.,▁")
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    # byte tokens are part of the vocabulary there, not added tokens
    table = json.loads(tokenizer.to_str())
    table["added_tokens"] = [token for token in table["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(table))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


PIECES = sentencepiece_tokenizer()


@given(st.text(max_size=40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_byte_level_texts_join_to_the_text_and_spans_cover_it(text: str) -> None:
    ids, spans = tokenization.tokenize(BYTES, text)
    texts = tokenization.texts(BYTES, ids)
    assert len(ids) == len(spans) == len(texts)
    assert "".join(texts) == text
    assert {index for start, end in spans for index in range(start, end)} == set(range(len(text)))
    for shown, (start, end) in zip(texts, spans, strict=True):
        assert shown in text[start:end]  # a token shows characters that it stands for


def test_a_character_cut_into_tokens_is_shown_once() -> None:
    ids, spans = tokenization.tokenize(BYTES, "x東🙂 y")
    texts = tokenization.texts(BYTES, ids)
    assert [text for text in texts if text.strip()] == ["x", "東", "🙂", "y"]
    first = texts.index("東")
    assert texts[first + 1] == ""
    assert spans[first] == spans[first + 1] == (1, 2)


def test_no_stand_ins_leak() -> None:
    ids = tokenization.tokenize(BYTES, "def f():\n    return 1\n\n\tx = 2").ids
    assert not any(mark in text for text in tokenization.texts(BYTES, ids) for mark in "ĠĊĉ")


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    whole = tokenization.tokenize(BYTES, "東").ids
    assert len(whole) > 1
    assert tokenization.texts(BYTES, whole[1:]) == ["�"] * (len(whole) - 1)
    assert tokenization.texts(BYTES, [whole[0], *tokenization.tokenize(BYTES, "a").ids])[1] == "a"
    assert tokenization.texts(BYTES, []) == []


def test_special_tokens_show_their_names_and_ids_beyond_the_vocabulary_nothing() -> None:
    assert tokenization.texts(BYTES, [0, 5, 1]) == ["<|endoftext|>", BYTES.decode([5]), "<|pad|>"]
    assert tokenization.texts(BYTES, [999_999]) == [""]
    assert tokenization.special_ids(BYTES) == {0, 1}
    assert tokenization.special_ids(WORDS) == {0, 1, 2, 3, 4}


def test_sentencepiece_spaces_and_byte_pieces() -> None:
    ids, spans = tokenization.tokenize(PIECES, "the fox, 東 dog")
    texts = tokenization.texts(PIECES, ids)
    assert any(PIECES.convert_ids_to_tokens(index).startswith("<0x") for index in ids)
    assert "".join(texts) == "the fox, 東 dog"
    assert not any("▁" in text or "<0x" in text for text in texts)
    assert spans[0][0] == 0
    assert spans[-1][1] == len("the fox, 東 dog")
    assert tokenization.texts(PIECES, tokenization.tokenize(PIECES, " the").ids)[0].startswith(" ")  # a leading space is not lost


def test_added_runs_of_spaces_are_spaces() -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_tokens([AddedToken("▁▁▁", normalized=False)])
    index = tokenizer.convert_tokens_to_ids("▁▁▁")
    assert tokenization.texts(tokenizer, [index, 1]) == ["   ", "<s>"]


def test_wordpiece_shows_no_marks_and_readable_words() -> None:
    ids = tokenization.tokenize(WORDS, "The quick brown foxes").ids
    texts = tokenization.texts(WORDS, [0, *ids, 2])
    assert texts[0] == "[CLS]"
    assert texts[-1] == "[SEP]"
    assert "".join(texts[1:-1]) == "the quick brown foxes"
    assert not any("##" in text for text in texts)


def test_spans_of_wordpiece_point_at_the_original_text() -> None:
    text = "  The QUICK  fox."
    ids, spans = tokenization.tokenize(WORDS, text)
    for shown, (start, end) in zip(tokenization.texts(WORDS, ids), spans, strict=True):
        assert shown.strip() == text[start:end].lower()


def test_long_texts_are_not_warned_about_nor_cut(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.model_max_length = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tokenization.tokenize(tokenizer, "z" * 500).ids) == 500
    assert not caplog.records


def test_the_fingerprint_ignores_how_it_was_called_and_sees_what_it_is() -> None:
    tokenizer = byte_level_tokenizer()
    before = tokenization.fingerprint(tokenizer)
    tokenizer("some text", truncation=True, max_length=2, padding="max_length")
    assert tokenization.fingerprint(tokenizer) == before == tokenization.fingerprint(byte_level_tokenizer())
    tokenizer.add_tokens(["another"])
    assert tokenization.fingerprint(tokenizer) != before


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(LanguageModelError, match="fast tokenizer"):
        tokenization.tokenize(Slow(), "text")


def test_every_sentence_survives() -> None:
    for sentence in SENTENCES:
        assert "".join(tokenization.texts(BYTES, tokenization.tokenize(BYTES, sentence).ids)) == sentence
