"""Checkpoints are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_saes.errors import RunFolderError
from lm_saes.training import checkpoint as module
from lm_saes.training.checkpoint import (
    damage,
    find_checkpoint,
    is_whole,
    load_weights,
    newest_checkpoint,
    read_checkpoint,
    remove_old,
    resumable_folders,
    write_checkpoint,
)
from lm_saes.training.run_folder import RunFolder, write_json
from tests.training.synthetic import make_dictionary

BUFFER = torch.arange(5)
STREAM = {"position": 3, "nested": [{"buffer": torch.arange(5)}, None, "text", 0.1], "empty": {}, "view": BUFFER[1:3], "same": [BUFFER, BUFFER]}


def write(folder: Path, step: int, stream: dict[str, Any] | None = STREAM) -> Path:
    return write_checkpoint(folder, step, make_dictionary().save_pretrained, {"a/b": torch.tensor([1.5, 2.5])}, {"number": 0.1}, stream)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path, 7)
    assert names(tmp_path) == ["latest", "step_7"]
    assert sorted(child.name for child in path.iterdir()) == [
        "config.json",
        "optimizer.safetensors",
        "sae_weights.safetensors",
        "state.json",
        "stream",
    ]
    read = read_checkpoint(path)
    assert (read.state["number"], read.state["step"]) == (0.1, 7)
    assert read.tensors["a/b"].tolist() == [1.5, 2.5]
    assert read.stream is not None
    assert read.stream["nested"][0]["buffer"].tolist() == [0, 1, 2, 3, 4]
    assert read.stream["nested"][1:] == [None, "text", 0.1]
    assert read.stream["view"].tolist() == [1, 2]
    assert [tensor.tolist() for tensor in read.stream["same"]] == [[0, 1, 2, 3, 4]] * 2
    assert (read.stream["position"], read.stream["empty"]) == (3, {})
    assert read_checkpoint(write(tmp_path, 8, stream=None)).stream is None


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 7, stream=None)
    assert read_checkpoint(write(tmp_path, 7)).stream is not None
    assert names(tmp_path) == ["latest", "step_7"]


def test_the_newest_whole_one_is_found(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (2, 9, 10):
        write(tmp_path, step)
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(tmp_path) == folder / "step_10"
    (folder / "step_10" / "optimizer.safetensors").write_bytes(b"cut")
    assert newest_checkpoint(tmp_path) == folder / "step_9"
    (folder / "latest").write_text("../../elsewhere")
    assert newest_checkpoint(tmp_path) == folder / "step_9"
    (folder / "latest").write_bytes(b"\xff\xfe")
    (folder / "step_9" / "state.json").write_text("{")
    assert newest_checkpoint(tmp_path) == folder / "step_2"
    (folder / "step_2" / "stream" / "state.json").unlink()
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("where", ["sae_weights", "optimizer", "state", "latest"])
def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(where, tmp_path, monkeypatch):
    write(tmp_path, 1)
    full = OSError(errno.ENOSPC, "No space left on device")

    def raise_full(*_: Any, **__: Any):
        raise full

    if where == "optimizer":
        monkeypatch.setattr(module, "save_file", raise_full)
    elif where == "state":
        monkeypatch.setattr(module.json, "dumps", raise_full)
    elif where == "latest":
        monkeypatch.setattr(module, "write_atomically", raise_full)
    save = raise_full if where == "sae_weights" else make_dictionary().save_pretrained
    with pytest.raises(RunFolderError, match="disk is full") as caught:
        write_checkpoint(tmp_path, 2, save, {"a": torch.ones(1)}, {}, STREAM)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    whole = ["latest", "step_1", *(["step_2"] if where == "latest" else [])]
    assert names(tmp_path) == whole
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / ("step_2" if where == "latest" else "step_1")  # `latest` only tells


def test_left_overs_of_a_killed_process_are_removed_by_the_next(tmp_path):
    (tmp_path / "checkpoints" / ".unfinished_step_3" / "stream").mkdir(parents=True)
    (tmp_path / ".saving-abc").mkdir()
    (tmp_path / ".unfinished_settings.json").write_text("{")
    RunFolder(tmp_path).open()
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]
    (tmp_path / "checkpoints" / ".unfinished_step_3" / "stream").mkdir(parents=True)
    write(tmp_path, 4)
    assert names(tmp_path) == ["latest", "step_4"]


def test_a_checkpoint_is_found_by_its_own_folder_or_the_runs(tmp_path):
    path = write(tmp_path, 4)
    assert find_checkpoint(path) == find_checkpoint(tmp_path) == path
    with pytest.raises(RunFolderError, match="no whole checkpoint"):
        find_checkpoint(tmp_path / "elsewhere")


def test_the_run_folder_decides_who_may_use_it(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.path.exists()
    folder.open()
    folder.open(resume=True)
    assert not folder.begun
    (folder.path / "settings.json").write_text("{}")
    folder.open()
    assert folder.begun
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl of an earlier run"):
        folder.open()
    folder.open(resume=True)  # a run that was stopped before its first checkpoint starts afresh
    write(folder.path, 3)
    folder.open(resume=True)
    with pytest.raises(RunFolderError, match=r"holds the .* of an earlier run"):
        folder.open()
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"holds config\.json but no checkpoint"):
        RunFolder(tmp_path / "finished").open(resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(tmp_path / "file").open()


def test_a_file_in_the_place_of_the_checkpoints_is_one_line(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(RunFolderError, match=r"cannot write checkpoint .*step_1: .*checkpoints"):
        write(tmp_path, 1)


def test_a_file_system_that_cannot_flush_folders_will_do(tmp_path, monkeypatch):
    original = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        original(descriptor)

    monkeypatch.setattr("os.fsync", files_only)
    assert is_whole(write(tmp_path, 1))

    def nothing(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", nothing)
    with pytest.raises(RunFolderError, match="Input/output error"):
        write(tmp_path, 2)


def test_a_system_that_flushes_only_files_open_for_writing_will_do(tmp_path, monkeypatch):
    """As Windows."""
    open_, flushed = os.open, set[int]()

    def no_folders(path, flags, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_(path, flags, *arguments, **options)

    def writable_only(descriptor: int) -> None:
        os.write(descriptor, b"")  # EBADF where it is open for reading
        flushed.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr("os.open", no_folders)
    monkeypatch.setattr("os.fsync", writable_only)
    path = write(tmp_path, 1)
    assert is_whole(path)
    assert {file.stat().st_ino for file in [*path.rglob("*"), path.parent / "latest"] if file.is_file()} <= flushed


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(RunFolderError, match=r"cannot write .*a\.json"):
        write_json(tmp_path / "missing" / "a.json", {})


# ---------------------------------------------------------------------------------------------------------- damage, retention


def flip(path: Path, at: float = 0.5) -> None:
    """Turn one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


FILES = ["config.json", "sae_weights.safetensors", "optimizer.safetensors", "stream/state.json", "stream/tensors.safetensors"]


@pytest.mark.parametrize("name", [*FILES, "state.json"])
def test_every_kind_of_damage_to_every_file_is_found_and_named(name, tmp_path):
    path = write(tmp_path, 7)
    assert damage(path) is None
    whole = (path / name).read_bytes()
    (path / name).unlink()
    assert damage(path) == f"{name} is missing"
    (path / name).write_bytes(whole[: len(whole) // 2])
    assert str(damage(path)).startswith(f"{name} ")
    assert not is_whole(path)
    (path / name).write_bytes(whole)
    assert damage(path) is None
    for at in (0.0, 0.1, 0.5, 0.9):
        flip(path / name, at)
        found = damage(path)
        assert found is None or name in found
        assert found is not None or json.loads((path / name).read_bytes()) == json.loads(whole), "a bit between the values of state.json"
        (path / name).write_bytes(whole)


def test_a_name_in_state_json_does_not_lead_out_of_the_folder(tmp_path):
    path = write(tmp_path, 7)
    (tmp_path / "outside").write_text("x")
    table = json.loads((path / "state.json").read_text())
    table.pop("xxh3")
    table["files"]["../../outside"] = {"bytes": 1, "xxh3": ""}
    (path / "state.json").write_text(json.dumps({**table, "xxh3": module._own_checksum(table)}))
    assert "nothing outside" in str(damage(path))


def test_the_last_few_stay_and_of_planned_ones_the_dictionary(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    remove_old(tmp_path, 2, planned={1, 2, 4, 5})
    assert names(tmp_path) == ["latest", "step_1", "step_2", "step_4", "step_5"]
    assert sorted(resumable_folders(tmp_path)) == [4, 5]
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        assert sorted(child.name for child in folder.iterdir()) == ["config.json", "sae_weights.safetensors"]
        assert find_checkpoint(folder) == folder
        load_weights(make_dictionary(seed=3), folder)
    write(tmp_path, 3)  # as a process leaves it that is killed while it removes its state
    (tmp_path / "checkpoints" / "step_3" / "state.json").unlink()
    remove_old(tmp_path, 2, planned={1, 2, 3, 4, 5})
    assert names(tmp_path) == ["latest", "step_1", "step_2", "step_3", "step_4", "step_5"]
    assert sorted(child.name for child in (tmp_path / "checkpoints/step_3").iterdir()) == ["config.json", "sae_weights.safetensors"]
    (tmp_path / "checkpoints" / "step_5" / "optimizer.safetensors").write_bytes(b"")
    write(tmp_path, 6)
    remove_old(tmp_path, 2, planned=())
    assert sorted(resumable_folders(tmp_path)) == [4, 5, 6], "a damaged one counts for nothing"
    assert names(tmp_path) == ["latest", *(f"step_{step}" for step in range(1, 7))], "dictionaries stay"


def test_killed_between_the_two_renames_of_a_replacement_the_old_one_is_put_back(tmp_path):
    path = write(tmp_path, 7)
    path.rename(path.with_name(".unfinished_replaced_7"))
    RunFolder(tmp_path).open(resume=True)
    assert newest_checkpoint(tmp_path) == path
    assert damage(path) is None


def test_two_cannot_write_one_run(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run")
    with folder.owned(), pytest.raises(RunFolderError, match=r"^the run in .*run is being written by process"), RunFolder(folder.path).owned():
        pass
    assert not (tmp_path / "a").exists(), "nothing came of it"
    with folder.owned():
        (folder.path / "settings.json").write_text("{}")
    assert (folder.path / "settings.json").exists()


def test_a_folder_that_cannot_be_made_or_that_vanishes_is_one_line(tmp_path):
    with pytest.raises(RunFolderError, match=r"cannot write .*name too long"), RunFolder(tmp_path / ("a" * 300)).owned():
        pass

    def lose_the_folder():
        with RunFolder(tmp_path / "run").owned():
            shutil.rmtree(tmp_path / "run")
            write_json(tmp_path / "run" / "settings.json", {})

    with pytest.raises(RunFolderError, match="cannot write"):
        lose_the_folder()
