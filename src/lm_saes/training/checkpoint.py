"""Checkpoints of a run: written whole or not at all, checked when they are read, and read without unpickling.

    checkpoints/step_<n>/
        config.json sae_weights.safetensors    the dictionary, unfolded; `from_pretrained` folds when it loads
        optimizer.safetensors                  the optimizer and every other tensor of the trainer
        stream/state.json stream/tensors.safetensors
        state.json                             the trainer's numbers; size and checksum of each other file, and a checksum of its own
    checkpoints/latest                         the name of the newest whole one

A checkpoint is written under a temporary name in the same folder, flushed to the disk and renamed; `latest` is replaced afterwards.
Whatever interrupts that leaves the older checkpoints as they were. What is removed is renamed first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from lm_saes.activations.stream import packed, unpacked
from lm_saes.errors import LmSaesError, RunFolderError
from lm_saes.files import UNFINISHED, flush, inside, parse_json
from lm_saes.models.pretrained import WEIGHTS_FILE, read_weights
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.tensor_files import read_safetensors, separate
from lm_saes.training.run_folder import (
    CHECKPOINTS,
    DICTIONARY_FILES,
    METRICS_FILE,
    REPLACED,
    disk_errors,
    remove,
    write_atomically,
)

SCHEMA_VERSION = 2
STATE_FILE = "state.json"
TENSORS_FILE = "optimizer.safetensors"
STREAM_FOLDER = "stream"
_STREAM_TENSORS = "tensors.safetensors"
_STEP = re.compile(r"step_(\d{1,18})")
_PIECE = 16 * 2**20


class Checkpoint(NamedTuple):
    """What a checkpoint holds beside the dictionary."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    stream: dict[str, Any] | None
    """The stream's state; `None` where the stream had none."""


# ------------------------------------------------------------------------------------------------------------ writing


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: what they are copies of may change afterwards."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in tensors.items()}


def write_checkpoint(
    run_folder: str | Path,
    step: int,
    save_dictionary: Callable[[Path], None],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    stream: dict[str, Any] | Path | None,
) -> Path:
    """Write `checkpoints/step_<step>/` in a run's folder and name it in `latest`. A checkpoint of that step is replaced.

    Args:
        save_dictionary: writes `config.json` and `sae_weights.safetensors` into the folder it is given.
        tensors: go to `optimizer.safetensors`.
        state: JSON values, go to `state.json`.
        stream: the stream's state, as `packed` takes it; or a checkpoint that holds it, whose files are shared (hard links; copies where the file
            system has none).

    Raises:
        RunFolderError: the disk is full or cannot be written, or the stream's state cannot be saved; older checkpoints are intact.
    """
    folder = Path(run_folder) / CHECKPOINTS
    final, temporary, replaced = folder / f"step_{step}", folder / f"{UNFINISHED}step_{step}", folder / f"{REPLACED}{step}"
    plain, stream_tensors = packed(None if isinstance(stream, Path) else stream, RunFolderError)
    with disk_errors(f"checkpoint {final}", temporary):
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(f"{UNFINISHED}*"):
            remove(left_over)
        (temporary / STREAM_FOLDER).mkdir(parents=True)
        save_dictionary(temporary)
        save_file(separate(tensors), temporary / TENSORS_FILE)
        shared: dict[str, Any] = {}
        if isinstance(stream, Path):
            shared = {name: entry for name, entry in read_state(stream)["files"].items() if name.startswith(f"{STREAM_FOLDER}/")}
            for path in (stream / STREAM_FOLDER).iterdir():
                _link(path, temporary / STREAM_FOLDER / path.name)
        elif stream is not None:
            save_file(separate(stream_tensors), temporary / STREAM_FOLDER / _STREAM_TENSORS)
            (temporary / STREAM_FOLDER / STATE_FILE).write_text(json.dumps(plain), encoding="utf-8")
        written = {path.relative_to(temporary).as_posix(): path for path in sorted(temporary.rglob("*")) if path.is_file()}
        files = {name: shared.get(name) or {"bytes": path.stat().st_size, "xxh3": _checksum(path)} for name, path in written.items()}
        table = {"schema_version": SCHEMA_VERSION, **state, "step": step, "files": files}
        (temporary / STATE_FILE).write_text(json.dumps({**table, "xxh3": _own_checksum(table)}, indent=1), encoding="utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        if (metrics := Path(run_folder) / METRICS_FILE).is_file():
            flush(metrics)  # its lines up to this step are never behind the checkpoint, even when the machine goes down
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        flush(folder)
        write_atomically(folder / "latest", final.name + "\n")
        remove(replaced)
    return final


def remove_old(run_folder: str | Path, keep: int, planned: Collection[int]) -> None:
    """Leave the newest `keep` whole checkpoints. Of older ones of the plan the dictionary stays, for whoever studies how it came about; the others go.
    What a killed process has done of that is brought to its end.

    Raises:
        RunFolderError: the disk cannot be written.
    """
    folders = checkpoint_folders(run_folder)
    whole = [step for step in sorted(folders, reverse=True) if is_whole(folders[step])]
    with disk_errors(f"{run_folder}/{CHECKPOINTS}"):
        for step, path in folders.items():
            state = [path / name for name in (STATE_FILE, TENSORS_FILE, STREAM_FOLDER)]
            if not whole or step >= min(whole[:keep]) or not any(part.exists() for part in state):
                continue
            if step in planned:
                for part in state:  # without the first nobody takes it for whole
                    remove(part)
            else:
                discard(path)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint. It loses its name first, so that what a killed process leaves of it is nobody's checkpoint."""
    doomed = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}")
    checkpoint.rename(doomed)
    remove(doomed)


def _link(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(path, other)


def _checksum(path: Path) -> str:
    """XXH3 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _own_checksum(table: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(table).encode())


# ------------------------------------------------------------------------------------------------------------ reading


def checkpoint_folders(run_folder: str | Path) -> dict[int, Path]:
    """The folders of checkpoints in a run's folder by their step, whole or not."""
    found = ((_STEP.fullmatch(path.name), path) for path in (Path(run_folder) / CHECKPOINTS).glob("step_*"))
    return {int(match[1]): path for match, path in found if match}


def resumable_folders(run_folder: str | Path) -> dict[int, Path]:
    """Those of them that are meant to be gone on from: not the old ones of which only the dictionary was left."""
    folders = checkpoint_folders(run_folder)
    return {step: path for step, path in folders.items() if (path / STATE_FILE).exists() or (path / TENSORS_FILE).exists()}


def newest_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a run's folder; `None` if there is no whole one. Sizes are looked at, not contents (`damage` does)."""
    folders = checkpoint_folders(run_folder)
    return next((folders[step] for step in sorted(folders, reverse=True) if is_whole(folders[step])), None)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        table = parse_json(path.read_bytes(), tolerant=True)  # a state may hold infinity
    except ValueError as error:
        raise RunFolderError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise RunFolderError(f"{path.name} must hold a JSON object, got {type(table).__name__}")
    return table


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`, checked against itself.

    Raises:
        RunFolderError: it cannot be read, is damaged, or of another version. FileNotFoundError: there is none.
    """
    state = _json_object(folder / STATE_FILE)
    checksum = state.pop("xxh3", None)
    if state.get("schema_version") != SCHEMA_VERSION:
        raise RunFolderError(f"{STATE_FILE} has schema version {state.get('schema_version')!r}, this version of the library reads {SCHEMA_VERSION}")
    if checksum != _own_checksum(state) or not isinstance(state.get("files"), dict):
        raise RunFolderError(f"{STATE_FILE} is not what was written")
    return state


def is_whole(folder: Path) -> bool:
    """Whether `state.json` is sound and each file that it lists is there in full."""
    return damage(folder, contents=False) is None


def damage(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in a few words; `None` if nothing is. With `contents` every byte is read and compared."""
    try:
        for name, entry in read_state(folder)["files"].items():
            path = inside(folder, name, RunFolderError, STATE_FILE)
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{name} has {size:,} of {entry['bytes']:,} bytes"
            if contents and _checksum(path) != entry["xxh3"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (LmSaesError, OSError, KeyError, TypeError) as error:
        return str(error).replace(f"{folder}/", "") if isinstance(error, LmSaesError) else f"{STATE_FILE} or a file beside it cannot be read"
    return None


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint from its own folder or from its run's folder (the newest whole one), to take weights from: those of an old checkpoint, of which
    only the dictionary is left, will do.

    Raises:
        RunFolderError: there is none.
    """
    path = Path(path)
    found = path if all((path / name).is_file() for name in DICTIONARY_FILES) and _STEP.fullmatch(path.name) else newest_checkpoint(path)
    if found is None:
        raise RunFolderError(f"no whole checkpoint at {path}; give a run's folder, or one of its checkpoints/step_<n>")
    return found


def read_checkpoint(folder: Path, with_stream: bool = True) -> Checkpoint:
    """Everything in a checkpoint but the dictionary, on the CPU; the stream's state, which may be large, only `with_stream`.

    Raises:
        RunFolderError: it cannot be read.
    """
    try:
        state = read_state(folder)
        tensors, _ = read_safetensors(folder / TENSORS_FILE, RunFolderError)
        stream = None
        if with_stream and (folder / STREAM_FOLDER / STATE_FILE).is_file():
            stream_tensors, _ = read_safetensors(folder / STREAM_FOLDER / _STREAM_TENSORS, RunFolderError)
            stream = unpacked(_json_object(folder / STREAM_FOLDER / STATE_FILE), stream_tensors)
    except (OSError, KeyError, TypeError) as error:
        raise RunFolderError(f"checkpoint {folder} cannot be read: {' '.join(str(error).split())}") from None
    except RunFolderError as error:
        raise RunFolderError(f"checkpoint {folder} cannot be read: {error}") from None
    return Checkpoint(folder, state, tensors, stream)


def load_weights(sae: SparseDictionary, checkpoint: Path) -> None:
    """Give `sae` the weights, buffers and mean norms of a saved dictionary that was not folded.

    Raises:
        RunFolderError: the saved dictionary has another shape or another space.
    """
    saved, tensors, own = type(sae.cfg).from_pretrained(checkpoint), read_weights(checkpoint / WEIGHTS_FILE), sae.state_dict()
    fields = ("d_model", "d_sae", "act_fn", "norm_activation", "associated_hook_points")
    differing = [name for name in fields if getattr(saved, name) != getattr(sae.cfg, name)]
    differing = differing or sorted(own.keys() ^ tensors.keys()) or [name for name in own if own[name].shape != tensors[name].shape]
    if differing:
        raise RunFolderError(
            f"the dictionary in {checkpoint} differs from this one in {', '.join(differing)}; use the configuration that it was trained with"
        )
    sae.load_state_dict(tensors)
    if saved.dataset_average_activation_norm is not None:
        sae.set_dataset_average_activation_norm(saved.dataset_average_activation_norm)
