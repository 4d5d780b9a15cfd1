"""Where metrics go."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console as RichConsole

from lm_saes.config import TensorBoardConfig, TrackioConfig, WandbConfig
from lm_saes.errors import ConfigError, RunFolderError
from lm_saes.training import loggers as module
from lm_saes.training.loggers import Console, JsonLines, TensorBoardLogger, TrackioLogger, WandbLogger

METRICS = {"losses/overall_loss": 1.5, "metrics/explained_variance": 0.75, "metrics/l0": 31.5, "sparsity/dead_fraction": 0.25, "other": 3.0}


def test_json_lines_are_there_at_once_and_cut_on_resume(tmp_path):
    log = JsonLines(tmp_path / "run")
    log.start(10, 100)
    for step in (1, 5, 9):
        log.log(step, {"a": step / 2, "bad": float("nan")})
    lines = log.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": step, "a": step / 2, "bad": None} for step in (1, 5, 9)]
    log.close()
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 2, "a"')
    again = JsonLines(tmp_path / "run")
    again.start(10, 100, first_step=5)
    assert log.path.read_text().splitlines() == lines[:2]
    again.log(6, {"a": 3.0})
    assert len(log.path.read_text().splitlines()) == 3
    again.close()


def test_json_lines_say_when_they_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        JsonLines(tmp_path / "file").start(1, 1)


def shown(terminal: bool, seconds: float = 10.0) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(RichConsole(file=file, force_terminal=terminal, width=160, color_system=None), seconds), file


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console, file = shown(terminal=False)
    console.start(100, 10_000)
    for step, seconds in ((1, 1.0), (2, 2.0), (20, 20.0), (100, 21.0)):
        now[0] = seconds
        console.progress(step)
        console.log(step, METRICS)
    console.message("a message [with] brackets")
    console.close()
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1/100", "20/100", "100/100"], "at most one line every 10 s, and the last"
    assert "expl. var. 0.7500" in lines[1]
    assert "100 tokens/s" in lines[1]
    assert "1:20 left" in lines[1]
    assert "dead 25.0%" in lines[1]
    assert lines[3] == "a message [with] brackets"


def test_a_bar_and_a_table_in_a_terminal():
    console, file = shown(terminal=True)
    console.start(100, 10_000, first_step=10)
    console.progress(20)
    console.log(20, METRICS)
    console.log(30, METRICS)
    console.log(40, {"metrics/downstream": 1.0})
    console.log(50, METRICS, console=False)
    console.close()
    text = file.getvalue()
    assert text.count("expl. var.") == 1
    assert text.count("0.7500") == 2
    assert "training" in text


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda folder: WandbLogger(WandbConfig()), "wandb"),
        (lambda folder: TrackioLogger(TrackioConfig()), "trackio"),
        (lambda folder: TensorBoardLogger(TensorBoardConfig(), folder), "tensorboard"),
    ],
)
def test_a_missing_package_is_one_line_with_the_command(make, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf'{package} is configured but not installed; run: pip install "lm-saes\[{package}\]"'):
        make(tmp_path)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tracking_services_get_the_metrics(name, monkeypatch):
    calls = []

    class Run:
        def log(self, metrics, step):
            calls.append((metrics, step))

        def finish(self):
            calls.append("finish")

    class Service:
        @staticmethod
        def init(**options):
            calls.append(options)
            return Run()

    monkeypatch.setitem(sys.modules, name, Service)  # pyright: ignore[reportArgumentType]
    log = WandbLogger(WandbConfig(exp_name="x"), {"a": 1}) if name == "wandb" else TrackioLogger(TrackioConfig(name="x"), {"a": 1})
    log.start(10, 100)
    log.log(3, {"b": 2.0})
    log.message("nothing")
    log.close()
    assert calls[0]["name"] == "x"
    assert calls[0]["config"] == {"a": 1}
    assert calls[1:] == [({"b": 2.0}, 3), "finish"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_that_does_not_start_is_one_line(name, monkeypatch):
    class Service:
        @staticmethod
        def init(**_):
            raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, name, Service)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"did not start \(RuntimeError: api_key not configured \(no-tty\)\); try "):
        WandbLogger(WandbConfig()) if name == "wandb" else TrackioLogger(TrackioConfig())


def test_tensorboard_writes_event_files(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, global_step):
            written.append((name, value, global_step))

        def close(self):
            written.append("close")

    monkeypatch.setitem(sys.modules, "tensorboard", sys)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("Module", (), {"SummaryWriter": Writer}))  # pyright: ignore[reportArgumentType]
    log = TensorBoardLogger(TensorBoardConfig(), tmp_path)
    log.start(10, 100, first_step=4)
    log.log(5, {"a": 1.0})
    log.close()
    assert written == [(str(tmp_path / "tensorboard"), 5), ("a", 1.0, 5), "close"]
