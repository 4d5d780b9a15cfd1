"""Tables and the figure from what was measured: `python benchmarks/active_subspace/report.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arms import ARMS

HERE = Path(__file__).parent
NAMES = {"demo": "demo model", "minilm": "MiniLM", "synthetic": "synthetic"}
KINDS = {
    "hook_attn_out": ("attention output", "#c2410c"),
    "hook_mlp_out": ("MLP output", "#0f766e"),
    "hook_resid_post": ("residual stream", "#1d4ed8"),
}
INK, PALE = "#27272a", "#a1a1aa"
ALLOWED_LOSS = 0.005
"""Explained variance that an arm may cost against a tied random start."""

Line = dict[str, Any]


def mean_and_spread(values: Iterable[float], form: str = "{:.4f}") -> str:
    """The mean, and half the range where there are several values."""
    values = list(values)
    text = form.format(statistics.fmean(values))
    return f"{text} ± {form.format((max(values) - min(values)) / 2)}" if len(values) > 1 else text


def groups(results: list[Line], *fields: str) -> dict[tuple[Any, ...], list[Line]]:
    """Lines by the values of some fields, in the order in which they came."""
    found: dict[tuple[Any, ...], list[Line]] = {}
    for line in results:
        found.setdefault(tuple(line[name] for name in fields), []).append(line)
    return found


def paired(results: list[Line]) -> list[tuple[Line, Line]]:
    """The two arms of the dose-response, each pair of one hook point, width and seed."""
    fields = ("source", "hook_point", "d_sae", "k", "seed", "tokens")
    of = {
        arm: {key: lines[0] for key, lines in groups([line for line in results if line["arm"] == arm], *fields).items()}
        for arm in ("random", "active-auto")
    }
    return [(line, of["active-auto"][key]) for key, line in of["random"].items() if key in of["active-auto"]]


def arms_table(lines: list[Line], layers: set[str]) -> str:
    """One table for each model and width: what the arms came to at the layer that all were trained on."""
    tables = []
    chosen = [line for line in lines if line["hook_point"] in layers]
    for (source, hook, width), of_width in groups(
        sorted(chosen, key=lambda line: (line["source"], line["d_sae"])), "source", "hook_point", "d_sae"
    ).items():
        first = of_width[0]
        by_arm = {arm: [line for line in of_width if line["arm"] == arm] for arm in ARMS}
        random = {line["seed"]: line for line in by_arm["random"]}
        cost = "ΔCE, nats" if source == "demo" else "1 - cosine"
        rows = [
            f"| arm | seeds | dead at start | dead | explained variance | to tied random | {cost} | CPU s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for arm, of_arm in by_arm.items():
            if of_arm:
                gains = [line["explained_variance"] - random[line["seed"]]["explained_variance"] for line in of_arm if line["seed"] in random]
                cells = [
                    mean_and_spread((100 * line["dead_start"] for line in of_arm), "{:.1f}") + " %",
                    mean_and_spread((100 * line["dead"] for line in of_arm), "{:.1f}") + " %",
                    mean_and_spread((line["explained_variance"] for line in of_arm), "{:.3f}"),
                    f"{statistics.fmean(gains):+.3f}" if gains and arm != "random" else "–",
                    mean_and_spread((line["cost"] for line in of_arm), "{:.4f}"),
                    f"{statistics.fmean(line['cpu_seconds'] for line in of_arm):.0f}",
                ]
                dimension = f" (d = {of_arm[0]['d_active']})" if of_arm[0]["d_active"] else ""
                rows.append(f"| {ARMS[arm].title}{dimension} | {len(of_arm)} | " + " | ".join(cells) + " |")
        share = f"effective rank {first['effective_rank']:.2f} D, 99 % of the variance in {first['variance_99']:.2f} D"
        head = f"**{NAMES[source]}, {hook}**, D = {first['d_model']}, F = {width} = {first['expansion']} D, k = {first['k']}, {first['tokens']:,} tokens; {share}"
        tables.append("\n".join([head, "", *rows]))
    return "\n\n".join(tables)


def dose_table(results: list[Line]) -> str:
    """Dead latents against how much of the space is unused and how wide the dictionary is."""
    rows = [
        "| activations | F / D | 1 - effective rank / D | pairs | dead, tied random | dead, active subspace | ratio | explained variance |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    pairs = sorted(paired(results), key=lambda pair: (pair[0]["source"], pair[0]["expansion"], pair[0]["effective_rank"]))
    by_place: dict[tuple[Any, ...], list[tuple[Line, Line]]] = {}
    for pair in pairs:
        by_place.setdefault((pair[0]["source"], pair[0]["expansion"], pair[0]["hook_point"]), []).append(pair)
    for (source, expansion, hook), of_place in by_place.items():
        random, active = (statistics.fmean(pair[index]["dead"] for pair in of_place) for index in (0, 1))
        gain = statistics.fmean(pair[1]["explained_variance"] - pair[0]["explained_variance"] for pair in of_place)
        unused = 1 - statistics.fmean(pair[0]["effective_rank"] for pair in of_place)
        ratio = f"{active / random:.2f}" if random else "–"
        name = f"{NAMES[source]}, {hook}"
        rows.append(
            f"| {name} | {expansion} | {unused:.2f} | {len(of_place)} | {100 * random:.1f} % | {100 * active:.1f} % | {ratio} | {gain:+.3f} |"
        )
    return "\n".join(rows)


def dimensions_table(dimensions: dict[str, dict[str, Line]]) -> str:
    """Both measures, over the width, for each model: a row for each block."""
    tables = []
    for source, hooks in dimensions.items():
        kinds = [kind for kind in KINDS if any(hook.endswith(kind) for hook in hooks)]
        rows = ["| block | " + " | ".join(KINDS[kind][0] for kind in kinds) + " |", "|---" + "|---:" * len(kinds) + "|"]
        for block in sorted({int(hook.split(".")[1]) for hook in hooks}):
            records = [hooks[f"blocks.{block}.{kind}"] for kind in kinds]
            rows.append(f"| {block} | " + " | ".join(f"{record['effective_rank']:.2f} / {record['variance_99']:.2f}" for record in records) + " |")
        tables.append(
            "\n".join([f"**{NAMES[source]}**, D = {next(iter(hooks.values()))['width']}, {next(iter(hooks.values()))['tokens']:,} tokens", "", *rows])
        )
    return "\n\n".join(tables)


# --------------------------------------------------------------------------------------------------------------- figure


def draw(dimensions: dict[str, dict[str, Line]], results: list[Line], layers: set[str], path: Path) -> None:
    """Dimensions by depth; dead latents by arm; dead latents against the unused share of the space."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {"axes.edgecolor": PALE, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK}
    with matplotlib.rc_context({"font.size": 8.5, **colors}):
        figure = Figure(figsize=(14, 5), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 3, width_ratios=(0.9, 1.15, 1.1))
        for row, (source, hooks) in enumerate(dimensions.items()):
            axis = figure.add_subplot(grid[row, 0])
            _plain(axis)
            for kind, (title, color) in KINDS.items():
                records = sorted((int(hook.split(".")[1]), record) for hook, record in hooks.items() if hook.endswith(kind))
                blocks = [block for block, _ in records]
                axis.plot(blocks, [record["effective_rank"] for _, record in records], "o-", color=color, markersize=3.5, linewidth=1.4, label=title)
                axis.plot(blocks, [record["variance_99"] for _, record in records], "--", color=color, linewidth=0.9, alpha=0.75)
            axis.set_ylim(0, 1)
            axis.set_xticks(blocks)
            axis.set_title(f"{NAMES[source]}: dimensions used / D", loc="left", fontsize=9.5, fontweight="bold")
            if row == 0:
                axis.legend(frameon=False, fontsize=7.5, loc="lower right", handlelength=1.2)
            if row == len(dimensions) - 1:
                axis.set_xlabel("block\n● effective rank   - - 99 % of the variance")
        _draw_arms(figure.add_subplot(grid[:, 1]), [line for line in results if line["hook_point"] in layers])
        _draw_dose(figure.add_subplot(grid[:, 2]), results)
        figure.savefig(path)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="#e4e4e7", linewidth=0.6)
    axis.set_axisbelow(True)


def _draw_arms(axis: Any, lines: list[Line]) -> None:
    """Dead latents at the end, a row for each arm, a mark for each model and width."""
    _plain(axis)
    shown = [arm for arm in ARMS if any(line["arm"] == arm for line in lines)][::-1]
    series = groups(sorted(lines, key=lambda line: (line["source"], line["d_sae"])), "source", "expansion")
    styles = {"demo": ("o", ("#fdba74", "#c2410c")), "minilm": ("s", ("#93c5fd", "#1d4ed8"))}
    widths = {source: sorted({line["expansion"] for line in lines if line["source"] == source}) for source in styles}
    for index, ((source, width), of_series) in enumerate(series.items()):
        marker, palette = styles[source]
        color = palette[min(widths[source].index(width), 1)]
        height = (len(series) - 1) / 2 - index
        for place, arm in enumerate(shown):
            values = [100 * line["dead"] for line in of_series if line["arm"] == arm]
            y = place + 0.14 * height
            axis.plot(values, [y] * len(values), marker, color=color, markersize=2.5, alpha=0.5)
            if values:
                label = f"{NAMES[source]}, F = {width} D" if arm == "random" else None
                axis.plot(statistics.fmean(values), y, marker, color=color, markersize=6.5, markeredgecolor="white", markeredgewidth=0.7, label=label)
    axis.set_yticks(range(len(shown)), [ARMS[arm].title for arm in shown])
    axis.set_xlim(0, None)
    axis.set_xlabel("dead latents at the end, %")
    axis.set_title("What helps", loc="left", fontsize=9.5, fontweight="bold")
    axis.legend(frameon=False, fontsize=7.5, loc="best")


def _draw_dose(axis: Any, results: list[Line]) -> None:
    """Each pair of arms: tied random filled, active subspace open, an arrow between them."""
    _plain(axis)
    pairs = groups([{**random, "active": active["dead"]} for random, active in paired(results)], "source", "hook_point", "expansion")
    palette, markers = ("#a7c957", "#3f6212", "#14532d"), {"demo": "o", "minilm": "s", "synthetic": "D"}
    expansions = sorted({key[2] for key in pairs})
    shades = {width: palette[min(2, round(2 * index / max(1, len(expansions) - 1)))] for index, width in enumerate(expansions)}
    for (source, _, width), lines in pairs.items():
        x = 1 - statistics.fmean(line["effective_rank"] for line in lines)
        random, active = 100 * statistics.fmean(line["dead"] for line in lines), 100 * statistics.fmean(line["active"] for line in lines)
        color, marker = shades[width], markers[source]
        axis.annotate("", (x, active), (x, random), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 0.9, "shrinkA": 2, "shrinkB": 3})
        axis.plot(x, random, marker, color=color, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)
        axis.plot(x, active, marker, markerfacecolor="white", markeredgecolor=color, markersize=5)
    for source in dict.fromkeys(key[0] for key in pairs):
        axis.plot([], [], markers[source], color=PALE, markersize=5, label=f"{NAMES[source]}, tied random")
        axis.plot([], [], markers[source], markerfacecolor="white", markeredgecolor=PALE, markersize=5, label='… active subspace, "auto"')
    for width, color in shades.items():
        axis.plot([], [], "-", color=color, linewidth=2, label=f"F = {width} D")
    axis.set_xlabel("share of the space that is not used: 1 - effective rank / D")
    axis.set_ylabel("dead latents at the end, %")
    axis.set_xlim(0, 0.8)
    axis.set_ylim(-0.7, None)
    axis.set_title("From tied random to active subspace", loc="left", fontsize=9.5, fontweight="bold")
    axis.legend(frameon=False, fontsize=7.5, loc="upper left")


def write(folder: Path) -> None:
    """`tables.md` and `active_subspace.png` in the folder that holds the measurements."""
    from run import read_json, read_results
    from sources import SOURCES

    results, dimensions = read_results(folder / "results.jsonl"), read_json(folder / "dimensions.json")
    layers = {source.layer for source in SOURCES.values()}
    models = [line for line in results if line["source"] in SOURCES]
    parts = [
        "Effective rank / D, and the share of the dimensions that holds 99 % of the variance.",
        dimensions_table(dimensions),
        arms_table(models, layers),
        dose_table(results),
    ]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw(dimensions, results, layers, folder / "active_subspace.png")
    dates = sorted({line["date"] for line in results})
    print(json.dumps({"dictionaries": len(results), "from": dates[0], "to": dates[-1]}) if dates else "nothing measured yet")


if __name__ == "__main__":
    write(HERE)
