"""States of streams, ours and anybody's, on their way to the disk and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm_saes.activations.stream import packed, snapshot, unpacked
from lm_saes.errors import DataError


def back(state: Any) -> Any:
    """Through JSON, and tensors by name."""
    table, tensors = packed(state, DataError)
    return unpacked(json.loads(json.dumps(table)), tensors)


ARRAYS = [
    np.arange(6).reshape(2, 3)[:, ::2],  # not contiguous
    np.array(3),
    np.array([], dtype=np.float16),
    np.array([True, False]),
    np.array([2**64 - 1], dtype=np.uint64),
    np.frombuffer(b"\x01\x02", dtype=np.uint8),  # cannot be written
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype} {list(array.shape)}")
def test_arrays_come_back_as_they_were(array: np.ndarray[Any, Any]) -> None:
    found = back({"a": [array]})["a"][0]
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


NUMBERS = [np.int64(-(2**63)), np.uint64(2**64 - 1), np.float32(0.1), np.float64(0.1), np.bool_(True)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_numbers_come_back_exactly_and_are_those_of_python(number: Any) -> None:
    found = back({"n": number})["n"]
    assert type(found) in (bool, int, float)
    assert found == number


def test_a_generator_of_numpy_goes_on_where_it_was() -> None:
    generator = np.random.default_rng(3)
    generator.random(5)
    state = back({"generator": generator.bit_generator.state})
    other = np.random.default_rng(0)
    other.bit_generator.state = state["generator"]
    assert generator.random(4).tolist() == other.random(4).tolist()


def test_the_rest_of_a_state_comes_back_as_it_was() -> None:
    state = {"nested": [{"t": torch.arange(3)}, None, "text", 0.1, 2**200], "empty": {}}
    found = back(state)
    assert found["nested"][0]["t"].tolist() == [0, 1, 2]
    assert (found["nested"][1:], found["empty"]) == (state["nested"][1:], {})


REFUSED = {
    "a set": ({"seen": {1, 2}}, r"state_dict\(\)\['seen'\] is of type set; use JSON values, tensors, or numbers and arrays of NumPy"),
    "deep": ({"a": [{"b": Path("x")}]}, r"state_dict\(\)\['a'\]\[0\]\['b'\] is of type PosixPath"),
    "bytes": ({"a": b"x"}, "is of type bytes"),
    "complex numbers": ({"a": np.zeros(2, dtype=np.complex128)}, "is of torch.complex128, torch.strided, which cannot be saved"),
    "sparse": ({"a": torch.zeros(2, 2).to_sparse()}, "is of torch.float32, torch.sparse_coo, which cannot be saved"),
    "a list": ([1, 2], r"state_dict\(\) must be a dict, got list"),
    "a date": ({"a": np.datetime64("2026-11-23")}, "is of type datetime64"),
    "a key": ({"a": {1: 2}}, r"state_dict\(\)\['a'\] has the key 1; keys must be text"),
    "objects": ({"a": np.array([{}], dtype=object)}, "is an array of object, which cannot be saved"),
    "an order of bytes": ({"a": np.arange(3).astype(">i4")}, "is an array of >i4, which cannot be saved"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_kept_is_one_line(what: str) -> None:
    state, line = REFUSED[what]
    with pytest.raises(DataError, match=line) as caught:
        packed(state, DataError)
    assert "\n" not in str(caught.value)


def test_a_snapshot_of_an_array_does_not_change() -> None:
    state = {"a": [np.arange(3)]}
    kept = snapshot(state)
    state["a"][0] += 1
    assert kept["a"][0].tolist() == [0, 1, 2]
