"""The terminal during a sweep: a line for each run, and one bar, since all read the same batches."""

from __future__ import annotations

import math
import time

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from lm_saes.training.loggers import CONSOLE_METRICS, Logger, duration_text


class Board:
    """Shows runs that are trained together. Each gets its logger from `logger(name)`, before training begins.

    In a terminal the lines stay in place and are replaced by nothing at the end; elsewhere one line comes at most every `seconds`.
    """

    def __init__(self, console: RichConsole, seconds: float = 10.0) -> None:
        self._console, self._seconds = console, seconds
        self._lines: list[_Line] = []
        self._live: Live | None = None
        self._said: dict[str, list[str]] = {}
        self._total_steps = self._step = self._first_step = 0
        self._tokens_per_step = 0.0
        self._began, self._last_line, self._news = 0.0, -math.inf, False
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", rate="")

    def logger(self, name: str) -> Logger:
        """The logger of the run of that name."""
        line = _Line(self, name)
        self._lines.append(line)
        return line

    # ------------------------------------------------------------------------------------------- what the lines tell

    def start(self, total_steps: int, total_tokens: int, first_step: int) -> None:
        self._total_steps, self._first_step = max(self._total_steps, total_steps), max(self._first_step, first_step)
        self._tokens_per_step = total_tokens / total_steps
        self._began = time.monotonic()
        self._bar.reset(self._task, total=self._total_steps, completed=self._first_step)
        if self._console.is_terminal and self._live is None:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)
            self._live.start()

    def progress(self, step: int) -> None:
        if step <= self._step:
            return
        self._print_news()  # of the steps before: by now every run has told its own
        self._flush()
        self._step = step
        self._bar.update(self._task, completed=step, rate=f"{self._rate():,.0f} tokens/s, {len(self._lines)} dictionaries")

    def logged(self) -> None:
        self._news = True

    def _rate(self) -> float:
        """Tokens of the stream per second."""
        return (self._step - self._first_step) * self._tokens_per_step / max(time.monotonic() - self._began, 1e-9)

    def _print_news(self) -> None:
        """Where there is no terminal: a line with the metrics that came."""
        now = time.monotonic()
        if self._live is not None or not self._news or (now - self._last_line < self._seconds and self._step < self._total_steps):
            return
        self._last_line, self._news = now, False
        left = (self._total_steps - self._step) * self._tokens_per_step / max(self._rate(), 1e-9)
        variances = {line.name: line.cells["expl. var."] for line in self._lines if "expl. var." in line.cells}
        shown = ""
        if variances:
            best, worst = max(variances, key=lambda name: float(variances[name])), min(variances.values(), key=float)
            shown = f"  expl. var. {worst} to {variances[best]} ({best})" if len(variances) > 1 else f"  expl. var. {worst}"
        self._print(f"step {self._step}/{self._total_steps}{shown}  {self._rate():,.0f} tokens/s  {duration_text(left)} left")

    def message(self, name: str, text: str) -> None:
        self._said.setdefault(text, []).append(name)

    def _flush(self) -> None:
        """Print the messages that came: what all runs say once, what some say with their names."""
        for text, names in self._said.items():
            self._print(text if len(names) == len(self._lines) > 1 else f"{', '.join(names)}: {text}")
        self._said.clear()

    def close(self) -> None:
        """The first run's end is that of all."""
        self._print_news()
        self._news = False
        self._flush()
        if self._live is not None:
            self._live.stop()
            self._live = None

    # ------------------------------------------------------------------------------------------------- what is seen

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _render(self) -> RenderableType:
        room = max(1, self._console.height - 5)
        titles = [title for title in dict(CONSOLE_METRICS.values()) if any(title in line.cells for line in self._lines)]
        table = Table(box=None, padding=(0, 0, 0, 2), header_style="bold")
        table.add_column("", no_wrap=True, overflow="ellipsis")
        for title in titles:
            table.add_column(title, justify="right", no_wrap=True)
        for line in self._lines[:room]:
            behind = line.step < self._step - 1  # at its end, or stopped before it
            style = "dim" if behind else ""
            name = Text(line.name, style="red" if behind and line.step < line.total_steps else style)
            table.add_row(name, *(Text(line.cells.get(title, ""), style=style) for title in titles))
        parts: list[RenderableType] = [table]
        if len(self._lines) > room:
            parts.append(Text(f"  and {len(self._lines) - room} more", style="dim"))
        return Group(*parts, Text(), self._bar)


class _Line(Logger):
    """One run's logger: its line on the board."""

    def __init__(self, board: Board, name: str) -> None:
        self._board, self.name = board, name
        self.cells: dict[str, str] = {}
        self.total_steps = self.step = 0

    @override
    def start(self, total_steps: int, total_tokens: int, first_step: int = 0) -> None:
        self.total_steps, self.step = total_steps, first_step
        self._board.start(total_steps, total_tokens, first_step)

    @override
    def progress(self, step: int) -> None:
        self.step = step
        self._board.progress(step)

    @override
    def log(self, step: int, metrics: dict[str, float], console: bool = True) -> None:
        shown = {title: form.format(metrics[name]) for name, (title, form) in CONSOLE_METRICS.items() if name in metrics}
        if console and shown:
            self.cells = shown
            self._board.logged()

    @override
    def message(self, text: str) -> None:
        self._board.message(self.name, text)

    @override
    def close(self) -> None:
        self._board.close()
