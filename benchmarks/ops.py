"""How long a whole training step takes with each implementation of `lm_saes.ops`, interleaved on the same batches.

    python benchmarks/ops.py [--shape D,F,k,N ...] [--rounds 7] [--threads 2] [--memory]

A step is forward, reconstruction loss, backward, clipping and fused Adam. On a busy machine trust the ratios, and the CPU time above
the wall time. With `--memory` instead the peak of the resident memory of a few steps, each implementation in a process of its own,
beyond what the process holds before the first one.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from lm_saes import ops
from lm_saes.config import SAEConfig
from lm_saes.losses import LossInputs, LossWeights, total_loss
from lm_saes.models import SparseDictionary

SHAPES = ["768,6144,50,4096", "192,1536,32,2048"]
IMPLEMENTATIONS = ["reference", "auto"]


def make_step(act_fn: str, shape: str) -> Callable[[str], None]:
    """A function that makes one training step with the implementation that it is given the name of."""
    D, F, k, N = (int(number) for number in shape.split(","))
    torch.manual_seed(0)
    cfg = SAEConfig(hook_point_in="h", hook_point_out="h", d_model=D, expansion_factor=F / D, act_fn=act_fn, top_k=k, device="cpu")  # pyright: ignore[reportArgumentType]
    sae = SparseDictionary.from_config(cfg)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    x, mask = torch.randn(N, D), torch.ones(N, dtype=torch.bool)

    def step(implementation: str) -> None:
        os.environ[ops.ENVIRONMENT_VARIABLE] = implementation
        optimizer.zero_grad(set_to_none=True)
        forward = sae.run(x, mask=mask)
        loss, _ = total_loss(sae, LossInputs(x, x, forward, mask), LossWeights())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()

    return step


def time_steps(act_fn: str, shape: str, rounds: int) -> None:
    step = make_step(act_fn, shape)
    wall: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    cpu: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for name in IMPLEMENTATIONS:
        step(name)
    for _ in range(rounds):
        for name in IMPLEMENTATIONS:
            wall_before, cpu_before = time.perf_counter(), time.process_time()
            step(name)
            wall[name].append(time.perf_counter() - wall_before)
            cpu[name].append(time.process_time() - cpu_before)
    (w_reference, w_auto), (c_reference, c_auto) = ([statistics.median(times[name]) for name in IMPLEMENTATIONS] for times in (wall, cpu))
    print(f"{act_fn} {shape}: reference / auto  wall {w_reference / w_auto:.2f}  CPU {c_reference / c_auto:.2f}  ({rounds} rounds)", flush=True)


def peak_memory(act_fn: str, shape: str, implementation: str) -> int:
    """KB that three steps need beyond the process with its weights and batch."""
    step = make_step(act_fn, shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step(implementation)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def compare_memory(act_fn: str, shape: str, threads: int) -> None:
    command = [sys.executable, __file__, "--threads", str(threads), "--shape", shape, "--act-fn", act_fn, "--one"]
    peaks = [int(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout) for name in IMPLEMENTATIONS]
    print(f"{act_fn} {shape}: peak memory of a step, auto / reference  {peaks[1] / peaks[0]:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="D,F,k,N")
    parser.add_argument("--act-fn", nargs="+", default=["topk", "batchtopk"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for shape in arguments.shape:
        for act_fn in arguments.act_fn:
            if arguments.one:
                print(peak_memory(act_fn, shape, arguments.one))
            elif arguments.memory:
                compare_memory(act_fn, shape, arguments.threads)
            else:
                time_steps(act_fn, shape, arguments.rounds)


if __name__ == "__main__":
    main()
