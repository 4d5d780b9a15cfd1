"""A cache in the library's own format (`cache_format.py`), opened for reading: everything that is read is checked."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm_saes.activations.cache_format import (
    HEADER_ERRORS,
    Place,
    ShardRecord,
    as_bytes,
    checksum,
    file_sha256,
    in_groups,
    read_entries,
    read_header,
    read_manifest,
    words,
)
from lm_saes.activations.quantization import Quantized, dequantize
from lm_saes.activations.stored import ORIGIN, Samples, StoredActivations
from lm_saes.errors import CacheError
from lm_saes.files import parse_json

log = logging.getLogger("lm_saes")

OPEN_FILES = 128


class Damage(NamedTuple):
    """What is wrong with a file."""

    file: str
    problem: str


class Contexts(NamedTuple):
    """Where the samples of a shard come from: C contexts of S positions."""

    tokens: Tensor | None
    """[C, S] int32; -1 at padding. None where the samples are the contexts (2d)."""
    number: Tensor
    """[C] int64."""
    meta: list[dict[str, Any]]
    """Of each context: what `Tokens.meta` holds, `spans` among it."""


class _OpenShard:
    """A shard whose header was checked. The file is closed when nothing reads it any more."""

    def __init__(self, path: Path, places: dict[str, Place], checksums: dict[str, list[str]]) -> None:
        self.path, self.places, self.checksums = path, places, checksums
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ActivationCache(StoredActivations):
    """A finished cache in the library's own format. Opening it reads the manifest and looks whether each shard is there in its full length.

    Raises:
        CacheError: it is not finished, or a shard is missing or cut short (with `skip_damaged`: said in the log, and passed over).
    """

    def __init__(self, folder: str | Path, *, skip_damaged: bool = False) -> None:
        self.folder, self.manifest = Path(folder), read_manifest(Path(folder))
        manifest = self.manifest
        self.hook_widths, self.context_size = dict(manifest.hook_points), manifest.context_size
        self.sequences, self.filtered = manifest.target == "activations-2d", bool(manifest.settings.get("outlier_norm_factor", 0))
        self.provenance, self.n_samples = manifest.provenance, manifest.samples
        self._skip_damaged, self._damaged, self._lock = skip_damaged, set[int](), threading.Lock()
        size = manifest.samples_per_group
        self._groups = [(index, start) for index, shard in enumerate(manifest.shards) for start in range(0, shard.samples, size)]
        self._open = lru_cache(OPEN_FILES)(self._opened)
        self._contexts = lru_cache(OPEN_FILES)(self._read_contexts)
        for index, shard in enumerate(manifest.shards):
            if problem := _missing(self.folder / shard.file, shard):
                self._damage(index, problem)

    @property
    def n_groups(self) -> int:
        return len(self._groups)

    def fingerprint(self) -> str:
        return f"{self.manifest.samples} samples, shards {self.manifest.shards[0].sha256[:16]} to {self.manifest.shards[-1].sha256[:16]}"

    def read(self, group: int, hook_points: Sequence[str], *, origin: bool = False) -> Samples | None:
        index, start = self._groups[group]
        if index in self._damaged:
            return None
        stop = min(start + self.manifest.samples_per_group, self.manifest.shards[index].samples)
        try:
            shard = self._open(index)
        except HEADER_ERRORS as error:
            self._damage(index, words(error))
            return None
        try:
            return self._samples(shard, index, start, stop, hook_points, origin)
        except HEADER_ERRORS as error:  # of the shard's other groups nothing is known: each answers for itself
            self._refuse(index, words(error))
            log.warning("skipping %s samples of %s: %s", f"{stop - start:,}", self.manifest.shards[index].file, words(error))
            return None

    def _samples(self, shard: _OpenShard, index: int, start: int, stop: int, hook_points: Sequence[str], origin: bool) -> Samples:
        names = ["tokens", *(["mask", "attention_mask"] if self.sequences else [])]
        samples: Samples = {hook: self._activations(shard, hook, start, stop) for hook in hook_points}
        samples |= {name: self._checked(shard, name, start, stop) for name in names}
        samples["tokens"] = samples["tokens"].long()
        if self.sequences:
            contexts = self._contexts(index)
            samples["meta"] = [{**row, "spans": list(row["spans"])} for row in contexts.meta[start:stop]]
        else:
            samples["mask"] = torch.ones(stop - start, dtype=torch.bool)
        if origin:
            samples[ORIGIN] = self._origins(shard, index, start, stop)
        return samples

    def _activations(self, shard: _OpenShard, hook: str, start: int, stop: int) -> Tensor:
        values = self._checked(shard, f"activations/{hook}", start, stop)
        if values.dtype is not torch.int8:
            return values
        scale, outliers = (self._checked(shard, f"{kind}/{hook}", start, stop) for kind in ("scale", "outliers"))
        dimensions = self._whole(shard, f"outlier_dimensions/{hook}")
        if len(dimensions) and not 0 <= int(dimensions.min()) <= int(dimensions.max()) < values.shape[-1]:
            raise ValueError(f"outlier_dimensions/{hook} lie outside the width {values.shape[-1]}")
        return dequantize(Quantized(values, scale, outliers), dimensions)

    def _origins(self, shard: _OpenShard, index: int, start: int, stop: int) -> Tensor:
        """[n] or [n, S]: context · S + position."""
        if not self.manifest.contexts or self.context_size is None:
            raise CacheError(f"{self.folder} does not record where its activations come from")
        number = self._contexts(index).number
        if self.sequences:
            return number[start:stop, None] * self.context_size + torch.arange(self.context_size)
        context, position = (self._checked(shard, name, start, stop).long() for name in ("context", "position"))
        return number[context] * self.context_size + position

    def contexts(self, shard: int) -> Contexts:
        """Where the samples of a shard come from.

        Raises:
            CacheError: the cache does not record it, or the shard is damaged.
        """
        if not self.manifest.contexts:
            raise CacheError(f"{self.folder} does not record where its activations come from")
        try:
            return self._contexts(shard)
        except HEADER_ERRORS as error:
            raise CacheError(f"{self.folder / self.manifest.shards[shard].file} is damaged: {words(error)}") from None

    def places(self, shard: int) -> tuple[Tensor, Tensor]:
        """For a shard of single activations, the context (row of `contexts(shard).tokens`) and the position of each, [n] int64."""
        opened, n = self._open(shard), self.manifest.shards[shard].samples
        context, position = (read_entries(opened.descriptor, opened.places[name], 0, n).long() for name in ("context", "position"))
        return context, position

    def _read_contexts(self, index: int) -> Contexts:
        shard = self._open(index)
        records = parse_json(as_bytes(self._whole(shard, "contexts/records")).tobytes())
        documents, table = records["documents"], records["meta"]
        number, which = self._whole(shard, "contexts/number"), self._whole(shard, "contexts/meta").tolist()
        meta: list[dict[str, Any]] = [{**table[row], "spans": []} for row in which]
        for row, document, first, end in self._whole(shard, "contexts/spans").tolist():
            meta[row]["spans"].append((documents[document], first, end))
        return Contexts(None if self.sequences else self._whole(shard, "contexts/tokens"), number, meta)

    # -------------------------------------------------------------------------------------------------------- checking

    def _opened(self, index: int) -> _OpenShard:
        """The shard with its header checked against the manifest. Raises one of `HEADER_ERRORS`."""
        record, manifest = self.manifest.shards[index], self.manifest
        path = self.folder / record.file
        if problem := _missing(path, record):
            raise OSError(problem)
        places, metadata = read_header(path)
        shape = (record.samples,) if not self.sequences else (record.samples, manifest.context_size)
        wanted: dict[str, tuple[torch.dtype | None, tuple[Any, ...]]] = {"tokens": (torch.int32, shape)}
        for hook, width in manifest.hook_points.items():
            wanted[f"activations/{hook}"] = (getattr(torch, manifest.dtype), (*shape, width))
            if manifest.dtype == "int8":
                k = places[f"outlier_dimensions/{hook}"].shape[0]
                wanted |= {f"scale/{hook}": (torch.float32, shape), f"outliers/{hook}": (torch.float32, (*shape, k)),
                           f"outlier_dimensions/{hook}": (torch.int64, (k,))}  # fmt: skip
        if self.sequences:
            wanted |= {"mask": (torch.bool, shape), "attention_mask": (torch.bool, shape)}
        elif manifest.contexts:
            wanted |= {"context": (torch.int32, shape), "position": (torch.int32, shape)}
        for name, (dtype, expected) in wanted.items():
            place = places[name]
            if place.dtype != dtype or place.shape != expected:
                raise ValueError(f"{name} is {place.dtype} {list(place.shape)}, the manifest says {dtype} {list(expected)}")
        checksums = parse_json(metadata["checksums"])
        for name, place in places.items():
            groups = -(-record.samples // manifest.samples_per_group) if in_groups(name) else 1
            if len(checksums[name]) != groups or (in_groups(name) and place.shape[0] != record.samples):
                raise ValueError(f"{name} has {len(checksums[name])} checksums for {groups} groups")
        return _OpenShard(path, places, checksums)

    def _checked(self, shard: _OpenShard, name: str, start: int, stop: int) -> Tensor:
        """Entries of one group, checked."""
        values = read_entries(shard.descriptor, shard.places[name], start, stop)
        if checksum(values) != shard.checksums[name][start // self.manifest.samples_per_group]:
            raise ValueError(f"samples {start} to {stop - 1} of {name} are not what was written (checksum)")
        return values

    def _whole(self, shard: _OpenShard, name: str) -> Tensor:
        """A table of a shard, checked."""
        values = read_entries(shard.descriptor, shard.places[name], 0, shard.places[name].shape[0])
        if checksum(values) != shard.checksums[name][0]:
            raise ValueError(f"{name} is not what was written (checksum)")
        return values

    def _refuse(self, index: int, problem: str) -> None:
        """Raise, unless damage may be passed over."""
        if not self._skip_damaged:
            raise CacheError(
                f"{self.folder / self.manifest.shards[index].file} is damaged or missing: {problem}; write it again, or set skip_damaged = true"
            ) from None

    def _damage(self, index: int, problem: str) -> None:
        """A whole shard is damaged: an error, or one line in the log and never read again."""
        self._refuse(index, problem)
        with self._lock:
            if index not in self._damaged:
                shard = self.manifest.shards[index]
                log.warning("skipping damaged %s (%s samples): %s", shard.file, f"{shard.samples:,}", problem)
                self._damaged.add(index)

    def verify(self) -> list[Damage]:
        """Read everything and compare it with what was written."""
        return [
            Damage(shard.file, problem)
            for index, shard in enumerate(self.manifest.shards)
            if (problem := _missing(self.folder / shard.file, shard) or self._problem(index))
        ]

    def _problem(self, index: int) -> str:
        shard = self.manifest.shards[index]
        try:
            self._opened(index)
            return "" if file_sha256(self.folder / shard.file) == shard.sha256 else "its content is not what was written (SHA-256)"
        except HEADER_ERRORS as error:
            return words(error)


def _missing(path: Path, record: ShardRecord) -> str:
    """What is wrong with a shard as far as its length shows."""
    if path.is_symlink():
        return "it is a link, which could lead out of the folder"
    if not path.is_file():
        return "there is no such file"
    n_bytes = path.stat().st_size
    return "" if n_bytes == record.bytes else f"it has {n_bytes:,} bytes instead of {record.bytes:,}"
