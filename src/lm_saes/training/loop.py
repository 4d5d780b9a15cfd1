"""The training loop: one stream, one run or many.

1. The first batch tells how many tokens a step has, hence how many steps each run has.
2. Batch after batch: every run that is not finished takes a step on it. The stream is read once, however many runs there are.
3. Where a checkpoint of one run is due, all that took the step write theirs, so that they can go on together; the stream's state is
   written once.
4. The end of the last plan, the end of the stream, or Ctrl-C. Each leaves checkpoints from which the runs can go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_saes.errors import DataError, RunFolderError
from lm_saes.training.interruption import Interruption
from lm_saes.training.run import Run
from lm_saes.training.step import Batch, flat_batches


def train(runs: Sequence[Run], stream: Any) -> bool:
    """Train all runs on the same batches in the same order, to the end of each.

    A run that meets a number that is not finite stops, with its `error` set; the others go on.

    Args:
        runs: fresh ones, or ones that go on from checkpoints of the same moment (a run that is finished may have an older one).
        stream: batches `{hook: [N, D], "tokens": [N], "mask": [N]}`, or 2D ones, which are flattened by their mask. To be resumed it needs
            `state_dict()` and `load_state_dict(state)`.

    Returns:
        Whether the stream ended before the last run did.

    Raises:
        ConfigError: options that contradict each other or the dictionary.
        RunFolderError: the stream cannot be put where the checkpoints were written, or the disk is full.
        DataError: the stream is empty, or lacks a hook point.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step was finished and checkpoints written.
    """
    try:
        batches = _begin(runs, stream)
        with Interruption() as interruption:
            return _loop(runs, stream, batches, interruption)
    finally:
        for run in runs:
            run.close()


def _begin(runs: Sequence[Run], stream: Any) -> Iterator[Batch]:
    """Batches, from the start of the stream or from where the checkpoints left it; the runs get to know how many tokens a step has."""
    hook_points = list(dict.fromkeys(hook for run in runs for hook in run.hook_points))
    checkpoint = max(runs, key=lambda run: run.cur_step).checkpoint
    batches = flat_batches(stream, hook_points, runs[0].device)
    if checkpoint is not None:
        if checkpoint.stream is None or not hasattr(stream, "load_state_dict"):
            raise RunFolderError(
                f"{checkpoint.folder} cannot be resumed with a stream that does not remember its place; pass one with state_dict() and load_state_dict()"
            )
        stream.load_state_dict(checkpoint.stream)
        tokens_per_batch = checkpoint.state["tokens_per_batch"]
        del checkpoint
    else:
        first = next(batches, None)
        if first is None:
            raise DataError("the activation stream holds no batch; check its datasets, and that it was not used up before")
        tokens_per_batch = max(1, int(first["mask"].sum()))
        batches = _chain(first, batches)
    for run in runs:
        run.begin(tokens_per_batch)
    return batches


def _loop(runs: Sequence[Run], stream: Any, batches: Iterator[Batch], interruption: Interruption) -> bool:
    while active := [run for run in runs if not run.finished]:
        batch = next(batches, None)
        if batch is None:
            _end_early(active, stream)
            return True
        for run in active:
            run.step(batch)
            if run.error is not None and len(runs) > 1:  # else whoever called says it
                run.message(f"stopped: {run.error}")
        if interruption.requested or any(run.error is None and run.checkpoint_is_due for run in active):
            paths = _save(active, stream)
            if interruption.requested:
                for run, path in paths.items():
                    run.message(f"interrupted after step {run.cur_step} of {run.total_steps}; the checkpoint {path} can be resumed")
                raise KeyboardInterrupt
    return False


def _end_early(runs: Sequence[Run], stream: Any) -> None:
    for run in runs:
        run.settle()
        run.ended_early()
    if any(run.cfg.n_checkpoints > 0 for run in runs):
        _save([run for run in runs if run.cur_step > 0], stream)


def _save(runs: Sequence[Run], stream: Any) -> dict[Run, Path]:
    """Checkpoints of all runs that are sound. The first holds the stream's state, the others hold the same files."""
    for run in runs:
        run.settle()
    state: Any = stream.state_dict() if hasattr(stream, "state_dict") else None
    paths: dict[Run, Path] = {}
    for run in runs:
        if run.error is None:
            paths[run] = run.save_checkpoint(run.cfg.exp_result_path, state)
            state = state and paths[run]
    return paths


def _chain(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest
