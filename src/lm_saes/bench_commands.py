"""What `lm-saes bench` does and prints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from lm_saes import display
from lm_saes.config.base import merge, validated
from lm_saes.config.baselines import check_baselines
from lm_saes.config.synthetic import SyntheticBenchmarkConfig, SyntheticPreset
from lm_saes.errors import ConfigError, did_you_mean
from lm_saes.evaluation.synthetic.protocol import BASELINE_KINDS, KINDS, SyntheticBenchmark
from lm_saes.evaluation.synthetic.scores import Scores
from lm_saes.training.loggers import Logger
from lm_saes.training.run_folder import disk_errors, write_atomically


class Column(NamedTuple):
    """A column of the table."""

    score: str
    title: str
    form: str


COLUMNS = [
    Column("f1", "F1", "{:.3f}"),
    Column("precision", "prec.", "{:.3f}"),
    Column("recall", "recall", "{:.3f}"),
    Column("mcc", "MCC", "{:.3f}"),
    Column("uniqueness", "unique", "{:.3f}"),
    Column("explained_variance", "EV", "{:.3f}"),
    Column("l0", "L0", "{:.2f}"),
    Column("dead_fraction", "dead", "{:.3f}"),
    Column("shrinkage", "norm", "{:.3f}"),
]
PROBE_ROW = "logistic probe"


def synthetic(
    size: SyntheticPreset, seeds: int, kinds: Sequence[str] | None, changes: Mapping[str, Any], out: Path, baselines: Sequence[str] = ()
) -> None:
    """Train and score what is not there yet, a line for each, then the table of all; also as `table.md` in the folder.

    Args:
        changes: fields of the benchmark that differ from those of its size.
    """
    chosen = list(KINDS) if kinds is None else list(dict.fromkeys(kinds))
    if unknown := [name for name in chosen if name not in KINDS]:
        raise ConfigError(f"no kind of dictionary '{unknown[0]}'{did_you_mean(unknown[0], KINDS) or '.'} Kinds: {', '.join(KINDS)}")
    chosen += check_baselines(list(baselines), tuple(BASELINE_KINDS))
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}")
    cfg = validated(SyntheticBenchmarkConfig, merge(SyntheticBenchmarkConfig.preset(size).as_dict(), changes))
    with disk_errors(str(out)):
        out.mkdir(parents=True, exist_ok=True)
    terminal, began = display.console(), time.monotonic()
    terminal.print(Text(_described(cfg), style="dim"))
    with terminal.status("pushing the features' directions apart"):
        benchmark = SyntheticBenchmark(cfg, out)
    results: dict[str, list[Scores]] = {name: [] for name in chosen}
    for seed in range(seeds):
        start = time.monotonic()
        scores = benchmark.dictionaries(chosen, seed, [_Bar(terminal, f"seed {seed}: {', '.join(chosen)}")])
        for name in chosen:
            results[name].append(scores[name])
            terminal.print(_line(f"{name}, seed {seed}", scores[name]))
        terminal.print(Text(f"seed {seed}: {(time.monotonic() - start) / 60:.1f} min", style="dim"))
    with terminal.status("training the probe"):
        rows = {**results, PROBE_ROW: [benchmark.probe()]}
    terminal.print(_line(PROBE_ROW, rows[PROBE_ROW][0]))
    terminal.print()
    terminal.print(score_table(rows))
    terminal.print(Text(f"\n{_legend(seeds)}  {out}, {(time.monotonic() - began) / 60:.1f} min", style="dim"))
    with disk_errors(str(out)):
        write_atomically(out / "table.md", markdown(rows))


def _described(cfg: SyntheticBenchmarkConfig) -> str:
    return (
        f"{cfg.model.n_features:,} features in {cfg.model.d_model} dimensions; dictionaries of {cfg.d_sae:,} latents at L0 {cfg.l0}, "
        f"{cfg.n_training_samples:,} samples each; scored on {cfg.n_evaluation_samples:,} others"
    )


def _legend(seeds: int) -> str:
    return "±: half the range over the seeds." if seeds > 1 else "One seed."


def _line(name: str, scores: Scores) -> Text:
    cells = "  ".join(f"{column.title} {_mean(column, [scores])}" for column in COLUMNS if column.score in {"f1", "mcc", "explained_variance", "l0"})
    return Text.assemble((f"{name:<29}", "bold"), cells)


def _values(column: Column, rows: Sequence[Scores]) -> list[float]:
    return [value for scores in rows if (value := scores.get(column.score)) is not None]


def _mean(column: Column, rows: Sequence[Scores]) -> str:
    values = _values(column, rows)
    return column.form.format(sum(values) / len(values)) if values else "–"


def _spread(column: Column, rows: Sequence[Scores]) -> str:
    values = _values(column, rows)
    return column.form.format((max(values) - min(values)) / 2) if len(values) > 1 else ""


def score_table(results: Mapping[str, Sequence[Scores]]) -> Table:
    """A row for each kind, the best F1 first, with the spread over the seeds under it; the probe last."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column.title, justify="right", no_wrap=True)
    for name in _ranked(results):
        rows = results[name]
        table.add_row(Text(name, style="bold"), *(_mean(column, rows) for column in COLUMNS))
        if len(rows) > 1:
            table.add_row("", *(Text(f"±{spread}" if (spread := _spread(column, rows)) else "", style="dim") for column in COLUMNS))
    return table


def markdown(results: Mapping[str, Sequence[Scores]]) -> str:
    """The same as a Markdown table."""
    lines = ["| | " + " | ".join(column.title for column in COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name in _ranked(results):
        rows = results[name]
        cells = [f"{_mean(column, rows)} ± {spread}" if (spread := _spread(column, rows)) else _mean(column, rows) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ranked(results: Mapping[str, Sequence[Scores]]) -> list[str]:
    def f1(name: str) -> float:
        return sum(scores["f1"] or 0.0 for scores in results[name]) / len(results[name])

    return sorted(results, key=lambda name: (name == PROBE_ROW, -f1(name)))


class _Bar(Logger):
    """A bar while a run trains, and nothing that stays."""

    def __init__(self, terminal: display.Terminal, title: str) -> None:
        self._terminal, self._title = terminal, title
        self._bar: Progress | None = None
        self._task = TaskID(0)

    @override
    def start(self, total_steps: int, total_tokens: int, first_step: int = 0) -> None:
        if self._terminal.is_terminal:
            columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn()]
            self._bar = Progress(*columns, console=self._terminal, transient=True)
            self._task = self._bar.add_task(self._title, total=total_steps, completed=first_step)
            self._bar.start()

    @override
    def progress(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    @override
    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
