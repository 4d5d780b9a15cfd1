"""Batches for a library's own training loop, on command, and the time between them.

A worker process hands a `Feed` to the training loop of one library. The loop asks for a batch, trains on it and asks for the next
one: the time from handing a batch over to being asked again is the time of a training step, all that the library does in it included.
Between two steps the feed reads commands from the parent process, one JSON object a line, and answers each with one:

    {"do": "steps", "n": 3}   ->  {"wall": [s, s, s], "cpu": [s, s, s]}            seconds of this process, all its threads
    {"do": "check"}           ->  {"fvu": .., "l0": .., "moved": .., "peak_mib": .., "before_mib": .., "version": ".."}
    {"do": "stop"}            ->  {}, and the process ends

Imports nothing but the standard library, NumPy and torch: it runs in every library's own environment.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy
import torch
from torch import Tensor

Probe = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a batch [N, D] to (non-zero codes of each token [N], reconstruction [N, D]), as the library computes them in training."""


@dataclass(frozen=True)
class Task:
    """What one worker trains."""

    kind: str  # topk, batchtopk, relu, jumprelu
    d_model: int
    d_sae: int
    k: int
    tokens: int
    lr: float
    density: float  # share of latents that fire on a token, set before training; for relu and jumprelu
    options: dict[str, Any] = field(default_factory=dict)


def make_batches(n: int, tokens: int, d_model: int, seed: int = 0) -> numpy.ndarray:
    """Activations as language models have them, [n, tokens, d_model] float32 of variance 1: a mean, directions of falling variance that
    follow heavy-tailed coefficients, and noise."""
    generator = numpy.random.default_rng(seed)
    rank = max(1, d_model // 4)
    directions = generator.standard_normal((rank, d_model), dtype=numpy.float32) / d_model**0.5
    directions *= (1 + numpy.arange(rank, dtype=numpy.float32))[:, None] ** -0.5
    mean = generator.standard_normal(d_model, dtype=numpy.float32)
    coefficients = generator.laplace(size=(n * tokens, rank)).astype(numpy.float32)
    signal = coefficients @ directions
    signal /= signal.std()
    x = 0.5 * mean + 0.8 * signal + 0.3 * generator.standard_normal((n * tokens, d_model), dtype=numpy.float32)
    return (x / x.std()).reshape(n, tokens, d_model)


class Stop(BaseException):
    """The only end that the libraries' loops have. No `Exception`, so that none of them takes it for a failure of its own."""


class Feed:
    """The iterator that a training loop reads. `probe`, `parameters` and `version` are set by the library's adapter before its loop starts."""

    def __init__(self, batches: list[Tensor], commands: Iterable[str], answers: TextIO) -> None:
        self.batches, self.answers = batches, answers
        self.commands = iter(commands)
        self.probe: Probe | None = None
        self.version = "?"
        self.extra: dict[str, Any] = {}  # more to answer to "check"
        self._start: list[Tensor] = []
        self._parameters: list[Tensor] = []
        self._given = self._left = 0
        self._wall: list[float] = []
        self._cpu: list[float] = []
        self._clock: tuple[float, float] | None = None
        self._before = resident_mib()

    def ready(self, parameters: Iterable[Tensor], probe: Probe, version: str) -> None:
        """The dictionary is built: remember how it starts, to see later that it learned."""
        self._parameters = list(parameters)
        self._start = [parameter.detach()[:16].clone() for parameter in self._parameters]
        self.probe, self.version = probe, version

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Tensor:
        if self._clock is not None:
            now = time.perf_counter(), time.process_time()
            self._wall.append(now[0] - self._clock[0])
            self._cpu.append(now[1] - self._clock[1])
        while self._left == 0:
            if self._clock is not None:
                self._clock = None
                self._answer({"wall": self._wall, "cpu": self._cpu})
            self._obey(json.loads(next(self.commands, '{"do": "stop"}')))
        self._left -= 1
        batch = self.batches[self._given % len(self.batches)]
        self._given += 1
        self._clock = time.perf_counter(), time.process_time()
        return batch

    def _obey(self, command: dict[str, Any]) -> None:
        if command["do"] == "steps":
            self._left, self._wall, self._cpu = command["n"], [], []
        elif command["do"] == "check":
            peak = peak_resident_mib()
            self._answer({**self._check(), "peak_mib": peak, "before_mib": self._before, "version": self.version, **self.extra})
            reset_peak()
        else:
            self._answer({})
            raise Stop

    @torch.no_grad()
    def _check(self) -> dict[str, float]:
        """Unexplained variance and L0 on the first batch; the largest change of a weight since the start."""
        if self.probe is None:
            return {}
        x = self.batches[0]
        l0, reconstruction = self.probe(x)
        moved = max((float((now.detach()[:16] - start).abs().max()) for now, start in zip(self._parameters, self._start, strict=True)), default=0.0)
        fvu = float((x - reconstruction).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
        return {"fvu": fvu, "l0": float(l0.float().mean()), "moved": moved}

    def _answer(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self.answers, flush=True)


@torch.no_grad()
def set_density(bias: Tensor, gate: Callable[[Tensor], Tensor], batches: list[Tensor], density: float, scale: Tensor | float = 1.0) -> None:
    """Shift the encoder's bias in place until each latent fires on the share `density` of the tokens.

    Args:
        gate: from a batch to the gate values minus their thresholds, [N, F]; a latent fires where this is positive.
        scale: by how much a gate value grows with its bias.
    """
    x = torch.cat(batches)[:: max(1, len(batches))]
    over, rank = gate(x), max(1, round((1 - density) * len(x)))
    bias -= torch.cat([part.kthvalue(rank, dim=0).values for part in over.split(1024, dim=1)]) / scale


def resident_mib() -> float:
    """Resident memory of this process now, where /proc tells; else its peak."""
    return _status("VmRSS")


def peak_resident_mib() -> float:
    """The largest resident memory since `reset_peak`, where /proc tells; else since the process began."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Begin a new peak (Linux)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _status(name: str) -> float:
    status = Path("/proc/self/status")
    if status.exists():
        return next(float(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(name))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
