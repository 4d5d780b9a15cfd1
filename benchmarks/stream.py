"""What lies around a training step, as shares of the step: the shuffle buffer, the statistics that every step keeps, the metrics of a log step.

    python benchmarks/stream.py [--shape 768,6144,50,4096,131072 ...] [--act-fn topk batchtopk] [--rounds 9]

Steps are those of `Trainer.fit`: clipping, fused Adam and all statistics on, float32, random activations. The pieces take turns; the buffer is
read over whole cycles of filling and mixing. Shares are given of CPU seconds (medians) and of wall seconds (minima): on a machine that does
something else too, trust the first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch

from lm_saes import ops
from lm_saes.activations.shuffle import ShuffleBuffer
from lm_saes.config import SAEConfig, TrainerConfig
from lm_saes.models import SparseDictionary
from lm_saes.training import step as step_module
from lm_saes.training.nonfinite import NonFiniteWatch
from lm_saes.training.schedules import resolve
from lm_saes.training.step import TrainingStep

FORWARD_SIZE = 4096
"""Activations in one item of the stream: 16 contexts of 256."""
STEPS = 10_000
PIECES = {"shuffle": "shuffle buffer", "statistics": "statistics of every step", "log step": "more of a step that is logged"}


class Shape(NamedTuple):
    """D, F, k, N, and the capacity of the buffer."""

    d_model: int
    d_sae: int
    k: int
    tokens: int
    buffer: int


class Seconds(NamedTuple):
    wall: float
    cpu: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    def plus(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


def now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def seconds(function: Callable[[], Any]) -> Seconds:
    start = now()
    function()
    return now() - start


class Items:
    """The same few items of random activations, over and over."""

    def __init__(self, width: int) -> None:
        self._items = [
            {"h": torch.randn(FORWARD_SIZE, width), "tokens": torch.zeros(FORWARD_SIZE, dtype=torch.int64), "mask": torch.ones(FORWARD_SIZE).bool()}
            for _ in range(4)
        ]
        self._position = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        self._position += 1
        return self._items[self._position % 4]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: Any) -> None:
        self._position = state["position"]


class Watched:
    """Adds up the time that some functions take."""

    def __init__(self, *functions: tuple[Any, str]) -> None:
        self.total = Seconds(0.0, 0.0)
        for owner, name in functions:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = now()
            result = function(*arguments)
            self.total = self.total.plus(now() - start)
            return result

        return timed

    def taken(self) -> Seconds:
        """Since the last time this was asked."""
        total, self.total = self.total, Seconds(0.0, 0.0)
        return total


def make_step(shape: Shape, act_fn: str, folder: str) -> TrainingStep:
    fields = {"hook_point_in": "h", "d_model": shape.d_model, "expansion_factor": shape.d_sae / shape.d_model, "act_fn": act_fn, "top_k": shape.k}
    cfg = SAEConfig.model_validate({**fields, "device": "cpu", "norm_activation": "token-wise"})
    trainer = resolve(TrainerConfig(clip_grad_norm=1.0, total_training_tokens=10**8), STEPS, shape.tokens)
    return TrainingStep(SparseDictionary.from_config(cfg).train(), trainer, STEPS, NonFiniteWatch(folder))


def measure(shape: Shape, act_fn: str, rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of a step and of the pieces around it, in each round."""
    buffer = ShuffleBuffer(Items(shape.d_model), shape.tokens, shape.buffer)
    cycle = max(1, shape.buffer // 2 // shape.tokens)
    times: dict[str, list[Seconds]] = {name: [] for name in ("step", *PIECES)}
    original = step_module.firing_counts
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(shape, act_fn, folder)
        watched = Watched((step_module, "firing_counts"), (step, "_update_statistics"))
        try:
            batch = next(buffer)
            for logged in (True, False, False):
                step(batch, STEPS // 2, logged)
            for _ in range(rounds):
                watched.taken()
                times["step"].append(seconds(lambda: step(batch, STEPS // 2, False)))
                times["statistics"].append(watched.taken())
                times["log step"].append(seconds(lambda: step(batch, STEPS // 2, True)) - times["step"][-1])
                whole = seconds(lambda: [next(buffer) for _ in range(cycle)])
                times["shuffle"].append(Seconds(whole.wall / cycle, whole.cpu / cycle))
        finally:
            step_module.firing_counts = original
    return times


def shares(times: dict[str, list[Seconds]]) -> dict[str, Seconds]:
    """Each piece as a share of a step: of the minimum of wall seconds, of the median of CPU seconds."""
    found = {name: Seconds(min(one.wall for one in each), statistics.median(one.cpu for one in each)) for name, each in times.items()}
    # A difference of two steps has no meaningful minimum.
    found["log step"] = found["log step"]._replace(wall=statistics.median(one.wall for one in times["log step"]))
    return {name: Seconds(found[name].wall / found["step"].wall, found[name].cpu / found["step"].cpu) for name in PIECES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["768,6144,50,4096,131072"], help="D,F,k,N,buffer")
    parser.add_argument("--act-fn", nargs="+", default=["topk", "batchtopk"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{ops.explain()}; {arguments.threads} threads\n\n| act_fn | D, F, k, N, buffer | "
        + " | ".join(f"{name}, CPU | wall" for name in PIECES.values())
    )
    print("|---" * (2 + 2 * len(PIECES)) + "|")
    for text in arguments.shape:
        shape = Shape(*(int(number) for number in text.split(",")))
        for act_fn in arguments.act_fn:
            found = shares(measure(shape, act_fn, arguments.rounds))
            cells = " | ".join(f"{found[name].cpu:.1%} | {found[name].wall:.1%}" for name in PIECES)
            print(f"| {act_fn} | {text.replace(',', ', ')} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
