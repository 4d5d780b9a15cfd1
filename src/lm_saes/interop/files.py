"""Reading files that others wrote: nothing in them is run, and what is wrong with them is said in one line."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lm_saes import tensor_files
from lm_saes.errors import WeightsError
from lm_saes.files import read_json_object


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: the file is not one.
    """
    return read_json_object(path, WeightsError)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        WeightsError: it is damaged, or something else.
    """
    return tensor_files.read_safetensors(path, WeightsError)[0]


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote: tensors in plain containers. Any other Python object is refused, so that no code from the file runs.

    Raises:
        WeightsError: the file is damaged or holds other objects.
    """
    return tensor_files.read_torch(path, WeightsError)


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz file; pickled ones are refused.

    Raises:
        WeightsError: it is damaged, or holds pickled objects.
    """
    return tensor_files.read_npz(path, WeightsError)


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
