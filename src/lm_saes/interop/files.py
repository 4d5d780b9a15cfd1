"""Reading files that others wrote: nothing in them is run, and what is wrong with them is said in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm_saes.errors import WeightsError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: the file is not one.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict):
        raise WeightsError(f"{path} must hold a JSON object, got {type(table).__name__}")
    return table


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        WeightsError: it is damaged, or something else.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is damaged or not safetensors: {' '.join(str(error).split())}") from None


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote: tensors in plain containers. Any other Python object is refused, so that no code from the file runs.

    Raises:
        WeightsError: the file is damaged or holds other objects.
    """
    try:
        with warnings.catch_warnings():  # of unusual pickles; either they are read in full or refused here
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(f"{path} is damaged or holds more than tensors in plain containers, which are all that is read: {reason}") from None


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz file; pickled ones are refused.

    Raises:
        WeightsError: it is damaged, or holds pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{path} is damaged or holds more than arrays of numbers: {' '.join(str(error).split())}") from None


def take(tensors: Mapping[str, Tensor], names: Collection[str], origin: str, ignored: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of these names; there must be no others but the ignored ones.

    Raises:
        WeightsError: names that are missing or unexpected, or a tensor that is not floating-point.
    """
    faults = [f"{name} is missing" for name in names if name not in tensors]
    faults += [f"{name} is unexpected" for name in tensors if name not in names and name not in ignored]
    faults += [
        f"{name} is {str(tensors[name].dtype).removeprefix('torch.')}" for name in names if name in tensors and not tensors[name].is_floating_point()
    ]
    if faults:
        raise WeightsError(f"{origin}: {', '.join(faults)}; wanted floating-point tensors {', '.join(names)}")
    return {name: tensors[name] for name in names}


def write_folder(folder: str | Path, tables: Mapping[str, Mapping[str, Any]], weights: tuple[str, Mapping[str, Tensor]]) -> None:
    """Write JSON files and one safetensors file into a folder, which is made if need be; each appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        name, tensors = weights
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, work / name)
        for table_name, table in tables.items():
            (work / table_name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        for written in (name, *tables):
            os.replace(work / written, folder / written)
    finally:
        shutil.rmtree(work, ignore_errors=True)
