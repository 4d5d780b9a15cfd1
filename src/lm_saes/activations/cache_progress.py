"""A cache while it is being written: how far each process has come, who writes, whether there is room; and the end, when the manifest is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lm_saes import locks
from lm_saes.activations.cache_format import (
    HEADER_ERRORS,
    MANIFEST_FILE,
    Manifest,
    ShardRecord,
    progress_name,
    read_manifest,
    words,
    write_manifest,
)
from lm_saes.activations.stream import packed, unpacked
from lm_saes.errors import CacheError
from lm_saes.files import UNFINISHED, disk_is_full, parse_json, write_whole
from lm_saes.tensor_files import read_safetensors, separate
from lm_saes.version import __version__

RESERVE = 16 * 2**20
"""Bytes that stay free beside a shard: for the manifest, and for others."""


@dataclass
class Progress:
    """How far one process has come: everything that a process that goes on needs. Saved after each shard, whole or not at all."""

    part: int
    parts: int
    identity: dict[str, Any]
    """What the content depends on."""
    shards: list[ShardRecord] = field(default_factory=list)
    block: int = 0
    """The block that is being collected."""
    shards_before_block: int = 0
    tokens_before_block: int = 0
    first_context: int = 0
    """Number of the first context of the batch with which the block begins."""
    skip: int = 0
    """Samples of that batch that belong to the block before."""
    stream: dict[str, Any] | None = None
    """The stream's state before that batch."""
    shape: dict[str, Any] = field(default_factory=dict)
    """What all shards have in common."""
    outlier_dimensions: dict[str, list[int]] = field(default_factory=dict)
    contexts: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    counts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, part: int, parts: int) -> Progress | None:
        """What was saved; None if nothing was.

        Raises:
            CacheError: it cannot be read.
        """
        path = folder / progress_name(part, parts)
        if not path.exists():
            return None
        try:
            tensors, metadata = read_safetensors(path, CacheError)
            table = parse_json(metadata["progress"], tolerant=True)  # a state may hold infinity
            table["shards"] = [ShardRecord.model_validate(shard) for shard in table["shards"]]
            if table["stream"] is not None:
                table["stream"] = unpacked(table["stream"], tensors)
            return cls(**table)
        except (*HEADER_ERRORS, CacheError) as error:
            raise CacheError(f"{path} is damaged ({words(error)}); remove the folder and write the cache again") from None

    def save(self, folder: Path) -> None:
        """Replace what was saved."""
        table = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        table["shards"] = [shard.as_dict() for shard in self.shards]
        table["stream"], tensors = packed(self.stream, CacheError)
        metadata = {"progress": json.dumps(table)}
        write_whole(folder / progress_name(self.part, self.parts), lambda path: save_file(separate(tensors), str(path), metadata=metadata))

    def check(self, identity: Mapping[str, Any], folder: Path) -> None:
        """Raises `CacheError` if the folder was begun with other settings, or if a shard that was written is gone."""
        for name in {**self.identity, **identity}:
            if self.identity.get(name) != identity.get(name):
                raise CacheError(
                    f"{folder} was begun with {name} = {self.identity.get(name)!r}, got {identity.get(name)!r}; "
                    "go on with the settings it was begun with, or choose another folder"
                )
        for shard in self.shards:
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise CacheError(f"{path} was written and is gone or cut short; remove the folder and write the cache again")

    def close_block(self, tokens: int, first_context: int, stream: dict[str, Any] | None, skip: int) -> None:
        """The block is on the disk; the next begins with sample `skip` of the batch that the stream gives in the state `stream`."""
        self.block += 1
        self.shards_before_block, self.tokens_before_block = len(self.shards), self.tokens_before_block + tokens
        self.first_context, self.stream, self.skip = first_context, stream, skip

    @property
    def tokens(self) -> int:
        """Kept tokens in the shards."""
        return sum(shard.tokens for shard in self.shards)


def exclusive(folder: Path, name: str, *, wait: bool = False) -> AbstractContextManager[object]:
    """Only one process at a time does what `name` says: writes a part ("0-of-1"), or the manifest. The lock ends with the process.

    Raises:
        CacheError: another process does it, and `wait` is false; the message names it.
    """
    return locks.exclusive(folder / f"{UNFINISHED}lock-{name}", f"{folder}, part {name},", error=CacheError, wait=wait)


def room_for(n_bytes: int, folder: Path, progress: Progress) -> None:
    """Raises `CacheError` if the disk has no room for another shard of `n_bytes`: before it is begun."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes + RESERVE:
        raise _full(folder, f"the next shard needs {_mib(n_bytes + RESERVE)}, {_mib(free)} are free", progress)


@contextmanager
def space_errors(folder: Path, progress: Progress | None = None) -> Iterator[None]:
    """Errors of the disk in one line that says what is kept.

    Raises:
        CacheError: the disk is full, or cannot be written.
    """
    try:
        yield
    except Exception as error:
        if disk_is_full(error):
            raise _full(folder, "a write failed", progress) from None
        if isinstance(error, OSError):
            raise CacheError(f"cannot write {error.filename or folder}: {error.strerror or error}; choose another folder") from None
        raise


def _full(folder: Path, why: str, progress: Progress | None) -> CacheError:
    kept = f"; {len(progress.shards)} shards with {progress.tokens:,} tokens are kept" if progress is not None else ""
    go_on = ": free some space and run again to go on" + (f", or use what is there: lm-saes cache finish {folder}" if kept else "")
    return CacheError(f"the disk of {folder} is full ({why}){kept}{go_on}")


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"


# ----------------------------------------------------------------------------------------------------------- the end


def finish_cache(folder: Path, identity: Mapping[str, Any], *, as_it_stands: bool = False) -> Manifest | None:
    """Write the manifest if every part is finished (with `as_it_stands`: whatever has been written); None if one is not.

    Raises:
        CacheError: parts were written with different settings; or there is nothing to finish.
    """
    with exclusive(folder, "manifest", wait=True):
        if (folder / MANIFEST_FILE).is_file():  # another process was quicker
            return read_manifest(folder)
        n_parts = identity["n_shards"]
        parts = [part for number in range(n_parts) if (part := Progress.load(folder, number, n_parts)) is not None and part.shards]
        finished = len(parts) == n_parts and all(part.finished for part in parts)
        if not finished and not as_it_stands:
            return None
        if not parts:
            raise CacheError(f"{folder} holds no finished shard")
        for part in parts:
            part.check(identity, folder)
            if part.shape != parts[0].shape:
                raise CacheError(f"part {part.part} of {folder} has other hook points, widths or shards than part {parts[0].part}")
        shards = [shard for part in parts for shard in part.shards]
        manifest = Manifest(
            library_version=__version__, target=identity["target"], **parts[0].shape, contexts=parts[0].contexts,
            samples=sum(shard.samples for shard in shards), tokens=sum(shard.tokens for shard in shards), parts=n_parts, complete=finished,
            settings=dict(identity), provenance=parts[0].provenance, counts=[part.counts for part in parts], shards=shards,
        )  # fmt: skip
        with space_errors(folder):
            write_manifest(folder, manifest)
        for path in [*folder.glob("progress-*-of-*.safetensors"), *folder.glob(f"{UNFINISHED}*")]:
            path.unlink(missing_ok=True)
    return manifest


def finish_as_it_stands(folder: Path) -> Manifest:
    """End a cache that is not finished: its shards become a cache that can be read, and nothing more is written to it.

    Raises:
        CacheError: there is nothing to finish, it is finished, or a process writes it.
    """
    if (folder / MANIFEST_FILE).is_file():
        raise CacheError(f"{folder} is finished")
    found = begun_parts(folder)
    if not found:
        raise CacheError(f"{folder} holds no cache that was begun")
    with ExitStack() as locks:
        for part, parts in found:
            locks.enter_context(exclusive(folder, f"{part}-of-{parts}"))
        progress = Progress.load(folder, *found[0])
        assert progress is not None
        manifest = finish_cache(folder, progress.identity, as_it_stands=True)
    assert manifest is not None
    return manifest


def begun_parts(folder: Path) -> list[tuple[int, int]]:
    """(part, parts) of each process that began to write a cache that is not finished."""
    matches = (re.fullmatch(r"progress-(\d+)-of-(\d+)\.safetensors", path.name) for path in folder.glob("progress-*"))
    return sorted((int(match[1]), int(match[2])) for match in matches if match)
