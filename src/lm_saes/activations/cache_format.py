"""The files of an activation cache: what stands where, and how it is written and checked.

    manifest.json                       what the cache is and which shards it consists of; written last
    shard-<part>-of-<parts>-<number>.safetensors
    progress-<part>-of-<parts>.safetensors    only while the cache is being written: what a process that goes on needs

A shard is a safetensors file with, for n samples (tokens of activations-1d, sequences of S positions of activations-2d):

    activations/<hook point>    [n, D] or [n, S, D]      float32, bfloat16, float16 or int8
    scale/<hook point>          [n] or [n, S]            int8 only: float32
    outliers/<hook point>       [n, K] or [n, S, K]      int8 only: float32; the dimensions in outlier_dimensions/<hook point> [K], int64
    tokens                      [n] or [n, S]            int32; -1 where there is no token id
    mask, attention_mask        [n, S]                   2d only
    context, position           [n]                      1d only: int32; row in contexts/tokens, position in that row
    contexts/tokens             [C, S]                   1d only: int32; -1 where the context is padded
    contexts/number             [C] (2d: [n])            int64: the how many-th context of the text it is
    contexts/spans              [P, 4]                   int32: context (2d: sample), document, first position, position after the last
    contexts/meta               [C] (2d: [n])            int32: which of the metadata is the context's
    contexts/records            [bytes]                  uint8: JSON {"documents": [names], "meta": [metadata]}

Samples are checked in groups: `checksums` in the file's metadata holds for each tensor the XXH3 of each group of `samples_per_group`
samples (of the whole tensor for those of contexts/), so that whatever is read is checked, and at the speed of memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
import xxhash
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lm_saes import tensor_files
from lm_saes.config.base import BaseConfig, one_line
from lm_saes.errors import CacheError
from lm_saes.files import read_json_object, write_whole

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
GROUP_BYTES = 2 * 2**20
"""Activations of one hook point in one group, the unit of reading, as if they were float32: the order of reading does not depend on the data type."""
LARGEST_MANIFEST = 256 * 2**20

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "BOOL": torch.bool, "U8": torch.uint8,
}  # fmt: skip
"""The data types of tensors in a shard, by their names in safetensors."""


class ShardRecord(BaseConfig):
    """One shard, as the manifest describes it."""

    file: str = Field(pattern=r"^shard-\d+-of-\d+-\d{8}\.safetensors$")
    """Its name in the cache's folder."""
    samples: int = Field(ge=1)
    """Tokens or sequences in it."""
    tokens: int = Field(ge=0)
    """Kept tokens in it."""
    bytes: int = Field(ge=8)
    """Size of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the file."""


class Manifest(BaseConfig):
    """What a cache is."""

    format: Literal["lm_saes activation cache"] = "lm_saes activation cache"
    """Says what this file is."""
    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this description."""
    library_version: str
    """Version of the library that wrote the cache."""
    target: Literal["activations-1d", "activations-2d"]
    """Single activations or sequences."""
    hook_points: dict[str, int] = Field(min_length=1)
    """Width of each hook point."""
    dtype: Literal["float32", "bfloat16", "float16", "int8"]
    """Data type of the activations on disk."""
    context_size: int | None = Field(default=None, ge=1)
    """Positions of a context."""
    contexts: bool
    """Whether the shards hold the contexts that the samples come from."""
    samples: int = Field(ge=1)
    """Tokens or sequences in the cache."""
    tokens: int = Field(ge=0)
    """Kept tokens in the cache."""
    samples_per_shard: int = Field(ge=1)
    """Samples in each shard but the last of each part."""
    samples_per_group: int = Field(ge=1)
    """Samples in each group but the last of each shard."""
    parts: int = Field(ge=1)
    """Processes that wrote it."""
    complete: bool = True
    """False: the writing was ended before its end was reached (`lm-saes cache finish`)."""
    settings: dict[str, Any]
    """How it was written."""
    provenance: dict[str, Any]
    """Model, revision, tokenizer, dataset, filters; whatever was known."""
    counts: list[dict[str, Any]]
    """What each process read, kept and dropped."""
    shards: list[ShardRecord] = Field(min_length=1)
    """The shards, part after part."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("the same shard is listed twice")
        for name in ("samples", "tokens"):
            if sum(getattr(shard, name) for shard in self.shards) != getattr(self, name):
                raise ValueError(f"the shards' {name} do not add up to {getattr(self, name)}")
        if any(shard.samples > self.samples_per_shard for shard in self.shards):
            raise ValueError(f"a shard holds more than samples_per_shard = {self.samples_per_shard} samples")
        if any(not 1 <= width <= 2**24 for width in self.hook_points.values()):
            raise ValueError("the width of a hook point must lie in [1, 2^24]")
        if self.target == "activations-2d" and self.context_size is None:
            raise ValueError("context_size is missing")
        return self

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)


def shard_name(part: int, parts: int, number: int) -> str:
    """The file name of a shard."""
    return f"shard-{part}-of-{parts}-{number:08d}.safetensors"


def progress_name(part: int, parts: int) -> str:
    """The file name of what a process that goes on needs."""
    return f"progress-{part}-of-{parts}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished cache.

    Raises:
        CacheError: there is none, or it is not one.
    """
    path = folder / MANIFEST_FILE
    try:
        table = read_json_object(path, CacheError, LARGEST_MANIFEST)
    except FileNotFoundError:
        raise CacheError(f"{folder} is not a finished cache: there is no {MANIFEST_FILE} in it") from None
    version = table.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CacheError(f"{path} has schema version {version}, this library reads up to {SCHEMA_VERSION}; update the library")
    try:
        return Manifest.model_validate(table)
    except ValidationError as error:
        raise CacheError(f"{path} is damaged: {one_line(error)}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all."""
    write_whole(folder / MANIFEST_FILE, lambda path: path.write_text(json.dumps(manifest.as_dict(), indent=1) + "\n", encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------ shards


def as_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def checksum(tensor: Tensor) -> str:
    """XXH3 of a tensor's bytes."""
    return xxhash.xxh3_64_hexdigest(as_bytes(tensor))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_groups(name: str) -> bool:
    """Whether a tensor of a shard has an entry per sample."""
    return not name.startswith(("contexts/", "outlier_dimensions/"))


def write_shard(path: Path, tensors: Mapping[str, Tensor], samples_per_group: int) -> tuple[int, str]:
    """Write a shard, whole or not at all; its size and its SHA-256."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checksums = {
        name: [checksum(group) for group in tensor.split(samples_per_group)] if in_groups(name) else [checksum(tensor)]
        for name, tensor in tensors.items()
    }
    metadata = {"checksums": json.dumps(checksums)}  # one entry: safetensors writes several in an order of its own
    digest: list[str] = []

    def write(temporary: Path) -> None:
        save_file(dict(tensors), str(temporary), metadata=metadata)
        digest.append(file_sha256(temporary))

    write_whole(path, write)
    return path.stat().st_size, digest[0]


class Place(NamedTuple):
    """Where a tensor stands in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one entry along the first dimension."""
        count = 1
        for length in self.shape[1:]:
            count *= length
        return count * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the tensors of a safetensors file are, and its metadata. The library refuses headers that are too large, offsets that overlap or
    leave the file, and shapes that are not as long as their bytes.

    Raises:
        SafetensorError, OSError, ValueError: it cannot be read, or is not one.
    """
    table, metadata, start = tensor_files.read_header(path)
    unknown = {entry["dtype"] for entry in table.values()} - DTYPES.keys()
    if unknown:
        raise ValueError(f"data type {', '.join(sorted(unknown))} is not one of {', '.join(DTYPES)}")
    places = {name: Place(DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0]) for name, entry in table.items()}
    return places, metadata


HEADER_ERRORS = (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, RecursionError)
"""What reading a damaged or hostile file may raise."""


def words(error: BaseException) -> str:
    """One of `HEADER_ERRORS` in one line."""
    text = " ".join(str(error).split())
    return f"it lacks {text}" if isinstance(error, KeyError) else text or type(error).__name__


def read_entries(descriptor: int, place: Place, start: int, stop: int) -> Tensor:
    """Entries `start` to `stop` of a tensor in an open file.

    Raises:
        OSError: the file ends before them, or cannot be read.
    """
    out = torch.empty((stop - start, *place.shape[1:]), dtype=place.dtype)
    view = memoryview(as_bytes(out))
    done, offset = 0, place.offset + start * place.bytes_per_entry
    if hasattr(os, "posix_fadvise"):  # the disk is asked for all of it at once, not for one small read-ahead window after the other
        os.posix_fadvise(descriptor, offset, len(view), os.POSIX_FADV_WILLNEED)
    while done < len(view):
        n = os.preadv(descriptor, [view[done:]], offset + done)
        if n == 0:
            raise OSError("the file ends too early")
        done += n
    return out
