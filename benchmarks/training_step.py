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
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import environments
import numpy
from feed import Task, make_batches

SHAPES = ["768,6144,50,4096", "768,24576,50,2048"]
KINDS = ["topk", "batchtopk", "relu", "jumprelu"]
BATCHES = 4
LEARNING_RATE = {"topk": 1e-4, "batchtopk": 1e-4, "relu": 1e-5, "jumprelu": 1e-5}
PEERS = Path(__file__).parent / "peers"
OWN = "lm_saes "


@dataclass(frozen=True)
class Contestant:
    """A row of the table: a library, its options, and the kinds of dictionary that it can train with them."""

    label: str
    library: str
    options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = tuple(KINDS)
    environment: dict[str, str] = field(default_factory=dict)


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


class Worker:
    """A process that trains one library's dictionary, see `peers/feed.py`."""

    def __init__(self, row: Contestant, task: Task, batches: Path, threads: int, venvs: Path, log: Path) -> None:
        self.row, self.log = row, log
        command = [str(environments.python_of(row.library, venvs)), str(PEERS / "worker.py"), row.library, str(batches), json.dumps(asdict(task))]
        variables = {**os.environ, **row.environment, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, "--threads", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
            )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one command.

        Raises:
            WorkerError: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": command, **arguments}), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            last = self.log.read_text().strip().splitlines()[-1:]
            raise WorkerError(f"{self.row.label} ended: {''.join(last)} (all of it: {self.log})")
        return json.loads(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class WorkerError(Exception):
    """A library's process ended before it was told to."""


def measure(rows: list[Contestant], task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    """One record: rounds of steps of all libraries, interleaved. A library that fails is left out, aloud."""
    with tempfile.TemporaryDirectory() as folder:
        batches = Path(folder) / "batches.npy"
        numpy.save(batches, make_batches(BATCHES, task.tokens, task.d_model))
        logs = Path(tempfile.mkdtemp(prefix="training_step_"))
        workers = {
            row.label: Worker(
                row, Task(**{**asdict(task), "options": row.options}), batches, arguments.threads, arguments.venvs, logs / f"{row.label}.log"
            )
            for row in rows
            if task.kind in row.kinds
        }
        results: dict[str, dict[str, Any]] = {}
        try:
            for label in list(workers):
                try:
                    results[label] = {"wall": [], "cpu": [], "before": workers[label].ask("check")}
                    workers[label].ask("steps", n=arguments.warmup)
                    workers[label].ask("check")  # the peak of memory begins anew
                except WorkerError as error:
                    print(f"warning: {error}", file=sys.stderr)
                    workers.pop(label).end()
                    results.pop(label, None)
            for number in range(arguments.rounds):
                order = list(workers)[number % len(workers) :] + list(workers)[: number % len(workers)]
                for label in order:
                    answer = workers[label].ask("steps", n=arguments.steps)
                    for clock in ("wall", "cpu"):
                        results[label][clock].append(answer[clock])
                print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
            for label, worker in workers.items():
                results[label]["after"] = worker.ask("check")
        finally:
            for worker in workers.values():
                worker.end()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"), "machine": machine(), "threads": arguments.threads, "task": asdict(task), "results": results
    }  # fmt: skip


def machine() -> str:
    """The processor, in a few words."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return f"{len(names) or os.cpu_count()} x {names[0] if names else platform.processor() or platform.machine()}"


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
        low, _, high = statistics.quantiles(by_round, n=4) if len(by_round) > 1 else [by_round[0]] * 3
        before, after = result["before"], result["after"]
        learned = "–" if label == "floor" else f"{before['fvu']:.3f} → {after['fvu']:.3f}"
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


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a JSON file."""
    records = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*records, record], indent=1) + "\n")


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
