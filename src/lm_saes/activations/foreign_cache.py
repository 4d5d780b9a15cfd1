"""Activations that others wrote: folders of matrices (`.npy`, `.safetensors`), and the chunk files of OpenMOSS's Language-Model-SAEs.

A file holds a matrix [n, D] of single activations, or an array [n, S, D] of sequences. In a `.safetensors` (or `.pt`) file it is the tensor "activation",
"activations" or the only one; `tokens`, `mask` and `attention_mask` beside it are read too, and so are the contexts' metadata in `<chunk>.meta.json`.
Files are read in the order of their names. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_saes import tensor_files
from lm_saes.activations.cache import ActivationCache
from lm_saes.activations.cache_format import MANIFEST_FILE, Place, read_entries, read_header, words
from lm_saes.activations.cache_progress import begun_parts
from lm_saes.activations.stored import ORIGIN, Samples, StoredActivations
from lm_saes.errors import CacheError, did_you_mean
from lm_saes.files import inside, read_json

log = logging.getLogger("lm_saes")

SUFFIXES = (".npy", ".safetensors", ".pt")
GROUP_BYTES = 2**20
"""Smaller than in our own caches: these files may not have been shuffled when they were written."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Reader = Callable[[int, int], Tensor]


class _Array:
    """One tensor of a file, read by entries."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Reader) -> None:
        self.shape, self.dtype, self.read = tuple(shape), dtype, read


class _File:
    """The tensors of one file: `activation`, and what stands beside it. Raises whatever the file's library raises."""

    def __init__(self, path: Path) -> None:
        self.path = path
        match path.suffix:
            case ".npy":
                array = tensor_files.map_npy(path)
                if not array.flags.c_contiguous or array.dtype.str not in {"<f2", "<f4", "<f8"}:
                    raise ValueError(f"wanted float16, float32 or float64 in C order, got {array.dtype} {list(array.shape)}")
                dtype = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}[array.dtype.str]
                tensors = {"activation": _on_disk(path, Place(dtype, array.shape, array.offset))}
            case ".safetensors":
                tensors = {name: _on_disk(path, place) for name, place in read_header(path)[0].items()}
            case _:
                loaded = tensor_files.read_torch(path, CacheError, mmap=True)
                table = loaded if isinstance(loaded, dict) else {"activation": loaded}
                tensors = {
                    name: _Array(value.shape, value.dtype, lambda start, stop, value=value: value[start:stop].clone())
                    for name, value in table.items()
                    if isinstance(value, Tensor)
                }
        main = next((name for name in ("activation", "activations") if name in tensors), None) or (next(iter(tensors)) if len(tensors) == 1 else None)
        if main is None:
            raise ValueError(f"wanted one tensor, or one named activation, got {', '.join(tensors) or 'none'}")
        self.activation = tensors[main]
        self.beside = {name: tensors[name] for name in ("tokens", "mask", "attention_mask") if name in tensors}
        if self.activation.dtype not in _FLOATS or len(self.activation.shape) not in (2, 3) or 0 in self.activation.shape:
            raise ValueError(f"wanted floating-point numbers [n, D] or [n, S, D], got {self.activation.dtype} {list(self.activation.shape)}")
        for name, array in self.beside.items():
            if array.shape != self.activation.shape[:-1]:
                raise ValueError(f"{name} is {list(array.shape)}, the activations are {list(self.activation.shape)}")


def _on_disk(path: Path, place: Place) -> _Array:
    def read(start: int, stop: int) -> Tensor:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return read_entries(descriptor, place, start, stop)
        finally:
            os.close(descriptor)

    return _Array(place.shape, place.dtype, read)


class ActivationFiles(StoredActivations):
    """Files of activations; for each hook point as many, with as many entries.

    Raises:
        CacheError: there are none, one cannot be read, or they do not match (unreadable ones are said and left out with `skip_damaged`).
    """

    filtered = False

    def __init__(self, folders: Mapping[str, Path], *, skip_damaged: bool = False) -> None:
        listed = {hook: _listed(path) for hook, path in folders.items()}
        counts = {hook: len(files) for hook, files in listed.items()}
        if len(set(counts.values())) > 1:
            raise CacheError(f"each hook point needs as many files, got {', '.join(f'{hook}: {count}' for hook, count in counts.items())}")
        self._rows: list[dict[str, _File]] = []
        for paths in zip(*listed.values(), strict=True):
            row = self._opened(dict(zip(listed, paths, strict=True)), skip_damaged)
            if row is not None:
                self._rows.append(row)
        if not self._rows:
            raise CacheError(f"no file in {', '.join(str(path) for path in folders.values())} can be read")
        first = self._rows[0]
        for row in self._rows:
            for hook, file in row.items():
                wanted, got = first[hook].activation.shape[1:], file.activation.shape[1:]
                if got != wanted:
                    raise CacheError(f"{file.path} holds {list(got)} per sample, {first[hook].path} {list(wanted)}")
        arrays = [file.activation for file in first.values()]
        self.hook_widths = {hook: file.activation.shape[-1] for hook, file in first.items()}
        self.sequences = len(arrays[0].shape) == 3
        self.context_size = arrays[0].shape[1] if self.sequences else None
        self.provenance = {"files": {hook: str(path) for hook, path in folders.items()}}
        lengths = [next(iter(row.values())).activation.shape[0] for row in self._rows]
        self.n_samples = sum(lengths)
        per_sample = max(array.dtype.itemsize * int(np.prod(array.shape[1:])) for array in arrays)
        size = max(1, GROUP_BYTES // per_sample)
        self._groups = [(index, start, min(start + size, n)) for index, n in enumerate(lengths) for start in range(0, n, size)]
        self._first = np.cumsum([0, *lengths]).tolist()
        self._meta = lru_cache(64)(self._read_meta)

    def _opened(self, paths: Mapping[str, Path], skip_damaged: bool) -> dict[str, _File] | None:
        row: dict[str, _File] = {}
        for hook, path in paths.items():
            try:
                row[hook] = _File(path)
            except Exception as error:  # of NumPy, torch, safetensors or the disk: they have no common base
                problem = tensor_files.reason(error).removeprefix(f"{path} is ")
            else:
                shape, first = row[hook].activation.shape, next(iter(row.values())).activation.shape
                if shape[:-1] == first[:-1]:
                    continue
                problem = f"it holds {list(shape)}, the other hook points' file {list(first)}"
            if not skip_damaged:
                raise CacheError(f"{path} cannot be read: {problem}; mend or remove it, or set skip_damaged = true")
            log.warning("skipping %s: %s", path, problem)
            return None
        return row

    @property
    def n_groups(self) -> int:
        return len(self._groups)

    def fingerprint(self) -> str:
        table = [(file.path.name, file.activation.shape) for row in self._rows for file in row.values()]
        return f"{self.n_samples} samples, files {hashlib.sha256(repr(table).encode()).hexdigest()[:16]}"

    def read(self, group: int, hook_points: Sequence[str], *, origin: bool = False) -> Samples | None:
        index, start, stop = self._groups[group]
        row = self._rows[index]
        try:
            samples: Samples = {hook: row[hook].activation.read(start, stop) for hook in hook_points}
            beside = [{name: array.read(start, stop) for name, array in row[hook].beside.items()} for hook in hook_points or [next(iter(row))]]
        except OSError as error:
            raise CacheError(f"{row[next(iter(row))].path} cannot be read any more: {words(error)}") from None
        shape = (stop - start, self.context_size) if self.context_size else (stop - start,)
        for other in beside[1:]:
            if "tokens" in other and "tokens" in beside[0] and not torch.equal(other["tokens"], beside[0]["tokens"]):
                raise CacheError(f"{row[hook_points[0]].path} and the files of the other hook points hold different tokens")
        attended = beside[0].get("attention_mask", torch.ones(shape)).bool()
        samples["tokens"] = beside[0]["tokens"].long() if "tokens" in beside[0] else torch.full(shape, -1)
        samples["mask"] = beside[0]["mask"].bool() & attended if "mask" in beside[0] else attended
        if self.sequences:
            samples["attention_mask"] = attended
            meta = self._meta(index)
            samples["meta"] = [{**(meta[entry] if entry < len(meta) else {}), "spans": []} for entry in range(start, stop)]
        if origin:
            numbers = torch.arange(self._first[index] + start, self._first[index] + stop)
            samples[ORIGIN] = numbers if not self.context_size else numbers[:, None] * self.context_size + torch.arange(self.context_size)
        return samples

    def _read_meta(self, index: int) -> list[dict[str, Any]]:
        """The metadata beside a file; empty where there is none."""
        path = next(iter(self._rows[index].values())).path
        for candidate in (path.with_suffix(".meta.json"), path.with_name(f"{path.name}.meta.json")):
            if candidate.is_file():
                table = read_json(candidate, CacheError)
                return [entry if isinstance(entry, dict) else {} for entry in table] if isinstance(table, list) else []
        return []


def _listed(path: Path) -> list[Path]:
    """The files of one hook point, by name."""
    if path.is_file():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")) if path.is_dir() else []
    if not found:
        what = "no activations" if path.is_dir() else "no such file or folder"
        raise CacheError(f"{path}: {what}; wanted {', '.join(SUFFIXES)} files, or a cache with a {MANIFEST_FILE}")
    if len({file.suffix for file in found}) > 1:
        raise CacheError(f"{path} holds files of several kinds ({', '.join(sorted({file.suffix for file in found}))}); keep one kind in a folder")
    return found


def open_activations(path: str | Mapping[str, str], hook_points: Sequence[str], *, skip_damaged: bool = False) -> StoredActivations:
    """Whatever activations are at `path`: a cache of our own, a folder with a folder for each hook point, or (for one hook point) a folder of files or a
    file; a mapping names the place of each hook point.

    Raises:
        CacheError: there is none, it is not finished, damaged, or lacks a hook point.
    """
    if isinstance(path, Mapping):
        missing = [hook for hook in hook_points if hook not in path]
        if missing:
            raise CacheError(f"path has no entry for hook point {missing[0]}{did_you_mean(missing[0], path)} (there: {', '.join(path)})")
        places = {hook: Path(path[hook]) for hook in hook_points}
        if any((place / MANIFEST_FILE).is_file() for place in places.values()):
            if len(set(places.values())) > 1:
                raise CacheError("a cache holds all its hook points in one folder: set path to that folder, or give each cache a source of its own")
            return open_activations(str(next(iter(places.values()))), hook_points, skip_damaged=skip_damaged)
    else:
        root = Path(path)
        if (root / MANIFEST_FILE).is_file():
            cache = ActivationCache(root, skip_damaged=skip_damaged)
            cache.require(hook_points)
            return cache
        if root.is_dir() and begun_parts(root):
            raise CacheError(f"{root} is not finished: run lm-saes generate again to go on, or lm-saes cache finish {root} to use what is there")
        places = {hook: inside(root, hook, CacheError, "hook_points") for hook in hook_points}
        if len(hook_points) == 1 and not places[hook_points[0]].exists():
            places = {hook_points[0]: root}
    return ActivationFiles(places, skip_damaged=skip_damaged)
