"""Tensors from files that anybody may have written. Nothing in them is run, and none takes more memory than a small multiple of its own size.

The only place that opens `.safetensors` for their tensors, `.pt` (tensors in plain containers, by torch's restricted unpickler), `.npz` and `.npy`
(without pickles). What is wrong with a file is said in one line.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from lm_saes.errors import LmSaesError
from lm_saes.files import parse_json

LARGEST_HEADER = 32 * 2**20
"""Bytes of a safetensors header; a tensor takes about a hundred."""
LARGEST_RATIO = 64
"""How many times its size a compressed archive may unfold to. Weights hardly compress at all."""
SMALL = 16 * 2**20
"""Bytes that any archive may unfold to."""


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """The table of a safetensors file (`{name: {"dtype", "shape", "data_offsets"}}`), its metadata, and where the data begin. The library checks
    that offsets neither overlap nor leave holes nor leave the file, and that shapes are as long as their bytes.

    Raises:
        Exception: whatever the library raises; see `file_errors`.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"its header claims {length:,} bytes, more than {LARGEST_HEADER:,}")
        table = parse_json(file.read(length).decode("utf-8"))
    with safe_open(str(path), framework="pt"):
        pass
    metadata = table.pop("__metadata__", None) or {}
    return table, metadata, 8 + length


def read_safetensors(path: Path, error: type[LmSaesError]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        error: it is damaged, or something else.
    """
    try:
        _, metadata, _ = read_header(path)
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  the file is not a dict
    except Exception as fault:  # of the library, of torch or of the disk: they have no common base
        raise error(f"{path} is damaged or not safetensors: {reason(fault)}") from None


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a safetensors file takes them: on the CPU, contiguous, each with memory of its own. Copied only where they are not like that."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


def fingerprint(table: Mapping[str, Any]) -> str:
    """XXH3 of the tensors in a table, in the order of their names."""
    digest = xxhash.xxh3_64()
    for name in sorted(table):
        if isinstance(table[name], Tensor):
            digest.update(table[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_torch(path: Path, error: type[LmSaesError], mmap: bool = False) -> Any:
    """What `torch.save` wrote: tensors in plain containers. Any other object is refused, so that no code from the file runs; and so are compressed
    archives and tensors larger than the file, which torch does not write.

    Raises:
        error: the file is damaged or holds other things.
    """
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size for entry in archive.infolist()):
                    raise ValueError("it is compressed, which torch.save never does")
        with warnings.catch_warnings():  # of unusual pickles; either they are read in full or refused here
            warnings.simplefilter("ignore", UserWarning)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        for tensor in tensors_in(loaded):
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.nbytes > size:
                raise ValueError(f"it holds a tensor of shape {list(tensor.shape)} that is larger than the file, or not plain")
        return loaded
    except Exception as fault:  # of the unpickler above all, which may raise anything
        raise error(f"{path} is damaged or holds more than tensors in plain containers, which are all that is read: {reason(fault)}") from None


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers, which may hold themselves."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return found


def read_npz(path: Path, error: type[LmSaesError]) -> dict[str, Tensor]:
    """The arrays of an npz file; pickled ones are refused, and so is an archive that unfolds to many times its size.

    Raises:
        error: it is damaged, or holds other things.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            unfolded = sum(entry.file_size for entry in archive.infolist())
        if unfolded > max(LARGEST_RATIO * size, SMALL):
            raise ValueError(f"its {size:,} bytes would unfold to {unfolded:,}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    except Exception as fault:  # of zip, of zlib, of NumPy
        raise error(f"{path} is damaged or holds more than arrays of numbers: {reason(fault)}") from None


def map_npy(path: Path) -> np.memmap[Any, Any]:
    """The array of a npy file, mapped into memory; pickled ones are refused.

    Raises:
        Exception: it is damaged, or something else.
    """
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.memmap):
        raise ValueError("it is not one array")
    return array


def reason(fault: BaseException) -> str:
    """What an exception says, in a few words: torch's go on for a page about how to turn its safety off."""
    if isinstance(fault, KeyError):
        return f"it lacks {fault}"
    if isinstance(fault, json.JSONDecodeError):
        return f"its header is not JSON ({fault})"
    text = " ".join(str(fault).split("\n\n")[0].split())
    sentence = text.split(". ")[0]
    return (sentence if len(sentence) <= 200 else sentence[:197] + "...") or type(fault).__name__
