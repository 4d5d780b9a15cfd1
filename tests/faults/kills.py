"""Processes that are killed in the middle of their work, and what they leave.

A job is a command of `lm-saes`. It runs in a process of its own (forked from a server that has imported everything, so that starting one costs
nothing), is sent SIGKILL at some point, and is started again, until it is let come to its end. A point is chosen by what can be seen in the folder,
not by the clock, so that a slow machine does not move it: so many lines of metrics, shards or forwards of the language model after this process
began its work; a checkpoint that is being written; the last save; the initialisation.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SERVER = multiprocessing.get_context("forkserver") if "forkserver" in multiprocessing.get_all_start_methods() else None
PRELOADED = [
    "lm_saes.commands", "lm_saes.cache_commands", "lm_saes.cli", "lm_saes.lm.huggingface", "lm_saes.ops.native", "tests.faults.kills", "datasets",
    "transformers.models.gpt_neox.modeling_gpt_neox", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
]  # fmt: skip
FORWARDS = ".forwards"
"""A file beside a job's folder that grows by a byte with each forward of the language model."""
OF_THE_PROCESS = ("seconds", "since", "random", "xxh3")
"""What differs between any two processes: clocks, the seeds of Python's and NumPy's own generators (from which nothing here draws; that they are put
back is held by tests/training/test_resume.py), and checksums of files that hold these."""


def run_command(words: list[str], log: str, forwards: str) -> None:
    """What a process does: one command, its output in a file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    from lm_saes import cli, generate
    from lm_saes.lm.huggingface import HuggingFaceLanguageModel

    torch.set_num_threads(1)
    generate.estimate_generation.__defaults__ = (None, 0.02)
    counter = os.open(forwards, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for name in ("capture", "logits"):
        original = getattr(HuggingFaceLanguageModel, name)

        def counted(self: Any, *arguments: Any, _original: Any = original, **options: Any) -> Any:
            os.write(counter, b".")
            return _original(self, *arguments, **options)

        setattr(HuggingFaceLanguageModel, name, counted)
    sys.argv = ["lm-saes", *words]
    cli.main()


class Job(NamedTuple):
    """A command, and how to see from outside how far it is."""

    name: str
    words: list[str]
    """Command line; run again after a kill as it is."""
    folder: Path
    progress: Callable[[Path], int]
    """Of the process that works in the folder: 0 until it has begun its work."""
    total: int
    """Progress at the end, about."""
    result: Callable[[Path], dict[str, Any]]
    """Everything that must be equal in the end."""
    points: tuple[str, ...] = ("work",)
    """Kinds of points at which it can be killed."""


class Kill(NamedTuple):
    """One SIGKILL."""

    job: str
    point: str
    landed: bool
    """The process was running, had begun its work, and had not ended it."""
    at: int
    """Progress."""


def start(job: Job) -> Any:
    """The job in a process."""
    assert SERVER is not None
    SERVER.set_forkserver_preload(PRELOADED)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    forwards = job.folder.with_name(job.folder.name + FORWARDS)
    forwards.unlink(missing_ok=True)
    log = job.folder.with_name(job.folder.name + ".log")
    process = SERVER.Process(target=run_command, args=(job.words, str(log), str(forwards)))
    process.start()
    return process


def finish(job: Job) -> None:
    """Let the job come to its end."""
    process = start(job)
    process.join(300)
    assert process.exitcode == 0, job.folder.with_name(job.folder.name + ".log").read_text()[-2000:]


def kill(job: Job, point: str, draw: random.Random) -> Kill | None:
    """Start the job and kill it at a point drawn from those of a kind; None if it was over before."""
    began = _marks(job.folder)
    process = start(job)
    target = draw.randint(1, max(1, job.total - 2))
    deadline = time.monotonic() + 300
    while process.is_alive() and time.monotonic() < deadline:
        progress = _progress_of_this_process(job, began)
        if point == "work" and progress >= target:
            break
        if point == "checkpoint" and progress >= 1 and _is_there(job.folder, "checkpoints/.unfinished_step_*"):
            break
        if point == "last save" and _is_there(job.folder, ".saving-*"):
            break
        if point == "initialisation" and progress == 0 and _owner(job.folder) == process.pid:
            time.sleep(draw.uniform(0, 0.1))
            break
        time.sleep(0.0002)
    time.sleep(draw.uniform(0, 0.004))
    alive = process.is_alive()
    os.kill(process.pid, signal.SIGKILL) if alive else None
    process.join(60)
    if process.exitcode == 0:
        return None
    assert process.exitcode == -signal.SIGKILL, job.folder.with_name(job.folder.name + ".log").read_text()[-2000:]
    progress = _progress_of_this_process(job, began)
    return Kill(job.name, point, alive and (progress >= 1 or point == "initialisation"), progress)


def _marks(folder: Path) -> dict[str, tuple[int, int]]:
    """Files of metrics as they are, to tell those of the next process from them."""
    paths = [*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")]
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def _progress_of_this_process(job: Job, before: dict[str, tuple[int, int]]) -> int:
    try:
        if job.progress is lines_of_metrics and any(_marks(job.folder).get(path) == mark for path, mark in before.items()):
            return 0  # the run has not begun again: its first act is to replace the file
        return job.progress(job.folder)
    except FileNotFoundError:  # renamed meanwhile
        return 0


def _is_there(folder: Path, pattern: str) -> bool:
    try:
        return any(folder.rglob(pattern))
    except FileNotFoundError:  # removed while it was looked into
        return False


def _owner(folder: Path) -> int | None:
    try:
        return json.loads((folder / ".lock.json").read_text())["process"]
    except (OSError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------- progress and results


def lines_of_metrics(folder: Path) -> int:
    """Lines of the first metrics file below a folder that were written since the run began or went on; 1 means that it has."""
    files = sorted([*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")])
    return 1 + files[0].read_text().count("\n") if files else 0


def shards(folder: Path) -> int:
    """Shards of a cache, the one being written included."""
    return sum(1 for _ in folder.glob("shard-*")) + sum(1 for _ in folder.glob(".unfinished_shard-*"))


def forwards(folder: Path) -> int:
    """Forwards of the language model of the newest process."""
    return folder.with_name(folder.name + FORWARDS).stat().st_size


def result_of_run(folder: Path) -> dict[str, Any]:
    """Weights, checkpoints, metrics and evaluations below a folder: everything but clocks, the folder's own name and who held the lock."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name.startswith(".lock"):
            continue
        if path.parent.name == "stream":
            found[name] = None  # how far a thread has read ahead is a matter of time; where it is read from is seen in what comes next
        elif path.suffix == ".safetensors" or path.name in ("config.json", "latest", "manifest.json"):
            found[name] = path.read_bytes()
        elif path.name == "metrics.jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()), str(folder))
        else:
            found[name] = None  # that it is there; nothing unfinished may be
    return found


def _timeless(value: Any, folder: str = "\0") -> Any:
    """JSON without what is of the process, and without the folder's name."""
    if isinstance(value, dict):
        own = [key for key in value if key.startswith(("time/", "stream/")) or key in OF_THE_PROCESS or "tokens_per_second" in key]
        return {key: _timeless(item, folder) for key, item in value.items() if key not in own}
    if isinstance(value, list):
        return [_timeless(item, folder) for item in value]
    return value.replace(folder, "FOLDER") if isinstance(value, str) else value
