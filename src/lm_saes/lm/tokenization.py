"""What a tokenizer must say about itself: spans in the text, and what to print for each token. Works on any Hugging Face tokenizer object."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_saes.errors import LanguageModelError


class TokenizedText(NamedTuple):
    """Token ids of a text and, for each, the characters `text[start:end]` it stands for. No special tokens are added."""

    ids: list[int]
    spans: list[tuple[int, int]]


def tokenize(tokenizer: Any, text: str) -> TokenizedText:
    """Ids and character spans of a text of any length. Tokens that are parts of one character share its span.

    Raises:
        LanguageModelError: the tokenizer cannot say where its tokens are.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise LanguageModelError(
            f"{type(tokenizer).__name__} cannot say which characters its tokens stand for; use the model's fast tokenizer (a tokenizer.json)"
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, padding=False, verbose=False)
    return TokenizedText(list(encoding["input_ids"]), [(int(start), int(end)) for start, end in encoding["offset_mapping"]])


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that stand for no text: BOS, EOS, padding, and every other token that the tokenizer marks as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {int(index) for index, token in added.items() if getattr(token, "special", False)}


def largest_id(tokenizer: Any) -> int:
    """The largest id that the tokenizer can produce."""
    return max(tokenizer.get_vocab().values(), default=-1)


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the tokenizer: equal for two tokenizers that cut every text alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        table = json.loads(backend.to_str())
        table = {key: value for key, value in table.items() if key not in ("truncation", "padding")}  # set by calls, not by training
    else:
        table = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What to print for each token, such that the texts joined are the text as the tokenizer normalises it.

    Tokens become bytes and are decoded together: a character cut into several tokens is shown by the first, the others are empty.
    Bytes that are no UTF-8 are shown as the replacement character. WordPiece words get the space in front of them that the tokenizer dropped.
    """
    ids = [int(index) for index in ids]
    names: list[str | None] = tokenizer.convert_ids_to_tokens(ids)
    kind = _kind(tokenizer)
    added = {int(index): _added_text(token, kind) for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    pieces_to_bytes = _BYTES_OF_PIECE[kind]
    pieces: list[bytes] = []
    for position, (index, name) in enumerate(zip(ids, names, strict=True)):
        if index in added:
            pieces.append(added[index].encode())
        elif name is None:  # the model's vocabulary is padded beyond the tokenizer's
            pieces.append(b"")
        elif pieces_to_bytes is None:
            pieces.append(tokenizer.decode([index]).encode())
        else:
            follows_word = position > 0 and ids[position - 1] not in added
            pieces.append(pieces_to_bytes(name, follows_word))
    return _decode_together(pieces)


def _added_text(token: Any, kind: str) -> str:
    """Added tokens stand for their own text, but SentencePiece models write runs of spaces (Gemma) in their way there too."""
    return str(token).replace("▁", " ") if kind == "sentencepiece" and not getattr(token, "special", False) else str(token)


def _decode_together(pieces: list[bytes]) -> list[str]:
    """Decode the joined bytes; each character belongs to the piece in which its first byte lies."""
    owners = [index for index, piece in enumerate(pieces) for _ in piece]
    result = [""] * len(pieces)
    position = 0
    data = b"".join(pieces)
    while position < len(data):
        length = _character_length(data, position)
        result[owners[position]] += data[position : position + length].decode("utf-8", errors="replace")
        position += length
    return result


def _character_length(data: bytes, position: int) -> int:
    """Bytes of the character that begins here; 1 where none does."""
    lead = data[position]
    length = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    try:
        data[position : position + length].decode("utf-8")
    except UnicodeDecodeError:
        return 1
    return length


# ---------------------------------------------------------------------------------------------- how pieces are written


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE (GPT-2): printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level(piece: str, _: bool) -> bytes:
    if all(character in _BYTE_OF_CHARACTER for character in piece):
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    return piece.encode()


def _sentencepiece(piece: str, _: bool) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _wordpiece(piece: str, follows_word: bool) -> bytes:
    if piece.startswith("##"):
        return piece[2:].encode()
    return (f" {piece}" if follows_word else piece).encode()


_BYTES_OF_PIECE = {"byte-level": _byte_level, "sentencepiece": _sentencepiece, "wordpiece": _wordpiece, "unknown": None}


def _kind(tokenizer: Any) -> str:
    """How the tokenizer writes its pieces, read off its decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return "unknown"
    state = decoder.__getstate__()
    text = state.decode() if isinstance(state, bytes) else str(state)
    for mark, kind in (('"ByteLevel"', "byte-level"), ('"WordPiece"', "wordpiece"), ("▁", "sentencepiece"), ("\\u2581", "sentencepiece")):
        if mark in text:
            return kind
    return "unknown"
