"""The folder of a run: who may use it, and the small files that are written there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lm_saes.config.dictionaries import CONFIG_FILE
from lm_saes.errors import LmSaesError, RunFolderError
from lm_saes.files import UNFINISHED, disk_is_full, existing_part, finite, read_json_object, write_whole
from lm_saes.locks import LOCK_FILE, Owner, exclusive
from lm_saes.models.pretrained import WEIGHTS_FILE

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
FAILURE_FILE = "failure.json"
REPLACED = f"{UNFINISHED}replaced_"
DICTIONARY_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_BEGUN = (METRICS_FILE, "settings.json", "initialization.json")


class RunFolder:
    """The folder of a run (`exp_result_path`). Making this object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.begun = False
        """Whether `open` found what an earlier run left."""

    @contextmanager
    def owned(self, what: str = "run") -> Iterator[Owner | None]:
        """Nobody else writes to the folder, which is made, while this is open. Gives the owner before, if it was killed.

        Raises:
            RunFolderError: another process writes there, which the message names; or the folder cannot be made.
        """
        self._must_be_a_folder()
        with disk_errors(str(self.path)):
            made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            with exclusive(self.path / LOCK_FILE, f"the {what} in {self.path}") as former:
                yield former
        finally:
            with suppress(OSError):  # the folder may be gone
                if made and all(path.name == LOCK_FILE for path in self.path.iterdir()):  # nothing came of it
                    (self.path / LOCK_FILE).unlink(missing_ok=True)
                    for folder in made:
                        folder.rmdir()

    def check(self, resume: bool = False) -> None:
        """Whether a run can be had here. Touches nothing.

        Raises:
            RunFolderError: the folder was used and `resume` is false; or it holds a run's dictionary and no checkpoint; or it is, or would be in,
                a file or a folder that cannot be written.
        """
        if not os.access(there := self._must_be_a_folder(), os.W_OK):
            raise RunFolderError(f"cannot write {self.path}: no permission to write to {there}; choose another exp_result_path")
        used = [name for name in (METRICS_FILE, CHECKPOINTS, *DICTIONARY_FILES) if _holds_something(self.path / name)]
        if used and not resume:
            raise RunFolderError(f"{self.path} holds the {used[0]} of an earlier run; resume that run, or choose another exp_result_path")
        if CONFIG_FILE in used and CHECKPOINTS not in used:
            raise RunFolderError(f"{self.path} holds {CONFIG_FILE} but no checkpoint to resume from; choose another exp_result_path")

    def open(self, resume: bool = False) -> None:
        """Make the folder ready for a run: refuse one that cannot be used (see `check`), and mend what a killed process left.

        Raises:
            RunFolderError: as `check`.
        """
        self._must_be_a_folder()
        checkpoints = self.path / CHECKPOINTS
        with disk_errors(str(self.path)):
            self.path.mkdir(parents=True, exist_ok=True)
            for old in checkpoints.glob(f"{REPLACED}*"):  # killed between the two renames of a replacement
                place = checkpoints / f"step_{old.name.removeprefix(REPLACED)}"
                if not place.exists():
                    old.rename(place)
            left = [
                *self.path.glob(f"{UNFINISHED}*"),
                *checkpoints.glob(f"{UNFINISHED}*"),
                *self.path.glob(".saving-*"),
            ]  # the last: `save_pretrained`
            for path in left:
                remove(path)
        self.check(resume)
        self.begun = any((self.path / name).is_file() for name in _BEGUN)

    def _must_be_a_folder(self) -> Path:
        """What there is of the path."""
        with disk_errors(str(self.path)):
            there = existing_part(self.path)
        if not there.is_dir():
            where = "is a file" if there == self.path else f"would be in the file {there}"
            raise RunFolderError(f"the run's folder {self.path} {where}; choose another exp_result_path")
        return there


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(child.name.startswith("step_") for child in path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file: after a crash it holds the old text or the new one."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, table: Any) -> None:
    """Write a JSON file, whole or not at all; numbers that are not finite become null.

    Raises:
        RunFolderError: the disk is full or cannot be written.
    """
    with disk_errors(str(path)):
        write_atomically(Path(path), json.dumps(finite(table), indent=2, allow_nan=False) + "\n")


def write_failure(run_folder: str | Path, step: int, error: Exception) -> None:
    """Keep in a run's folder what stopped the run, and after how many steps."""
    with disk_errors(str(run_folder)):
        Path(run_folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(run_folder) / FAILURE_FILE, {"step": step, "error": str(error)})


def failure_of(run_folder: str | Path) -> str | None:
    """What stopped a run, if it was stopped by a number that is not finite and has not gone on since."""
    try:
        return str(read_json_object(Path(run_folder) / FAILURE_FILE, RunFolderError)["error"])
    except (OSError, KeyError, LmSaesError):
        return None


@contextmanager
def disk_errors(what: str, temporary: Path | None = None) -> Iterator[None]:
    """Turn an error of the disk into one line, and remove the file or folder that is not finished."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            with suppress(OSError):  # what stands in the way of writing may stand in the way of removing
                remove(temporary)
        reason = "the disk is full; free some space, or lower keep_checkpoints" if disk_is_full(error) else " ".join(str(error).split())
        raise RunFolderError(f"cannot write {what}: {reason}") from None


def remove(path: Path) -> None:
    """Remove a file or a folder, whichever it is, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
