"""The figure of report.py: dimensions by depth; dose and response; what each arm does to dead latents and to explained variance."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from arms import ARMS
from report import KINDS, NAMES, Line, dose, groups

INK, PALE, BAND = "#27272a", "#a1a1aa", "#f4f4f5"
KIND_COLORS = {"hook_attn_out": "#c2410c", "hook_mlp_out": "#0f766e", "hook_resid_post": "#1d4ed8"}
START_COLORS = {"random": "#c2410c", "active-auto": "#1d4ed8"}
MARKERS = {"demo": "o", "minilm": "s", "synthetic": "D"}
LOWEST_SHOWN, HIGHEST_SHOWN = -0.06, 45.0
"""Explained variance against tied random; dead latents in percent, in the panel of dose and response."""
SERIES_COLORS = {"demo": ("#fdba74", "#c2410c"), "minilm": ("#93c5fd", "#1d4ed8")}


def draw(dimensions: dict[str, dict[str, Line]], results: list[Line], layers: set[tuple[str, str]], path: Path) -> None:
    """Write the figure to `path`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {"axes.edgecolor": PALE, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK}
    with matplotlib.rc_context({"font.size": 9.5, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", **colors}):
        figure = Figure(figsize=(13, 9.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1.12), hspace=0.04)
        grid = above.add_gridspec(1, 3, width_ratios=(1, 1, 1.35))
        for column, (source, hooks) in enumerate(dimensions.items()):
            _draw_dimensions(above.add_subplot(grid[0, column]), source, hooks, first=column == 0)
        _draw_dose(above.add_subplot(grid[0, 2]), results)
        shortest = min(line["tokens"] for line in results)
        lines = [line for line in results if (line["source"], line["hook_point"]) in layers and line["tokens"] == shortest]
        left, right = below.subplots(1, 2, sharey=True)
        _draw_arms(left, lines, lambda line, _: 100 * line["dead"], "Dead latents at the end, %")
        _draw_arms(
            right,
            lines,
            lambda line, random: line["explained_variance"] - random["explained_variance"],
            "Explained variance, against tied random",
        )
        left.set_xlim(0, None)
        _cut_at(right, LOWEST_SHOWN)
        right.axvline(0, color=INK, linewidth=0.8)
        handles, labels = left.get_legend_handles_labels()
        below.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(path)


def _cut_at(axis: Any, low: float) -> None:
    """Marks further left than `low` become arrows at the edge with their value beside them, so that they do not squeeze the others together."""
    for mark in [mark for mark in axis.lines if len(mark.get_xdata()) == 1 and mark.get_xdata()[0] < low]:
        x, y = mark.get_xdata()[0], mark.get_ydata()[0]
        mark.set(xdata=[low], marker="<")
        axis.annotate(f"{x:+.2f}", (low, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_xlim(low * 1.04, None)


def _plain(axis: Any, lines: str = "both") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, axis=lines, color="#e4e4e7", linewidth=0.6)
    axis.set_axisbelow(True)


def _draw_dimensions(axis: Any, source: str, hooks: dict[str, Line], *, first: bool) -> None:
    """Effective rank over the width (solid) and dimensions of 99 % of the variance (dashed) at each block."""
    _plain(axis)
    for kind, title in KINDS.items():
        records = sorted((int(hook.split(".")[1]), record) for hook, record in hooks.items() if hook.endswith(kind))
        blocks = [block for block, _ in records]
        axis.plot(
            blocks, [record["effective_rank"] for _, record in records], "o-", color=KIND_COLORS[kind], markersize=4, linewidth=1.6, label=title
        )
        axis.plot(blocks, [record["variance_99"] for _, record in records], "--", color=KIND_COLORS[kind], linewidth=1, alpha=0.7)
        axis.set_xticks(blocks)
    axis.plot([], [], "o-", color=PALE, markersize=4, label="effective rank")
    axis.plot([], [], "--", color=PALE, label="99 % of the variance")
    axis.set_ylim(0, 1)
    axis.set_xlabel("block")
    axis.set_title(f"Dimensions used / D, {NAMES[source]}")
    if first:
        axis.legend(frameon=False, fontsize=8.5, loc="lower left", ncols=2, columnspacing=1)


def _draw_dose(axis: Any, results: list[Line]) -> None:
    """Dead latents against the share of the space that is not used: a line through the control of each width, a mark for each hook point."""
    _plain(axis)
    places = dose(results)
    widths = {source: sorted({place[1] for place in places if place[0] == source}) for source in MARKERS}
    for arm, color in START_COLORS.items():
        curves: dict[int, list[tuple[float, float]]] = {}
        for (source, width, _), of_arms in places.items():
            if arm not in of_arms:
                continue
            x = 1 - statistics.fmean(line["effective_rank"] for line in of_arms[arm])
            y = 100 * statistics.fmean(line["dead"] for line in of_arms[arm])
            if y > HIGHEST_SHOWN:  # an arrow at the edge
                axis.annotate(f"▲ {y:.0f} %", (x, HIGHEST_SHOWN), color=color, ha="right" if arm == "random" else "left", va="top", fontsize=8.5)
                continue
            wide = width == widths[source][-1] and len(widths[source]) > 1
            axis.plot(
                x, y, MARKERS[source], color=color if wide else "white", markeredgecolor=color, markersize=6 if source != "synthetic" else 5, zorder=3
            )
            if source == "synthetic":
                curves.setdefault(width, []).append((x, y))
        for width, points in curves.items():
            axis.plot(*zip(*sorted(points), strict=True), "-" if width == max(curves) else "--", color=color, linewidth=1.1, alpha=0.6)
    for arm, color in START_COLORS.items():
        axis.plot([], [], "-", color=color, linewidth=3, label={"random": "tied random", "active-auto": 'active subspace, "auto"'}[arm])
    for source in dict.fromkeys(place[0] for place in places):
        below = ", ".join(f"{width} D" for width in widths[source])
        axis.plot([], [], MARKERS[source], color=PALE, markersize=6, label=f"{NAMES[source]}, F = {below}")
    axis.plot([], [], "o", color="white", markeredgecolor=PALE, markersize=6, label="open: the narrower width")
    axis.set_xlim(0, 0.75)
    axis.set_ylim(-0.7, HIGHEST_SHOWN)
    axis.set_xlabel("share of the space that is not used: 1 - effective rank / D")
    axis.set_title("Dose and response: dead latents, %")
    axis.legend(frameon=False, fontsize=8.5, loc="upper left")


def _draw_arms(axis: Any, lines: list[Line], value: Any, title: str) -> None:
    """A row for each arm; a mark for each model and width, with the range over its seeds."""
    _plain(axis, "x")
    shown = [arm for arm in ARMS if any(line["arm"] == arm for line in lines)][::-1]
    for place in range(0, len(shown), 2):
        axis.axhspan(place - 0.5, place + 0.5, color=BAND, linewidth=0, zorder=0)
    series = groups(sorted(lines, key=lambda line: (line["source"], line["d_sae"])), "source", "expansion")
    for index, ((source, width), of_series) in enumerate(series.items()):
        others = [key[1] for key in series if key[0] == source]
        color = SERIES_COLORS[source][min(others.index(width), 1)]
        random = {line["seed"]: line for line in of_series if line["arm"] == "random"}
        for place, arm in enumerate(shown):
            values = [value(line, random[line["seed"]]) for line in of_series if line["arm"] == arm and line["seed"] in random]
            if not values:
                continue
            y = place + 0.2 * ((len(series) - 1) / 2 - index)
            label = f"{NAMES[source]}, F = {width} D" if arm == "random" else None
            axis.plot([min(values), max(values)], [y, y], "-", color=color, linewidth=1.6, solid_capstyle="butt")
            axis.plot(
                statistics.fmean(values), y, MARKERS[source], color=color, markersize=6.5, markeredgecolor="white", markeredgewidth=0.7, label=label
            )
    axis.set_yticks(range(len(shown)), [ARMS[arm].title for arm in shown])
    axis.set_ylim(-0.5, len(shown) - 0.5)
    axis.tick_params(axis="y", length=0)
    axis.set_title(title)
