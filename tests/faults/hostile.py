"""Files that were made to do harm, and the bounds in which reading them has to stay."""

from __future__ import annotations

import io
import json
import resource
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm_saes.errors import LmSaesError

GIB = 2**30
DEEP = 100_000

JSON: dict[str, bytes] = {
    "empty": b"",
    "cut short": b'{"a": [1, 2',
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "nested lists": b"[" * DEEP + b"]" * DEEP,
    "nested objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "digits": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "beyond floats": b'{"a": 1e999}',
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "a key twice": b'{"a": 1, "a": 2}',
    "a list": b"[1, 2]",
    "a word": b"null",
    "not JSON": b"\x80\x04\x95pickle",
}
"""What no reader of tables takes."""

PICKLES = ("posix\nsystem\n(S'touch {}'\ntR.", 'c__builtin__\nexec\n(S\'open("{}", "w")\'\ntR.')


@contextmanager
def bounded(memory: int = GIB, seconds: float = 20.0) -> Iterator[None]:
    """Fail what takes more than `memory` bytes of address space beyond those that are in use, or more than `seconds` of processor time."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory, before[1]))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < seconds


def refusal(read: Callable[[], Any], *names: str, memory: int = GIB) -> str:
    """What reading it says: one line that a terminal shows as it is, naming the file, in bounded memory and time; and not for want of memory."""
    with pytest.raises(LmSaesError) as caught, bounded(memory):
        read()
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) <= 2100
    assert not any(word in said for word in ("allocate", "MemoryError", "not enough memory")), said
    for name in names:
        assert name in said, said
    return said


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(shape: Any, start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "no header": b"\x00" * 7,
    "a header of nothing": safetensors(b"", length=0),
    "a header beyond the file": safetensors({}, length=2**40),
    "a huge header": safetensors(b" " * 100, length=2**63 - 1),
    "a header of 40 MiB": safetensors(b"{" + b" " * (40 * 2**20) + b"}"),
    "a header that is no JSON": safetensors(b"{'a': 1}"),
    "a header nested deep": safetensors(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "a header of other things": safetensors({"a": 1}),
    "a header that is a list": safetensors([1]),
    "offsets that overlap": safetensors({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, b"\0" * 12),
    "offsets with a hole": safetensors({"a": tensor([2], 0, 8), "b": tensor([2], 12, 20)}, b"\0" * 20),
    "offsets beyond the file": safetensors({"a": tensor([2], 0, 8)}, b"\0" * 4),
    "offsets backwards": safetensors({"a": tensor([2], 8, 0)}, b"\0" * 8),
    "offsets that are negative": safetensors({"a": tensor([2], -8, 0)}, b"\0" * 8),
    "a shape that overflows": safetensors({"a": tensor([2**62, 2**62], 0, 8)}, b"\0" * 8),
    "a shape of terabytes": safetensors({"a": tensor([2**40], 0, 8)}, b"\0" * 8),
    "a shape beyond integers": safetensors({"a": tensor([2**64 - 1, 0], 0, 0)}),
    "a shape that is negative": safetensors({"a": tensor([-2], 0, 8)}, b"\0" * 8),
    "an unknown data type": safetensors({"a": tensor([2], 0, 8, "X99")}, b"\0" * 8),
    "a name twice": safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "bytes left over": safetensors({"a": tensor([1], 0, 4)}, b"\0" * 64),
}
"""What no reader of tensors takes."""


def npz_bomb(size: int = GIB // 4) -> bytes:
    """An npz file that unfolds to `size` bytes of zeros."""
    out = io.BytesIO()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (size // 4,)})
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("W_enc.npy", "w", force_zip64=True) as entry:
        entry.write(header.getvalue())
        zeros = b"\0" * 2**20
        for _ in range(size // 2**20):
            entry.write(zeros)
    return out.getvalue()
