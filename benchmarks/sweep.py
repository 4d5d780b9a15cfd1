"""A sweep of k dictionaries against k runs one after the other, and against one run: the same tokens of the demo language model.

    python benchmarks/sweep.py --tokens 131072

Four runs and two sweeps of them, interleaved. Every arm is a process of its own, so that each loads its libraries and starts cold, as people run it. Prints a Markdown table: wall and CPU seconds
of the whole process, and of training alone (from the first step to the last, taken from `metrics.jsonl`). "One stream and k steps" is what training alone should
take: that of one run, and the optimizer steps of the others once more (their seconds are in `metrics.jsonl` too).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRID = ["--grid", "trainer.lr=1e-3,5e-4", "--grid", "sae.top_k=16,32"]
MEMBERS = [("1e-3", "16"), ("1e-3", "32"), ("5e-4", "16"), ("5e-4", "32")]


def timed(words: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of `lm-saes WORDS`."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "lm_saes.cli", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def training_seconds(folder: Path) -> float:
    """Seconds from the beginning of training to the last step."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["time/seconds"]


def step_seconds(folder: Path) -> float:
    """Seconds of all optimizer steps of a run, without what feeds them: each logged rate is that of all steps so far."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return last["details/n_training_tokens"] / last["time/step_tokens_per_second"]


def one_stream_and_steps(training: list[float], steps: list[float]) -> float:
    """What runs that took `training` seconds alone, `steps` of them in optimizer steps, should take on one stream."""
    streams = [whole - step for whole, step in zip(training, steps, strict=True)]
    return sum(streams) / len(streams) + sum(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    short = ["--eval", "false", "--trainer.total_training_tokens", str(arguments.tokens), "--trainer.n_checkpoints", "1"]
    alone, steps, swept = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def train(rate: str, k: str) -> None:
            out = folder / f"alone-{rate}-{k}"
            words = ["train", "demo", *short, "--trainer.lr", rate, "--sae.top_k", k, "--trainer.exp_result_path", str(out)]
            alone.append((*timed(words), training_seconds(out)))
            steps.append(step_seconds(out))

        def sweep(index: int) -> None:
            seconds = timed(["sweep", "demo", *short, *GRID, "--out", str(folder / f"sweep-{index}")])
            members = [path.parent for path in (folder / f"sweep-{index}").glob("*/metrics.jsonl")]
            swept.append((*seconds, max(training_seconds(member) for member in members)))

        for index in range(2):  # interleaved, so that a busy minute of the machine does not fall on one arm alone
            train(*MEMBERS[2 * index])
            sweep(index)
            train(*MEMBERS[2 * index + 1])
        same = [
            (folder / f"alone-{rate}-{k}/sae_weights.safetensors").read_bytes()
            == (folder / f"sweep-{index}/lr={float(rate):g},top_k={k}/sae_weights.safetensors").read_bytes()
            for rate, k in MEMBERS
            for index in range(2)
        ]
    four = [sum(column) for column in zip(*alone, strict=True)]
    one = [total / len(alone) for total in four]
    mean = [sum(column) / len(swept) for column in zip(*swept, strict=True)]
    print("| | wall s | CPU s | training alone, wall s |\n|---|---:|---:|---:|")
    for label, numbers in (("one run (mean of the four)", one), ("the four runs", four), ("a sweep of the four (mean of two)", mean)):
        print(f"| {label} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    expected = one_stream_and_steps([seconds[2] for seconds in alone], steps)
    print(f"| one stream and four steps | | | {expected:.1f} |")
    print("| sweep / four runs | " + " | ".join(f"{a / b:.2f}" for a, b in zip(mean, four, strict=True)) + " |")
    print("| sweep / one run | " + " | ".join(f"{a / b:.2f}" for a, b in zip(mean, one, strict=True)) + " |")
    print(
        "\neach: runs "
        + ", ".join(f"{seconds[0]:.1f}" for seconds in alone)
        + " s; sweeps "
        + ", ".join(f"{seconds[0]:.1f}" for seconds in swept)
        + " s"
    )
    print(f"weights equal to those of the runs alone, bit for bit: {sum(same)} of {len(same)}")


if __name__ == "__main__":
    main()
