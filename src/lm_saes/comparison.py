"""Runs side by side: what each came to, read from its folder; the best of each column marked among the runs on the same hook point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from lm_saes.config import SAEConfig, TrainSAESettings
from lm_saes.errors import RunFolderError
from lm_saes.files import parse_json, read_json_object
from lm_saes.records import evaluated_on
from lm_saes.training.run_folder import METRICS_FILE, failure_of


class Column(NamedTuple):
    """A column of the table."""

    name: str
    title: str
    better: int
    """1: more is better, -1: less is, 0: neither."""
    show: Callable[[float], str]
    evaluated: str | None
    """The metric in `evaluation.json`."""
    trained: str | None
    """The metric in `metrics.jsonl`, for runs that were not evaluated."""


COLUMNS = [
    Column("l0", "L0", 0, "{:.1f}".format, "metrics/l0", "metrics/l0"),
    Column("explained_variance", "expl. var.", 1, "{:.4f}".format, "metrics/explained_variance", "metrics/explained_variance"),
    Column("delta_ce", "ΔCE", -1, "{:+.4f}".format, "metrics/delta_ce", None),
    Column("recovered_fraction", "recovered", 1, "{:.4f}".format, "metrics/recovered_fraction", None),
    Column("dead_fraction", "dead", -1, "{:.1%}".format, "metrics/dead_fraction", "sparsity/dead_fraction"),
    Column("tokens_per_second", "tokens/s", 1, "{:,.0f}".format, None, "time/step_tokens_per_second"),
]


@dataclass(frozen=True)
class Row:
    """One run in a comparison."""

    name: str
    folder: str
    hook_point: str
    """The hook point that is reconstructed; empty where the dictionary came from saved weights."""
    measured_on: str
    """What `records.evaluated_on` says, or "the last training batch"."""
    tokens: int
    """Tokens trained on."""
    differs: dict[str, Any]
    """The settings in which the runs differ."""
    metrics: dict[str, float | None]
    """By the names of the columns."""
    error: str | None
    """What stopped the run."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def compare(members: Sequence[TrainSAESettings]) -> list[Row]:
    """The runs by hook point, the best first: by ΔCE where they were evaluated, else by explained variance; those that were stopped last."""
    rows = [_row(settings, differs) for settings, differs in zip(members, _differences(members), strict=True)]
    hook_points = list(dict.fromkeys(row.hook_point for row in rows))

    def rank(row: Row) -> tuple[Any, ...]:
        loss, variance = row.metrics["delta_ce"], row.metrics["explained_variance"]
        return hook_points.index(row.hook_point), row.error is not None, loss is None, loss or 0.0, -(variance or 0.0)

    return sorted(rows, key=rank)


def _row(settings: TrainSAESettings, differs: dict[str, Any]) -> Row:
    folder = Path(settings.trainer.exp_result_path)
    evaluation, trained = _evaluation(folder), _last_metrics(folder)
    metrics = {column.name: (evaluation or trained).get((column.evaluated if evaluation else column.trained) or "") for column in COLUMNS}
    metrics["tokens_per_second"] = trained.get("time/step_tokens_per_second")
    error = failure_of(folder)
    hook_point = settings.sae.hook_point_out if isinstance(settings.sae, SAEConfig) else ""
    measured_on = evaluated_on(settings) if evaluation else "the last training batch"
    return Row(settings.sae_name, str(folder), hook_point, measured_on, int(trained.get("details/n_training_tokens") or 0), differs, metrics, error)


def _evaluation(folder: Path) -> Mapping[str, Any]:
    try:
        evaluated = read_json_object(folder / "evaluation.json", RunFolderError)["sae"]
    except (OSError, RunFolderError, KeyError):
        return {}
    return {name: value for name, value in evaluated.items() if isinstance(value, int | float)} if isinstance(evaluated, dict) else {}


def _last_metrics(folder: Path) -> Mapping[str, Any]:
    """The last line of the run's metrics that has losses in it."""
    try:
        lines = (folder / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return next((row for row in map(_metrics, reversed(lines)) if "losses/overall_loss" in row), {})


def _metrics(line: str) -> dict[str, Any]:
    """The numbers in a line of metrics; none where a crash, or somebody, left something else."""
    try:
        row = parse_json(line)
    except ValueError:
        return {}
    return {name: value for name, value in row.items() if isinstance(value, int | float)} if isinstance(row, dict) else {}


def _differences(members: Sequence[TrainSAESettings]) -> list[dict[str, Any]]:
    """For each run the settings that are not the same in all."""
    flat = []
    for settings in members:
        table = settings.as_dict()
        flat.append({f"{part}.{name}": value for part in ("sae", "initializer", "trainer") for name, value in (table[part] or {}).items()})
    names = [name for name in dict.fromkeys(name for table in flat for name in table) if name != "trainer.exp_result_path"]
    differing = [name for name in names if any(table.get(name) != flat[0].get(name) for table in flat)]
    return [{name: table.get(name) for name in differing} for table in flat]


# --------------------------------------------------------------------------------------------------------------- tables


def _columns(rows: Sequence[Row]) -> list[Column]:
    return [column for column in COLUMNS if any(row.metrics[column.name] is not None for row in rows)]


def _is_best(row: Row, column: Column, rows: Sequence[Row]) -> bool:
    """Whether no run on the same hook point did better; with a single run, or where all are alike, none is marked."""
    values = [other.metrics[column.name] for other in rows if other.hook_point == row.hook_point and other.error is None]
    known = [column.better * value for value in values if value is not None]
    own = row.metrics[column.name]
    return column.better != 0 and row.error is None and own is not None and len(set(known)) > 1 and column.better * own == max(known)


def comparison_table(rows: Sequence[Row], marked: bool = False) -> Table:
    """For the terminal, under a heading for each hook point if there are several; the best of each column bold and green, or, `marked`, with an
    asterisk."""
    columns = _columns(rows)
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    grouped = len({row.hook_point for row in rows}) > 1
    hook_point = None
    for row in rows:
        if grouped and row.hook_point != hook_point:
            if hook_point is not None:
                table.add_row("")
            hook_point = row.hook_point
            table.add_row(Text(hook_point or "saved weights", style="bold"))
        name = row.name.removeprefix(f"{hook_point},") if grouped else row.name
        stopped = () if row.error is None else ((" stopped", "bold red"),)
        table.add_row(Text.assemble("  " if grouped else "", name, *stopped), *(_cell(row, column, rows, marked) for column in columns))
    return table


def _cell(row: Row, column: Column, rows: Sequence[Row], marked: bool) -> Text:
    value = row.metrics[column.name]
    if value is None:
        return Text("–", style="dim")
    if not _is_best(row, column, rows):
        return Text(column.show(value) + (" " if marked else ""), style="" if row.error is None else "dim")
    return Text(column.show(value) + ("*" if marked else ""), style="bold green")


def caption(rows: Sequence[Row]) -> str:
    """What the numbers are measured on."""
    measured = " or ".join(dict.fromkeys(row.measured_on for row in rows))
    return f"measured on {measured}; tokens/s: of the dictionary's own steps, without the language model; best of each column marked per hook point"


def markdown(rows: Sequence[Row]) -> str:
    """The same table for a page."""
    columns = _columns(rows)
    lines = [f"| run | {' | '.join(column.title for column in columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in rows:
        cells = []
        for column in columns:
            value = row.metrics[column.name]
            text = "–" if value is None else column.show(value)
            cells.append(f"**{text}**" if _is_best(row, column, rows) else text)
        name = row.name.replace("|", "\\|") + ("" if row.error is None else " (stopped)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    stopped = [f"- {row.name} was stopped: {row.error}" for row in rows if row.error is not None]
    return "\n".join([*lines, "", f"{caption(rows).capitalize()}.", *(["", *stopped] if stopped else [])]) + "\n"
