"""How the cost of this library's training step grows with F, k, N and D, one at a time around a middle point.

    python benchmarks/scaling.py [--base 768,6144,50,4096] [--kinds topk] [--modes auto,reference] [--rounds 3] [--json FILE]

The steps are those of `training_step.py` (`Trainer.fit`, clipping and statistics on). All points of one axis and all modes are processes
that live at the same time and take turns. "rate" is (time / time at the first point) against (value / first value): 1 is proportional.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from peers.feed import Task
from peers.pool import KINDS, Pool, append, machine, now
from training_step import LEARNING_RATE, contestants

AXES = {"F": [1536, 3072, 6144, 12288, 24576], "k": [16, 32, 64, 128, 256], "N": [1024, 2048, 4096, 8192], "D": [192, 384, 768, 1536]}
FIELDS = {"F": "d_sae", "k": "k", "N": "tokens", "D": "d_model"}


def points(base: Task, axis: str, values: list[int]) -> list[Task]:
    """The base with one number changed."""
    return [Task(**{**vars(base), FIELDS[axis]: value}) for value in values]


def table(axis: str, values: list[int], medians: dict[str, list[float]], base: Task) -> str:
    """Milliseconds of a step by mode and value, with growth beside it and a bar."""
    fixed = ", ".join(f"{name} {getattr(base, FIELDS[name])}" for name in AXES if name != axis)
    modes = list(medians)
    lines = [f"**{base.kind}, {fixed}**", "", "| " + axis + " | " + " | ".join(f"{mode} ms | rate" for mode in modes) + " | |"]
    lines.append("|---" * (2 * len(modes) + 2) + "|")
    longest = max(max(times) for times in medians.values())
    for i, value in enumerate(values):
        cells = []
        for mode in modes:
            growth = (medians[mode][i] / medians[mode][0]) / (value / values[0])
            cells.append(f"{1e3 * medians[mode][i]:.0f} | {growth:.2f}")
        bar = "█" * max(1, round(24 * medians[modes[0]][i] / longest))
        lines.append(f"| {value} | " + " | ".join(cells) + f" | {bar} |")
    return "\n".join(lines)


def measure_axis(base: Task, axis: str, values: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds over all points and modes of an axis, as `{mode: [wall seconds of each step] for each value}`."""
    rows = contestants(arguments.modes.split(","), ["lm_saes"])
    pool = Pool([(row, task) for task in points(base, axis, values) for row in rows if task.kind in row.kinds], arguments)
    results = pool.measure(arguments.rounds, arguments.steps, arguments.warmup)
    steps: dict[str, list[list[float]]] = {}
    for (row, _), result in zip(pool.entries, results, strict=True):
        if result is None:
            raise SystemExit(f"error: {row.label} failed; see above")
        steps.setdefault(row.label, []).append([seconds for part in result["wall"] for seconds in part])
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="768,6144,50,4096", help="D,F,k,N")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--values", type=int, nargs="+", help="instead of the axis's own; with one axis")
    parser.add_argument("--kinds", nargs="+", default=["topk"], choices=KINDS)
    parser.add_argument("--modes", default="auto", help="values of LM_SAES_OPS, with commas")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append what was measured to this file")
    arguments = parser.parse_args()
    arguments.venvs = Path("unused")
    if arguments.values and len(arguments.axes) != 1:
        parser.error("--values needs one axis: --axes F --values 1536 3072")
    D, F, k, N = (int(number) for number in arguments.base.split(","))
    print(f"{machine()}, {arguments.threads} threads\n")
    for kind in arguments.kinds:
        base = Task(kind, D, F, k, N, LEARNING_RATE[kind], arguments.density)
        for axis in arguments.axes:
            values = arguments.values or AXES[axis]
            steps = measure_axis(base, axis, values, arguments)
            medians = {mode: [statistics.median(times) for times in by_value] for mode, by_value in steps.items()}
            print(table(axis, values, medians, base), end="\n\n", flush=True)
            if arguments.json:
                record = {"date": now(), "machine": machine(), "threads": arguments.threads}
                append(arguments.json, {**record, "base": vars(base), "axis": axis, "values": values, "wall": steps})


if __name__ == "__main__":
    main()
