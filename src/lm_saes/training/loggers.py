"""Where the metrics of a run go: a file, the terminal, and tracking services that are installed and configured."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import override

from lm_saes.config import TensorBoardConfig, TrackioConfig, WandbConfig
from lm_saes.errors import ConfigError, RunFolderError
from lm_saes.files import parse_json
from lm_saes.training.run_folder import METRICS_FILE, disk_errors, write_atomically

CONSOLE_METRICS = {
    "losses/overall_loss": ("loss", "{:.4g}"),
    "metrics/explained_variance": ("expl. var.", "{:.4f}"),
    "metrics/l0": ("L0", "{:.1f}"),
    "sparsity/dead_fraction": ("dead", "{:.1%}"),
    "details/current_learning_rate": ("lr", "{:.2e}"),
}
"""The metrics that a line in the terminal shows."""


class Logger(Protocol):
    """A place for metrics. `Trainer.fit` calls `start` first and `close` last, also when the run fails. A class that inherits from this one
    need only define what it does something in."""

    def start(self, total_steps: int, total_tokens: int, first_step: int = 0) -> None:
        """A run of that size begins, or goes on after `first_step` steps."""

    def progress(self, step: int) -> None:
        """`step` steps are done. Called after every step; must cost nothing worth mentioning."""

    def log(self, step: int, metrics: dict[str, float], console: bool = True) -> None:
        """The metrics after `step` steps; `console` is false where a person watching the terminal need not see them."""

    def message(self, text: str) -> None:
        """One line for a person."""

    def close(self) -> None:
        """The run is over."""


class JsonLines(Logger):
    """`metrics.jsonl`: one JSON object per call of `log`, with the key "step", flushed at once. Resuming cuts the file to the lines up to
    the checkpoint's step, so that it reads as if nothing had happened. Infinite and undefined numbers are null."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / METRICS_FILE
        self._file: Any = None

    @override
    def start(self, total_steps: int, total_tokens: int, first_step: int = 0) -> None:
        with disk_errors(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line + "\n" for line in self._lines() if _step_of(line) <= first_step] if first_step else []
            write_atomically(self.path, "".join(kept))
            self._file = self.path.open("a", encoding="utf-8")

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else []

    @override
    def log(self, step: int, metrics: dict[str, float], console: bool = True) -> None:
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with disk_errors(str(self.path)):
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()

    @override
    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk was reported by the write that failed
                self._file.close()
            self._file = None


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a crash left unfinished, or not as text."""
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Console(Logger):
    """The terminal: a progress bar with the rate and the time left, and a line of metrics at each log step. Where the output is not a
    terminal there is no bar, and lines come at most every `seconds`."""

    def __init__(self, console: RichConsole | None = None, seconds: float = 10.0) -> None:
        self._console = console or RichConsole(stderr=True)
        self._seconds = seconds
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._first_step = self._total_steps = 0
        self._tokens_per_step = 0.0
        self._began = self._last_line = 0.0
        self._titles: list[str] = []

    @override
    def start(self, total_steps: int, total_tokens: int, first_step: int = 0) -> None:
        self._first_step, self._total_steps = first_step, total_steps
        self._tokens_per_step = total_tokens / total_steps
        self._began, self._last_line = time.monotonic(), -math.inf
        if self._console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("training", total=total_steps, completed=first_step, rate="")
            self._bar.start()

    def _rate(self, step: int) -> float:
        return (step - self._first_step) * self._tokens_per_step / max(time.monotonic() - self._began, 1e-9)

    @override
    def progress(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, rate=f"{self._rate(step):,.0f} tokens/s")

    @override
    def log(self, step: int, metrics: dict[str, float], console: bool = True) -> None:
        shown = {title: form.format(metrics[name]) for name, (title, form) in CONSOLE_METRICS.items() if name in metrics}
        if not console or not shown:
            return
        if self._bar is None:
            now = time.monotonic()
            if now - self._last_line < self._seconds and step < self._total_steps:
                return
            self._last_line = now
            left = (self._total_steps - step) * self._tokens_per_step / max(self._rate(step), 1e-9)
            cells = "  ".join(f"{title} {text}" for title, text in shown.items())
            self._print(f"step {step}/{self._total_steps}  {cells}  {self._rate(step):,.0f} tokens/s  {duration_text(left)} left")
            return
        if list(shown) != self._titles:
            self._titles = list(shown)
            self._print("[bold]" + "".join(f"{title:>12}" for title in ("step", *shown)) + "[/bold]")
        self._print("".join(f"{text:>12}" for text in (str(step), *shown.values())))

    @override
    def message(self, text: str) -> None:
        self._print(text.replace("[", "\\["))

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    @override
    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ObjectLogger(Logger):
    """Passes metrics on to any object with `log(metrics, step=...)`, such as a Weights & Biases run. It is not closed."""

    def __init__(self, target: Any) -> None:
        if not callable(getattr(target, "log", None)):
            raise ConfigError(
                f"wandb_logger must have a method log(metrics, step=...), got {type(target).__name__}; pass the object that wandb.init() returns"
            )
        self._target = target

    @override
    def log(self, step: int, metrics: dict[str, float], console: bool = True) -> None:
        self._target.log(metrics, step=step)


def _needed(module: str, package: str, extra: str) -> Any:
    """An optional package that the configuration asks for."""
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(f'{package} is configured but not installed; run: pip install "lm-saes[{extra}]"') from None


@contextmanager
def _starting(name: str, fix: str) -> Iterator[None]:
    """What a tracker, its server or the network raises when a run is started, in one line."""
    try:
        yield
    except Exception as error:  # they have no common base
        raise ConfigError(f"{name} did not start ({type(error).__name__}: {error}); try {fix}") from error


class WandbLogger(ObjectLogger):
    """Weights & Biases. The run starts when the logger is made, and leaves other runs of this process alone if it is `beside_others`; the mode
    comes from the environment variable WANDB_MODE.

    Raises:
        ConfigError: the package is not installed, or the run cannot be started.
    """

    def __init__(self, cfg: WandbConfig, settings: Mapping[str, Any] | None = None, beside_others: bool = False) -> None:
        wandb = _needed("wandb", "wandb", "wandb")
        with _starting("Weights & Biases", "wandb login, WANDB_MODE=offline, or leave wandb out"):
            self.run = wandb.init(
                project=cfg.wandb_project, name=cfg.exp_name, entity=cfg.wandb_entity, id=cfg.wandb_run_id, resume=cfg.wandb_resume,
                config=dict(settings or {}), **({"reinit": "create_new"} if beside_others else {}),
            )  # fmt: skip
        super().__init__(self.run)

    @override
    def close(self) -> None:
        self.run.finish()


class TrackioLogger(ObjectLogger):
    """trackio. The run starts when the logger is made.

    Raises:
        ConfigError: the package is not installed, or the run cannot be started.
    """

    def __init__(self, cfg: TrackioConfig, settings: Mapping[str, Any] | None = None) -> None:
        trackio = _needed("trackio", "trackio", "trackio")
        with _starting("trackio", "leave trackio out"):
            self.run = trackio.init(project=cfg.project, name=cfg.name, config=dict(settings or {}))
        super().__init__(self.run)

    @override
    def close(self) -> None:
        self.run.finish()


class TensorBoardLogger(Logger):
    """TensorBoard event files in `log_dir`, or in `tensorboard/` of the run's folder. On resume, what an interrupted run wrote after its
    checkpoint is hidden.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, cfg: TensorBoardConfig, run_folder: str | Path) -> None:
        _needed("tensorboard", "tensorboard", "tensorboard")
        self._writer_class = _needed("torch.utils.tensorboard", "tensorboard", "tensorboard").SummaryWriter
        self._folder = str(cfg.log_dir or Path(run_folder) / "tensorboard")
        self._writer: Any = None

    @override
    def start(self, total_steps: int, total_tokens: int, first_step: int = 0) -> None:
        try:
            self._writer = self._writer_class(self._folder, purge_step=first_step + 1 if first_step else None)
        except OSError as error:
            raise RunFolderError(f"cannot write TensorBoard files to {self._folder}: {error}") from None

    @override
    def log(self, step: int, metrics: dict[str, float], console: bool = True) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    @override
    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
