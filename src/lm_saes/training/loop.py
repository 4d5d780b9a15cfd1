"""The training loop: one stream, one run or many.

1. The first batch tells how many tokens a step has, hence how many steps each run has.
2. Batch after batch: every run that is not finished takes a step on it. The stream is read once, however many runs there are.
3. Where a checkpoint of one run is due, all that took the step write theirs, so that they can go on together; the stream's state is
   written once. Training waits until the state is copied; the copy is written behind its back.
4. The end of the last plan, the end of the stream, or Ctrl-C. Each leaves checkpoints from which the runs can go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from lm_saes.activations.stream import snapshot
from lm_saes.errors import DataError, RunFolderError
from lm_saes.tensor_files import tensors_in
from lm_saes.training.background import BackgroundWriter
from lm_saes.training.checkpoint import discard
from lm_saes.training.interruption import Interruption
from lm_saes.training.run import Run
from lm_saes.training.step import Batch, flat_batches


def train(runs: Sequence[Run], stream: Any, *, save_when_interrupted: bool = True) -> bool:
    """Train all runs on the same batches in the same order, to the end of each.

    A run that meets a number that is not finite stops, with its `error` set; the others go on.

    Args:
        runs: fresh ones, or ones that go on from checkpoints of the same moment (a run that is finished may have an older one).
        stream: batches `{hook: [N, D], "tokens": [N], "mask": [N]}`, or 2D ones, which are flattened by their mask. To be resumed it needs
            `state_dict()` and `load_state_dict(state)`.
        save_when_interrupted: not for runs whose folders are thrown away.

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
        with BackgroundWriter() as writer, Interruption() as interruption:
            return _loop(runs, batches, _Saving(runs, stream, writer), interruption, save_when_interrupted)
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


def _loop(runs: Sequence[Run], batches: Iterator[Batch], saving: _Saving, interruption: Interruption, save_when_interrupted: bool) -> bool:
    while active := [run for run in runs if not run.finished]:
        saving.check()
        batch = next(batches, None)
        if batch is None:
            _end_early(active, saving)
            return True
        for run in active:
            run.step(batch)
            if run.error is not None and len(runs) > 1:  # else whoever called says it
                run.message(f"stopped: {run.error}")
        if interruption.requested and not save_when_interrupted:
            raise KeyboardInterrupt
        if interruption.requested or saving.is_due(active):
            saved = saving.save(active)
            if interruption.requested:
                saving.wait()
                for run in saved:
                    path = f"{run.cfg.exp_result_path}/checkpoints/step_{run.cur_step}"
                    run.message(f"interrupted after step {run.cur_step} of {run.total_steps}; the checkpoint {path} can be resumed")
                raise KeyboardInterrupt
    return False


def _end_early(runs: Sequence[Run], saving: _Saving) -> None:
    for run in runs:
        run.settle()
        run.ended_early()
    if any(run.cfg.n_checkpoints > 0 for run in runs):
        saving.save([run for run in runs if run.cur_step > 0])


class _Saving:
    """When checkpoints are written, and of what."""

    def __init__(self, runs: Sequence[Run], stream: Any, writer: BackgroundWriter) -> None:
        self._runs, self._stream, self._writer = runs, stream, writer
        self._last = time.monotonic()
        self.check, self.wait = writer.check, writer.wait

    def is_due(self, active: Sequence[Run]) -> bool:
        """Whether the plan of one of the runs that took the step has a checkpoint now; or one is at its end and others are not, so that they can go
        on together; or it is long since the last one, which waits while that is still being written."""
        sound = [run for run in active if run.error is None]
        if any(run.checkpoint_is_due for run in sound):
            return True
        if any(run.finished for run in sound) and not all(run.finished for run in self._runs):
            return True
        seconds = [60 * run.cfg.checkpoint_minutes for run in sound if run.cfg.checkpoint_minutes is not None and run.cfg.n_checkpoints > 0]
        return bool(seconds) and time.monotonic() - self._last >= min(seconds) and not self._writer.busy

    def save(self, runs: Sequence[Run]) -> list[Run]:
        """Copy the state of all runs that are sound and of the stream, and have the copies written. The first checkpoint holds the stream's state,
        the others the same files. What is old is removed when all are written. Gives the runs that are saved."""
        self._writer.wait()  # before there are two copies
        for run in runs:
            run.settle()
        sound = [run for run in runs if run.error is None]
        state = snapshot(self._stream.state_dict()) if hasattr(self._stream, "state_dict") else None
        versions = [(tensor, tensor._version) for tensor in tensors_in(state) if not tensor.is_inference()]
        writes = [run.copy_state(run.cfg.exp_result_path) for run in sound]

        def write() -> None:
            holder: Any = state
            for write_one in writes:
                path = write_one(holder)
                if holder is state and any(tensor._version != version for tensor, version in versions):
                    discard(path)
                    raise RunFolderError(
                        "the stream's state_dict() gave tensors that changed when it went on, so no checkpoint holds; it must give copies"
                    )
                holder = holder and path
            for run in sound:
                run.remove_old_checkpoints()

        self._writer.write(write)
        self._last = time.monotonic()
        return sound


def _chain(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest
