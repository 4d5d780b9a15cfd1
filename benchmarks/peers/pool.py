"""Worker processes that take turns: what the benchmarks of training steps measure with."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
from peers import environments
from peers.feed import Task, make_batches

KINDS = ("topk", "batchtopk", "relu", "jumprelu")
BATCHES = 4
"""Batches that a worker goes round."""


@dataclass(frozen=True)
class Contestant:
    """A row of the table: a library, its options, and the kinds of dictionary that it can train with them."""

    label: str
    library: str
    options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = KINDS
    environment: dict[str, str] = field(default_factory=dict)


class Worker:
    """A process that trains one library's dictionary, see `peers/feed.py`."""

    def __init__(self, row: Contestant, task: Task, batches: Path, threads: int, venvs: Path, log: Path) -> None:
        self.row, self.log = row, log
        command = [
            str(environments.python_of(row.library, venvs)),
            str(Path(__file__).parent / "worker.py"),
            row.library,
            str(batches),
            json.dumps(asdict(task)),
        ]
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
            raise WorkerError(f"{self.row.label} is left out, its process ended:\n" + "\n".join(self.log.read_text().strip().splitlines()[-8:]))
        return json.loads(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class WorkerError(Exception):
    """A library's process ended before it was told to."""


class Pool:
    """Workers that take turns. Each entry is a row and what it trains; one that fails is left out, aloud."""

    def __init__(self, entries: list[tuple[Contestant, Task]], arguments: argparse.Namespace) -> None:
        self.entries, self.arguments = entries, arguments

    def measure(self, rounds: int, steps: int, warmup: int, seconds: float = math.inf) -> list[dict[str, Any] | None]:
        """For each entry the wall and processor seconds of its steps by round, and what it said before and after; None where it failed.

        No round is begun that would, if it lasts as long as the one before, end later than `seconds` after the start. The first always is.
        """
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            self.workers = [self._start(number, *entry, Path(folder)) for number, entry in enumerate(self.entries)]
            self.results: list[dict[str, Any] | None] = [{"wall": [], "cpu": []} for _ in self.entries]
            try:
                for number in range(len(self.entries)):
                    self._ask(number, "before", "check")
                    self._ask(number, None, "steps", n=warmup)
                    self._ask(number, None, "check")  # the peak of memory begins anew
                print(f"all started after {time.monotonic() - began:.0f} s", file=sys.stderr)
                for turn in range(rounds):
                    round_began = time.monotonic()
                    for number in range(len(self.entries)):
                        self._ask((number + turn) % len(self.entries), "steps", "steps", n=steps)
                    print(f"round {turn + 1} of {rounds}", file=sys.stderr)
                    moment = time.monotonic()
                    if moment + (moment - round_began) > began + seconds:
                        break
                for number in range(len(self.entries)):
                    self._ask(number, "after", "check")
            finally:
                for worker in self.workers:
                    worker.end()
        return self.results

    def _start(self, number: int, row: Contestant, task: Task, folder: Path) -> Worker:
        batches = folder / f"{task.tokens},{task.d_model}.npy"
        if not batches.exists():
            numpy.save(batches, make_batches(BATCHES, task.tokens, task.d_model))
        task = Task(**{**asdict(task), "options": row.options})
        return Worker(row, task, batches, self.arguments.threads, self.arguments.venvs, folder / f"{number}.log")

    def _ask(self, number: int, keep: str | None, command: str, **arguments: Any) -> None:
        result = self.results[number]
        if result is None:
            return
        try:
            answer = self.workers[number].ask(command, **arguments)
        except WorkerError as error:
            print(f"warning: {error}", file=sys.stderr)
            self.results[number] = None
            return
        if keep == "steps":
            for clock in ("wall", "cpu"):
                result[clock].append(answer[clock])
        elif keep is not None:
            result[keep] = answer


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")


def machine() -> str:
    """The processor, in a few words."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return f"{len(names) or os.cpu_count()} x {names[0] if names else platform.processor() or platform.machine()}"


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a JSON file."""
    records = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*records, record], indent=1) + "\n")
