"""How long a training step takes in this library and in others, interleaved on the same batches.

    python benchmarks/training_step.py [--shape D,F,k,N ...] [--kinds topk batchtopk relu jumprelu] [--rounds 10] [--json FILE]
    python benchmarks/training_step.py --show FILE

Every library trains in a process of its own, in a virtual environment of its own (made on the first run below --venvs, see
`peers/environments.py`), with its own training loop: forward, loss, backward, clipping, decoder normalisation, optimizer, statistics, as they
are by default there. What each one runs is written at the top of `peers/with_*.py`. Rounds go from library to library, so that all of
them meet the same moments of a noisy machine. Ratios are within a round; absolute times are context.

`floor` is no library: the encoder product, three passes over the non-zero codes and the optimizer alone (`peers/with_floor.py`).

For relu and jumprelu the encoder biases of every library are shifted before the first step until each latent fires on --density of the
tokens, and the learning rate is small, so that it stays so: the step of a trained dictionary. What the density then was is in the table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers import environments
from peers.feed import Task
from peers.pool import KINDS, Contestant, Pool, append, machine, now

SHAPES = ["768,6144,50,4096", "768,24576,50,2048"]
LEARNING_RATE = {"topk": 1e-4, "batchtopk": 1e-4, "relu": 1e-6, "jumprelu": 1e-6}
OWN = "lm_saes "


PEER_ROWS = [
    Contestant("sparsify (adam)", "sparsify", {"optimizer": "adam"}, ("topk",)),
    Contestant("sparsify (signum)", "sparsify", {"optimizer": "signum"}, ("topk",)),
    Contestant("sae-lens (sparse)", "sae_lens", {"sparse": True}, ("topk",)),
    Contestant("sae-lens", "sae_lens"),
    Contestant("dictionary_learning", "dictionary_learning"),
    Contestant("overcomplete", "overcomplete"),
    Contestant("floor", "floor"),
]


def contestants(modes: list[str], libraries: list[str]) -> list[Contestant]:
    """The rows: this library once for each implementation of its ops, then the others and the floor."""
    own = [Contestant(OWN + mode, "lm_saes", environment={"LM_SAES_OPS": mode}) for mode in modes]
    return [row for row in [*own, *PEER_ROWS] if row.library in libraries]


def measure(rows: list[Contestant], task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """One record: rounds of steps of all libraries that train this kind of dictionary, interleaved."""
    pool = Pool([(row, task) for row in rows if task.kind in row.kinds], arguments)
    found = pool.measure(arguments.rounds, arguments.steps, arguments.warmup, arguments.seconds)
    results = {row.label: result for (row, _), result in zip(pool.entries, found, strict=True) if result is not None}
    return {"date": now(), "machine": machine(), "threads": arguments.threads, "task": asdict(task), "results": results}


# --------------------------------------------------------------------------------------------------------------- tables


def merged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the same task, machine and number of threads put together. Rounds stay rounds: only rows of one record are compared."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(json.dumps([record["task"], record["machine"], record["threads"]]), []).append(record)
    return [_merge(group) for group in groups.values()]


def _merge(group: list[dict[str, Any]]) -> dict[str, Any]:
    labels = [label for label in group[0]["results"] if all(label in record["results"] for record in group)]
    results = {
        label: {
            **group[-1]["results"][label],
            **{clock: [steps for record in group for steps in record["results"][label][clock]] for clock in ("wall", "cpu")},
        }
        for label in labels
    }
    return {**group[-1], "date": f"{group[0]['date']} to {group[-1]['date']}" if len(group) > 1 else group[0]["date"], "results": results}


def table(record: dict[str, Any]) -> str:
    """A Markdown table of one record."""
    task, results = Task(**record["task"]), record["results"]
    if not results:
        return "nothing was measured"
    base = next(iter(results))
    head = f"{task.kind}, D {task.d_model}, F {task.d_sae}, " + (f"k {task.k}" if "topk" in task.kind else f"density {task.density:g}")
    rounds = len(results[base]["wall"])
    lines = [
        f"**{head}, N {task.tokens}**, {rounds} rounds of {len(results[base]['wall'][0])}, {record['threads']} threads, {record['date']}, {record['machine']}",
        "",
        f"| | / {base}, medians | middle half of rounds | CPU / {base} | median ms | min ms | CPU ms | peak MiB | of it the step's | L0 | unexplained variance |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    reference = results[base]
    for label, result in results.items():
        wall, cpu = _flat(result["wall"]), _flat(result["cpu"])
        ratio = statistics.median(wall) / statistics.median(_flat(reference["wall"]))
        cpu_ratio = statistics.median(cpu) / statistics.median(_flat(reference["cpu"]))
        by_round = [sum(a) / sum(b) for a, b in zip(result["wall"], reference["wall"], strict=True)]
        low, _, high = statistics.quantiles(by_round, n=4, method="inclusive") if len(by_round) > 1 else [by_round[0]] * 3
        before, after = result["before"], result["after"]
        learned = "–" if label == "floor" else f"{before['fvu']:.4f} → {after['fvu']:.4f}"
        lines.append(
            f"| {label} | {ratio:.2f} | {low:.2f} to {high:.2f} | {cpu_ratio:.2f} | {1e3 * statistics.median(wall):.0f} | {1e3 * min(wall):.0f} | "
            f"{1e3 * statistics.median(cpu):.0f} | {after['peak_mib']:.0f} | {after['peak_mib'] - after['before_mib']:.0f} | {after['l0']:.1f} | {learned} |"
        )
    if "floor" in results:
        after = results["floor"]["after"]
        pieces = ", ".join(f"{name} {1e3 * statistics.median(times):.0f} ms" for name, times in after["pieces"].items())
        lines += ["", f"Pieces of the floor (medians): {pieces}."]
    lines += ["", "Versions: " + "; ".join(f"{label} {result['after']['version']}" for label, result in results.items())]
    return "\n".join(lines)


def doubts(record: dict[str, Any]) -> list[str]:
    """What makes a row worthless: a library that did not learn, or that does not have the asked number of non-zero codes."""
    task, found = Task(**record["task"]), []
    asked = task.k if "topk" in task.kind else task.density * task.d_sae
    for label, result in record["results"].items():
        before, after = result["before"], result["after"]
        if label != "floor" and not (after["moved"] > 0 and after["fvu"] < before["fvu"]):
            found.append(f"{label} did not learn: unexplained variance {before['fvu']:.4f}, then {after['fvu']:.4f}")
        if not 0.5 * asked <= after["l0"] <= 2 * asked:
            found.append(f"{label} has L0 {after['l0']:.1f}, asked was {asked:.1f}")
    return found


def _flat(rounds: list[list[float]]) -> list[float]:
    return [seconds for steps in rounds for seconds in steps]


def main() -> None:
    libraries = list(dict.fromkeys(["lm_saes", *(row.library for row in PEER_ROWS)]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="D,F,k,N")
    parser.add_argument("--kinds", nargs="+", default=["topk"], choices=KINDS)
    parser.add_argument("--modes", default="auto", help="values of LM_SAES_OPS, with commas; ratios are against the first")
    parser.add_argument("--libraries", nargs="+", default=libraries, choices=libraries)
    parser.add_argument("--density", type=float, default=0.01, help="share of latents that fire on a token, for relu and jumprelu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps of a library in one round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    parser.add_argument("--seconds", type=float, default=math.inf, help="fewer rounds rather than a table later than this, start included")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--venvs", type=Path, default=Path(__file__).parent / ".venvs", help="where the libraries' environments are")
    parser.add_argument("--torch-index", help="package index for torch when environments are made")
    parser.add_argument("--make-only", action="store_true", help="make the environments and stop")
    parser.add_argument("--json", type=Path, help="append what was measured to this file")
    parser.add_argument("--show", type=Path, help="print the tables of such a file, records of the same task together, and stop")
    arguments = parser.parse_args()
    if arguments.show:
        for record in merged(json.loads(arguments.show.read_text())):
            print(table(record), end="\n\n")
        return
    for library in arguments.libraries:
        environments.make(library, arguments.venvs.resolve(), arguments.torch_index)
    if arguments.make_only:
        return
    arguments.venvs = arguments.venvs.resolve()
    rows = contestants(arguments.modes.split(","), arguments.libraries)
    for shape in arguments.shape:
        D, F, k, N = (int(number) for number in shape.split(","))
        for kind in arguments.kinds:
            record = measure(rows, Task(kind, D, F, k, N, LEARNING_RATE[kind], arguments.density), arguments)
            if arguments.json:
                append(arguments.json, record)
            print(table(record), end="\n\n", flush=True)
            for doubt in doubts(record):
                print(f"warning: {doubt}", file=sys.stderr)


if __name__ == "__main__":
    main()
