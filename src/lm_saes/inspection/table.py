"""An inspection in the terminal: a table with one line per hook point, or all that is known of one, and the settings that follow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lm_saes.display import rows_table, visible
from lm_saes.inspection.advice import CENTRE_GAMMA, COLLAPSED, LOW_RANK, as_toml, same_advice
from lm_saes.inspection.report import ActivationReport, Dimensionality, HookPointReport

LEGEND = (
    "γ: ‖mean‖ / spread · 99 %: share of the dimensions that hold 99 % of the variance · rank: effective rank over the width · "
    "cos: mean cosine of two tokens · out: outlier dimensions / tokens"
)


def render(report: ActivationReport) -> RenderableType:
    """Everything that `lm-saes inspect` prints."""
    records = list(report.hook_points.values())
    parts: list[RenderableType] = [rows_table(_heading(report)), Text()]
    if len(records) == 1:
        parts.append(rows_table(details(records[0])))
    else:
        parts += [overview(records), Text(LEGEND, style="dim")]
    return Group(*parts, Text(), render_advice(records))


def render_advice(records: Sequence[HookPointReport]) -> RenderableType:
    """The settings to paste, once for all hook points for which they are the same."""
    parts: list[RenderableType] = []
    for group in same_advice(records):
        parts.append(Text("settings for ", style="bold").append(", ".join(abbreviated(record.hook_point for record in group))))
        parts += [*(Text(line, style="dim" if line.startswith("#") else "cyan") for line in as_toml(group).splitlines()), Text()]
    notes = list(dict.fromkeys(note for record in records for note in record.notes))
    return Group(*parts, *(Text(f"note: {note}", style="yellow") for note in notes))


def overview(records: Sequence[HookPointReport]) -> Table:
    """One line per hook point; what the advice turns on is yellow."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("hook point", "norm", "γ", "99 %", "rank", "cos", "out"):
        table.add_column(column, justify="left" if column == "hook point" else "right")
    for record in records:
        dims = record.dimensionality
        outliers = record.outlier_tokens
        table.add_row(
            record.hook_point,
            f"{record.mean_norm:.3g}",
            _marked("–" if record.gamma is None else f"{record.gamma:.2f}", (record.gamma or 0) >= CENTRE_GAMMA),
            _marked(f"{dims.variance_99_share:.2f}", dims.variance_99_share < LOW_RANK),
            _marked(f"{dims.effective_rank_share:.2f}", dims.effective_rank_share < COLLAPSED),
            "–" if record.mean_cosine is None else f"{record.mean_cosine:.2f}",
            _marked(f"{record.n_outlier_dimensions} / {outliers.count}", outliers.count > 0),
        )
    return table


def details(record: HookPointReport) -> list[tuple[str, str]]:
    """Label and value of everything that is known of one hook point."""
    quantiles = ", ".join(f"{name.replace('%', ' %')} {value:.3g}" for name, value in record.norm_quantiles.items())
    rows = [
        ("hook point", f"{record.hook_point}, {record.d_model} wide"),
        ("tokens", f"{record.tokens:,}"),
        ("norms", f"mean {record.mean_norm:.4g}; {quantiles}; largest {record.largest_norm:.3g}"),
    ]
    if record.scale is not None:
        rows.append(("scale √D / mean norm", f"{record.scale:.4g}"))
    if record.gamma is not None and record.mean_share is not None:
        rows.append(("γ = ‖mean‖ / spread", f"{record.gamma:.2f}; the mean holds {_percent(record.mean_share)} of the second moment"))
    if record.median_distance is not None:
        rows.append(("geometric median", f"{record.median_distance:.3f} spreads from the mean"))
    if record.mean_cosine is not None:
        rows.append(("mean cosine of two tokens", f"{record.mean_cosine:.3f}"))
    rows.append(("dimensionality", _dimensionality(record.dimensionality)))
    if record.dimensionality_without_outliers is not None:
        rows.append(("… without outlier dimensions", _dimensionality(record.dimensionality_without_outliers)))
    listed = "; ".join(f"{one.index}: {one.mean:+.3g} ± {one.std:.3g} ({_percent(one.share)})" for one in record.outlier_dimensions)
    rows.append(("outlier dimensions", f"{record.n_outlier_dimensions}" + (f" (mean ± std, share of the second moment): {listed}" if listed else "")))
    rows.append(("outlier tokens", _outlier_tokens(record)))
    if record.special_tokens:
        tokens = ", ".join(
            f"{visible(one.text)} ({one.count:,} times, " + (f"{one.ratio:.2g} × the median norm)" if one.ratio is not None else "norm unknown)")
            for one in record.special_tokens
        )
        rows.append(("special tokens, dropped", tokens))
    return rows


def abbreviated(names: Iterable[str]) -> list[str]:
    """Hook points of neighbouring blocks in one: blocks.0-4.hook_attn_out."""
    blocks: dict[tuple[str, str], list[int]] = {}
    rest = []
    for name in names:
        match = re.fullmatch(r"(blocks\.)(\d+)(\..+)", name)
        if match:
            blocks.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            rest.append(name)
    return [f"{before}{_ranges(sorted(numbers))}{after}" for (before, after), numbers in blocks.items()] + rest


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _heading(report: ActivationReport) -> list[tuple[str, str]]:
    rows = [("model", report.model or "–"), ("text", report.text or "–")]
    if report.context_size is not None:
        rows.append(("context", f"{report.context_size} tokens"))
    return [*rows, ("measured in", f"{report.seconds:.1f} s")]


def _dimensionality(dims: Dimensionality) -> str:
    return (
        f"99 % of the variance in {dims.variance_99} of {dims.of} ({_percent(dims.variance_99_share)}); "
        f"effective rank {dims.effective_rank:.1f} ({_percent(dims.effective_rank_share)})"
    )


def _outlier_tokens(record: HookPointReport) -> str:
    outliers = record.outlier_tokens
    head = f"{outliers.count:,} above {outliers.factor:g} × the median norm"
    if not outliers.count:
        return head
    which = ", ".join(f"{visible(text)!r} {count:,}" for text, count in outliers.tokens)
    where = ", ".join(f"{position} ({count:,})" for position, count in outliers.positions)
    share = f", {outliers.squares_share:.1%} of Σ‖x‖², the largest {outliers.largest_ratio:.0f} ×".replace("%", " %")
    left_out = "; left out of all other figures" if outliers.dropped else ""
    return f"{head}{share}: {which}" + (f"; at positions {where}" if where else "") + left_out


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.1 else f"{share:.1%}".replace("%", " %")


def _marked(text: str, mark: bool) -> Text:
    return Text(text, style="yellow" if mark else "")
