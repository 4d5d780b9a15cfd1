"""Tables and the figure from what was measured: `python benchmarks/active_subspace/report.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arms import ARMS

HERE = Path(__file__).parent
NAMES = {"demo": "demo model", "minilm": "MiniLM", "synthetic": "control"}
KINDS = {"hook_attn_out": "attention output", "hook_mlp_out": "MLP output", "hook_resid_post": "residual stream"}
DOSE_ARMS = ("random", "active-auto", "active-.25")
ALLOWED_LOSS = 0.005
"""Explained variance that an arm may cost against a tied random start."""

Line = dict[str, Any]


def mean_and_spread(values: Iterable[float], form: str = "{:.4f}") -> str:
    """The mean, and half the range where there are several values."""
    values = list(values)
    text = form.format(statistics.fmean(values))
    return f"{text} ± {form.format((max(values) - min(values)) / 2).lstrip('+')}" if len(values) > 1 else text


def groups(results: list[Line], *fields: str) -> dict[tuple[Any, ...], list[Line]]:
    """Lines by the values of some fields, in the order in which they came."""
    found: dict[tuple[Any, ...], list[Line]] = {}
    for line in results:
        found.setdefault(tuple(line[name] for name in fields), []).append(line)
    return found


def gains(results: list[Line], arm: str) -> list[float]:
    """Explained variance of an arm less that of tied random, for each place, width, length and seed at which there are both."""
    fields = ("source", "hook_point", "d_sae", "k", "seed", "tokens")
    random = {key: lines[0] for key, lines in groups([line for line in results if line["arm"] == "random"], *fields).items()}
    of_arm = groups([line for line in results if line["arm"] == arm], *fields)
    return [lines[0]["explained_variance"] - random[key]["explained_variance"] for key, lines in of_arm.items() if key in random]


def arms_table(lines: list[Line], layers: set[tuple[str, str]]) -> str:
    """One table for each model, width and length of training: what the arms came to at the layer that all were trained on."""
    tables = []
    chosen = sorted(
        (line for line in lines if (line["source"], line["hook_point"]) in layers), key=lambda line: (line["source"], line["tokens"], line["d_sae"])
    )
    for (source, hook, width, tokens), of_width in groups(chosen, "source", "hook_point", "d_sae", "tokens").items():
        first = of_width[0]
        cost = "ΔCE, nats" if source == "demo" else "1 - cosine"
        rows = [
            f"| arm | seeds | dead at start | dead | explained variance | to tied random | {cost} | CPU s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for arm in ARMS:
            if of_arm := [line for line in of_width if line["arm"] == arm]:
                gained = gains(of_width, arm)
                cells = [
                    mean_and_spread((100 * line["dead_start"] for line in of_arm), "{:.1f}") + " %",
                    mean_and_spread((100 * line["dead"] for line in of_arm), "{:.1f}") + " %",
                    mean_and_spread((line["explained_variance"] for line in of_arm), "{:.3f}"),
                    mean_and_spread(gained, "{:+.3f}") if gained and arm != "random" else "–",
                    mean_and_spread((line["cost"] for line in of_arm), "{:.4f}"),
                    f"{statistics.fmean(line['cpu_seconds'] for line in of_arm):.0f}",
                ]
                dimension = f" (d = {of_arm[0]['d_active']})" if of_arm[0]["d_active"] else ""
                rows.append(f"| {ARMS[arm].title}{dimension} | {len(of_arm)} | " + " | ".join(cells) + " |")
        share = f"effective rank {first['effective_rank']:.2f} D, 99 % of the variance in {first['variance_99']:.2f} D"
        head = (
            f"**{NAMES[source]}, {hook}**, D = {first['d_model']}, F = {width} = {first['expansion']} D, k = {first['k']}, {tokens:,} tokens; {share}"
        )
        tables.append("\n".join([head, "", *rows]))
    return "\n\n".join(tables)


def dose(results: list[Line]) -> dict[tuple[str, int, str], dict[str, list[Line]]]:
    """For each source, width and hook point: the lines of the arms of the dose-response, of the shortest training; places without a pair left out."""
    found = {}
    of_length = [line for line in results if line["tokens"] == min(line["tokens"] for line in results)]
    by_place = groups(
        sorted(of_length, key=lambda line: (line["source"], line["expansion"], -line["effective_rank"])), "source", "expansion", "hook_point"
    )
    for place, lines in by_place.items():
        of_arms = {arm: of_arm for arm in DOSE_ARMS if (of_arm := [line for line in lines if line["arm"] == arm])}
        if "random" in of_arms and len(of_arms) > 1:
            found[place] = of_arms
    return found


def dose_table(results: list[Line]) -> str:
    """Dead latents against how much of the space is unused and how wide the dictionary is."""
    rows = [
        '| activations | F / D | 1 - effective rank / D | seeds | dead, tied random | dead, "auto" | dead, .25 D | explained variance, "auto" | .25 D |',
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (source, expansion, hook), of_arms in dose(results).items():
        unused = 1 - statistics.fmean(line["effective_rank"] for line in of_arms["random"])
        dead = {arm: mean_and_spread((100 * line["dead"] for line in lines), "{:.1f}") + " %" for arm, lines in of_arms.items()}
        gained = {arm: mean_and_spread(gains(of_arms["random"] + lines, arm), "{:+.3f}") for arm, lines in of_arms.items() if arm != "random"}
        cells = [str(expansion), f"{unused:.2f}", str(len(of_arms["random"])), *(dead.get(arm, "") for arm in DOSE_ARMS)]
        rows.append(f"| {NAMES[source]}, {hook} | " + " | ".join([*cells, *(gained.get(arm, "") for arm in DOSE_ARMS[1:])]) + " |")
    return "\n".join(rows)


def gains_table(results: list[Line]) -> str:
    """For each arm: by how much explained variance lies above or below that of tied random, over everything that was trained."""
    rows = [
        f"| arm | pairs | lowest | mean | highest | pairs lower by more than {ALLOWED_LOSS:g} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm in (arm for arm in ARMS if arm != "random"):
        if values := gains(results, arm):
            low, mean, high = (f"{value:+.3f}" for value in (min(values), statistics.fmean(values), max(values)))
            rows.append(f"| {ARMS[arm].title} | {len(values)} | {low} | {mean} | {high} | {sum(value < -ALLOWED_LOSS for value in values)} |")
    return "\n".join(rows)


def dimensions_table(dimensions: dict[str, dict[str, Line]]) -> str:
    """Both measures, over the width, for each model: a row for each block."""
    tables = []
    for source, hooks in dimensions.items():
        kinds = [kind for kind in KINDS if any(hook.endswith(kind) for hook in hooks)]
        rows = ["| block | " + " | ".join(KINDS[kind] for kind in kinds) + " |", "|---" + "|---:" * len(kinds) + "|"]
        for block in sorted({int(hook.split(".")[1]) for hook in hooks}):
            records = [hooks[f"blocks.{block}.{kind}"] for kind in kinds]
            rows.append(f"| {block} | " + " | ".join(f"{record['effective_rank']:.2f} / {record['variance_99']:.2f}" for record in records) + " |")
        first = next(iter(hooks.values()))
        tables.append("\n".join([f"**{NAMES[source]}**, D = {first['width']}, {first['tokens']:,} tokens", "", *rows]))
    return "\n\n".join(tables)


def write(folder: Path) -> None:
    """`tables.md` and `active_subspace.png` in the folder that holds the measurements."""
    from figure import draw
    from run import read_json, read_results
    from sources import SOURCES

    results, dimensions = read_results(folder / "results.jsonl"), read_json(folder / "dimensions.json")
    layers = {(name, source.layer) for name, source in SOURCES.items()}
    dates = sorted({line["date"] for line in results})
    if not dates:
        print("nothing measured yet")
        return
    parts = [
        f"{len(results)} dictionaries, {dates[0]} to {dates[-1]}, torch {', '.join(sorted({line['torch'] for line in results}))}. Mean ± half the range over seeds.",
        "## Dimensions\n\nEffective rank / D, and the share of the dimensions that holds 99 % of the variance.",
        dimensions_table(dimensions),
        "## Arms",
        arms_table([line for line in results if line["source"] in SOURCES], layers),
        "## Dose and response\n\nDifferences of explained variance are to tied random.",
        dose_table(results),
        "## Explained variance against tied random, everywhere",
        gains_table(results),
    ]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw(dimensions, results, layers, folder / "active_subspace.png")
    print(json.dumps({"dictionaries": len(results), "from": dates[0], "to": dates[-1]}))


if __name__ == "__main__":
    write(HERE)
