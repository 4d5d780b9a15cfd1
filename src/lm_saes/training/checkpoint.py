"""Checkpoints of a run: written whole or not at all, read without unpickling.

    checkpoints/step_<n>/
        config.json sae_weights.safetensors    the dictionary, unfolded; `from_pretrained` folds when it loads
        optimizer.safetensors                  the optimizer and every other tensor of the trainer
        stream/state.json stream/tensors.safetensors
        state.json                             the trainer's numbers, and the size of each other file
    checkpoints/latest                         the name of the newest whole one

A checkpoint is written under a temporary name in the same folder, flushed to the disk and renamed; `latest` is replaced afterwards.
Whatever interrupts that leaves the older checkpoints as they were.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm_saes.config.dictionaries import CONFIG_FILE
from lm_saes.errors import RunFolderError
from lm_saes.models.pretrained import WEIGHTS_FILE, read_weights
from lm_saes.models.sparse_dictionary import SparseDictionary

STATE_FILE = "state.json"
TENSORS_FILE = "optimizer.safetensors"
STREAM_FOLDER = "stream"
METRICS_FILE = "metrics.jsonl"
FAILURE_FILE = "failure.json"
_TEMPORARY = ".unfinished_"
_DICTIONARY_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_TENSOR_KEY = "__tensor__"


class Checkpoint(NamedTuple):
    """What a checkpoint holds beside the dictionary."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    stream: dict[str, Any] | None
    """The stream's state; `None` where the stream had none."""


class RunFolder:
    """The folder of a run (`exp_result_path`). Making this object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def open(self, resume: bool = False) -> Path | None:
        """Make the folder ready for a run. With `resume`, the newest whole checkpoint to go on from, if the folder holds any; a run that
        was stopped before its first one starts afresh.

        Raises:
            RunFolderError: the folder was used and `resume` is false; or its checkpoints are all damaged; or it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"the run's folder {self.path} is a file; choose another exp_result_path")
        used = [name for name in (METRICS_FILE, "checkpoints", *_DICTIONARY_FILES) if _holds_something(self.path / name)]
        if used and not resume:
            raise RunFolderError(f"{self.path} holds the {used[0]} of an earlier run; resume that run, or choose another exp_result_path")
        newest = newest_checkpoint(self.path)
        if newest is None and used and used != [METRICS_FILE]:
            raise RunFolderError(f"{self.path} holds {used[-1]} but no whole checkpoint to resume from; choose another exp_result_path")
        with disk_errors(str(self.path)):
            self.path.mkdir(parents=True, exist_ok=True)
            if newest is None:
                (self.path / METRICS_FILE).unlink(missing_ok=True)
        return newest


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(not child.name.startswith(_TEMPORARY) for child in path.iterdir())
    return path.is_file() and path.stat().st_size > 0


# ------------------------------------------------------------------------------------------------------------ writing


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
        stream: the stream's state: nested dicts and lists of JSON values and tensors; or a checkpoint that holds it, whose files are shared
            (hard links; copies where the file system has none).

    Raises:
        RunFolderError: the disk is full or cannot be written; older checkpoints are intact.
    """
    folder = Path(run_folder) / "checkpoints"
    final, temporary = folder / f"step_{step}", folder / f"{_TEMPORARY}step_{step}"
    with disk_errors(f"checkpoint {final}", temporary):
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(f"{_TEMPORARY}*"):
            _remove(left_over)
        (temporary / STREAM_FOLDER).mkdir(parents=True)
        save_dictionary(temporary)
        _save_tensors(temporary / TENSORS_FILE, tensors)
        if isinstance(stream, Path):
            for path in (stream / STREAM_FOLDER).iterdir():
                _link(path, temporary / STREAM_FOLDER / path.name)
        elif stream is not None:
            stream_tensors: dict[str, Tensor] = {}
            plain = _without_tensors(stream, stream_tensors)
            _save_tensors(temporary / STREAM_FOLDER / "tensors.safetensors", stream_tensors)
            (temporary / STREAM_FOLDER / STATE_FILE).write_text(json.dumps(plain), encoding="utf-8")
        files = {str(path.relative_to(temporary)): path.stat().st_size for path in sorted(temporary.rglob("*")) if path.is_file()}
        (temporary / STATE_FILE).write_text(json.dumps({**state, "step": step, "files": files}, indent=1), encoding="utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if final.exists():
            final.rename(folder / f"{_TEMPORARY}replaced_{step}")
        temporary.rename(final)
        _flush(folder)
        write_atomically(folder / "latest", final.name + "\n")
        _remove(folder / f"{_TEMPORARY}replaced_{step}")
    return final


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file: after a crash it holds the old text or the new one."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def write_json(path: str | Path, table: Any) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        RunFolderError: the disk is full or cannot be written.
    """
    with disk_errors(str(path)):
        write_atomically(Path(path), json.dumps(table, indent=2) + "\n")


def write_failure(run_folder: str | Path, step: int, error: Exception) -> None:
    """Keep in a run's folder what stopped the run, and after how many steps."""
    with disk_errors(str(run_folder)):
        Path(run_folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(run_folder) / FAILURE_FILE, {"step": step, "error": str(error)})


def failure_of(run_folder: str | Path) -> str | None:
    """What stopped a run, if it was stopped by a number that is not finite and has not gone on since."""
    try:
        return json.loads((Path(run_folder) / FAILURE_FILE).read_text(encoding="utf-8"))["error"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def disk_errors(what: str, temporary: Path | None = None) -> Iterator[None]:
    """Turn an error of the disk into one line, and remove the file or folder that is not finished."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            _remove(temporary)
        full = getattr(error, "errno", None) == 28 or "os error 28" in str(error) or "No space left" in str(error)
        reason = "the disk is full; free some space, or lower n_checkpoints" if full else " ".join(str(error).split())
        raise RunFolderError(f"cannot write {what}: {reason}") from None


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    saved: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != own.nbytes:  # safetensors takes no views
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        saved[name] = own
    save_file(saved, path)


def _link(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(path, other)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors` and referred to by name."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {_TENSOR_KEY: name}
    if isinstance(value, dict):
        return {str(key): _without_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, tensors) for item in value]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value[_TENSOR_KEY]] if value.keys() == {_TENSOR_KEY} else {key: _with_tensors(item, tensors) for key, item in value.items()}
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------------------ reading


def newest_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a run's folder: the one that `latest` names, or, where that is damaged or missing, the one of
    the highest step. `None` if there is no whole one."""
    folder = Path(run_folder) / "checkpoints"
    try:
        named = (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    if re.fullmatch(r"step_\d+", named) and _is_whole(folder / named):
        return folder / named
    return next((path for _, path in _checkpoints(run_folder) if _is_whole(path)), None)


def whole_checkpoints(run_folder: str | Path) -> dict[int, Path]:
    """The whole checkpoints in a run's folder by their step, the newest first."""
    return {step: path for step, path in _checkpoints(run_folder) if _is_whole(path)}


def _checkpoints(run_folder: str | Path) -> list[tuple[int, Path]]:
    folder = Path(run_folder) / "checkpoints"
    return sorted(((int(path.name[5:]), path) for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), reverse=True)


def _is_whole(folder: Path) -> bool:
    """Whether the folder's `state.json` can be read and each file that it lists is there in full."""
    try:
        files = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint from its own folder or from its run's folder (the newest whole one).

    Raises:
        RunFolderError: there is none.
    """
    path = Path(path)
    found = path if _is_whole(path) else newest_checkpoint(path)
    if found is None:
        raise RunFolderError(f"no whole checkpoint at {path}; give a run's folder, or one of its checkpoints/step_<n>")
    return found


def read_checkpoint(folder: Path, with_stream: bool = True) -> Checkpoint:
    """Everything in a checkpoint but the dictionary, on the CPU; the stream's state, which may be large, only `with_stream`.

    Raises:
        RunFolderError: it cannot be read.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS_FILE)
        stream_file = folder / STREAM_FOLDER / STATE_FILE
        stream = None
        if with_stream and stream_file.is_file():
            stream_tensors = load_file(folder / STREAM_FOLDER / "tensors.safetensors")
            stream = _with_tensors(json.loads(stream_file.read_text(encoding="utf-8")), stream_tensors)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunFolderError(f"checkpoint {folder} cannot be read: {' '.join(str(error).split())}") from None
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
