"""What both arms of `end_to_end.py` share: the settings, the clock, and how well the trained dictionary reconstructs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from feed import peak_resident_mib
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """One training from text to a saved dictionary."""

    model: str  # folder of the language model and its tokenizer
    text: str  # a .jsonl file with a column "text"
    held_out: str  # a NumPy file of token ids [rows, context]
    output: str  # where the dictionary goes
    layer: int
    d_model: int
    d_sae: int
    k: int
    tokens: int
    batch: int
    context: int
    rows: int  # contexts in one forward of the language model
    buffer: int  # activations in the shuffle buffer
    lr: float
    threads: int
    variant: str = ""


def start() -> tuple[Run, Callable[..., None]]:
    """The run that the command line asks for, and how to answer; what a library prints does not get in between."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = Run(**json.loads(sys.argv[1]))
    torch.set_num_threads(run.threads)
    torch.manual_seed(0)

    def answer(**numbers: Any) -> None:
        print(json.dumps(numbers), file=answers, flush=True)

    return run, answer


class Clock:
    """Wall and processor seconds since it was made, and when each training step began."""

    def __init__(self) -> None:
        self._began = self._now()
        self._steps: list[tuple[float, float]] = []

    def count_calls(self, of: type, method: str) -> None:
        """Each call of the class's method is the beginning of a training step."""
        original = getattr(of, method)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self._steps.append(self._now())
            return original(*arguments, **keywords)

        setattr(of, method, counted)

    def read(self) -> dict[str, float]:
        """Seconds in all (`wall`, `cpu`), before the first step (`setup`), and of a step on average (`step`), over the later three quarters."""
        now, steps = self._now(), self._steps
        later = steps[len(steps) // 4 :]
        return {
            "wall": now[0] - self._began[0], "cpu": now[1] - self._began[1], "setup": steps[0][0] - self._began[0],
            "step": (now[0] - later[0][0]) / len(later), "step_cpu": (now[1] - later[0][1]) / len(later), "peak_mib": peak_resident_mib(),
        }  # fmt: skip

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


@torch.no_grad()
def quality(run: Run, activations: Callable[[Tensor], Tensor], reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Unexplained variance and L0 on held-out text, without the first position of each row.

    Args:
        activations: from ids [B, S] to the hook point's [B, S, D].
        reconstruct: from x [N, D] to (codes [N, F], reconstruction [N, D]).
    """
    x = activations(torch.from_numpy(numpy.load(run.held_out)))[:, 1:].flatten(0, 1)
    codes, reconstruction = reconstruct(x)
    fvu = float((x - reconstruction).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    return {"fvu": fvu, "l0": float((codes != 0).sum(-1).float().mean()), "mean_square": float(x.pow(2).mean())}
