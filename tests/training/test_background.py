"""Checkpoints written behind training: nothing of the state that goes on gets into them, and no error gets lost."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes.errors import RunFolderError
from lm_saes.training import checkpoint as checkpoint_module
from lm_saes.training import run as run_module
from lm_saes.training.background import BackgroundWriter
from lm_saes.training.checkpoint import damage, newest_checkpoint
from lm_saes.training.loggers import Logger
from lm_saes.training.trainer import Trainer
from tests.training.synthetic import SyntheticStream, make_dictionary


def test_one_job_at_a_time_and_errors_come_to_whoever_looks_next():
    order: list[str] = []
    gate = threading.Event()

    def slow() -> None:
        gate.wait()
        order.append("slow")

    def failing() -> None:
        order.append("failing")
        raise RunFolderError("the disk is full")

    with BackgroundWriter() as writer:
        writer.check()
        writer.write(slow)
        assert writer.busy
        writer.check()  # does not wait
        threading.Timer(0.01, gate.set).start()
        writer.write(failing)
        with pytest.raises(RunFolderError, match="the disk is full"):
            writer.wait()
        writer.check()  # said once
        writer.write(failing)
        while writer.busy:
            pass
        with pytest.raises(RunFolderError, match="the disk is full"):
            writer.check()
    assert order == ["slow", "failing", "failing"]
    with pytest.raises(RunFolderError, match="the disk is full"), BackgroundWriter() as writer:
        writer.write(failing)


def test_the_first_error_is_the_one_that_counts():
    def failing() -> None:
        raise RunFolderError("the disk is full")

    writer = BackgroundWriter()
    writer.write(failing)
    writer.__exit__(KeyError, KeyError(), None)  # lets the KeyError go on


class Steps(Logger):
    def __init__(self) -> None:
        self.done = 0

    def progress(self, step: int) -> None:
        self.done = step


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(trainer_config, monkeypatch):
    """The writing of step 4 waits until step 7 is done; what is written is the state after step 4."""
    steps, original = Steps(), run_module.write_checkpoint
    reached = threading.Event()

    class Noticing(SyntheticStream):
        def __next__(self) -> dict[str, Any]:
            if self.position == 7:
                reached.set()
            return super().__next__()

    def late(run_folder: Any, step: int, *arguments: Any) -> Path:
        if step == 4:
            assert reached.wait(30)
        return original(run_folder, step, *arguments)

    monkeypatch.setattr(run_module, "write_checkpoint", late)
    options: dict[str, Any] = {"n_checkpoints": 3, "check_point_save_mode": "linear", "auxk_coefficient": 0.03, "dead_threshold": 100}
    cfg = trainer_config(12, "late", **options)
    Trainer(cfg, loggers=[steps]).fit(make_dictionary(), Noticing(batch_size=64))
    monkeypatch.undo()
    in_time = trainer_config(12, "in_time", **options)
    Trainer(in_time).fit(make_dictionary(), SyntheticStream(batch_size=64))
    for name in ("sae_weights.safetensors", "optimizer.safetensors", "stream/tensors.safetensors"):
        a, b = (load_file(Path(one.exp_result_path) / "checkpoints" / "step_4" / name) for one in (cfg, in_time))
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_a_stream_whose_state_changes_while_it_is_written_is_refused(trainer_config, monkeypatch):
    """Its checkpoint would hold one moment's position and another's buffer."""
    original, reached = run_module.write_checkpoint, threading.Event()

    class Live(SyntheticStream):
        def __init__(self) -> None:
            super().__init__(batch_size=64)
            self.buffer = torch.zeros(5)

        def __next__(self) -> dict[str, Any]:
            self.buffer += 1
            if self.position == 7:
                reached.set()
            return super().__next__()

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "buffer": self.buffer}

    def late(*arguments: Any) -> Path:
        assert reached.wait(30)
        return original(*arguments)

    monkeypatch.setattr(run_module, "write_checkpoint", late)
    cfg = trainer_config(12, n_checkpoints=3, check_point_save_mode="linear")
    with pytest.raises(RunFolderError, match=r"state_dict\(\) gave tensors that changed when it went on.*; it must give copies"):
        Trainer(cfg).fit(make_dictionary(), Live())
    assert not list(Path(cfg.exp_result_path).glob("checkpoints/step_*"))


@pytest.mark.parametrize("at", [4, 12], ids=["surfaces while training", "surfaces at the end"])
def test_a_full_disk_behind_training_is_one_line_and_leaves_the_older_checkpoint(at, trainer_config, monkeypatch):
    original, threads = checkpoint_module.save_file, set(threading.enumerate())

    def full(tensors: Any, path: Any, **options: Any) -> None:
        if f"step_{at}/optimizer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, **options)

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    steps, cfg = Steps(), trainer_config(12, n_checkpoints=6, check_point_save_mode="linear")
    with pytest.raises(RunFolderError, match=rf"cannot write checkpoint .*step_{at}: the disk is full") as caught:
        Trainer(cfg, loggers=[steps]).fit(make_dictionary(), SyntheticStream(batch_size=64))
    assert "\n" not in str(caught.value)
    assert at <= steps.done <= at + 2, "at the next step, or the next checkpoint"
    newest = newest_checkpoint(cfg.exp_result_path)
    assert newest is not None
    assert newest.name == f"step_{at - 2}"
    assert damage(newest) is None
    assert set(threading.enumerate()) <= threads
