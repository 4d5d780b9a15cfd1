"""What a sweep would need and take (`lm-saes sweep CONFIG ... --dry-run`): the sizes of its runs put together, and its rate measured.

All dictionaries and their optimizers are in memory at the same time; the language model, the buffer and the work of one step are there once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lm_saes.assembly import check_joints, first_batches, open_model, open_stream, start_dictionary, with_device
from lm_saes.config import SweepSAESettings, TrainSAESettings
from lm_saes.estimate import CALIBRATION_SECONDS, KNOBS, Estimate, TimedStream, count_sizes
from lm_saes.lm.language_model import LanguageModel
from lm_saes.training.loop import train
from lm_saes.training.run import Run

OF_EACH_RUN = "dictionary and its optimizer"
"""The part of `Estimate.memory` that each run has for itself."""


class SweepEstimate(Estimate):
    """Of a whole sweep; `parameters` are those of all dictionaries, `tokens` and `steps` those of the longest run."""

    def verdict(self) -> str:
        """Whether it fits and, if not, which knob to turn."""
        largest = max(self.memory, key=lambda name: self.memory[name])
        if self.fits or self.peak <= self.available or largest != OF_EACH_RUN:
            return super().verdict()
        share = self.memory[OF_EACH_RUN] / self.peak
        return (
            f"it does not fit in memory: {share:.0%} of it are the dictionaries and their optimizers, which are there at the same time; "
            f"make two sweeps of the grid, or {KNOBS[OF_EACH_RUN]}"
        )


def estimate_sweep(settings: SweepSAESettings, calibrate: bool = True) -> tuple[SweepEstimate, list[Estimate]]:
    """Count the sizes of a sweep and, where it fits, measure its rate; and the sizes of each run alone.

    Raises:
        LmSaesError: whatever would stop the sweep itself.
    """
    members = [with_device(member) for member in settings.members()]
    model = open_model(members[0])
    for member in members:
        check_joints(member, model)
    each = [count_sizes(member, model) for member in members]
    result = together(members, each)
    if calibrate and result.fits:
        result = _calibrated(result, members, model)
    return result, each


def together(members: Sequence[TrainSAESettings], each: Sequence[Estimate]) -> SweepEstimate:
    """The sizes of runs that are trained together. The stream's state is on the disk once for each checkpoint."""
    parts = list(dict.fromkeys(name for one in each for name in one.memory))
    memory = {name: (sum if name == OF_EACH_RUN else max)(one.memory.get(name, 0) for one in each) for name in parts}
    shared = sum(member.trainer.n_checkpoints * one.memory.get("shuffle buffer", 0) for member, one in list(zip(members, each, strict=True))[1:])
    return SweepEstimate(
        parameters=sum(one.parameters for one in each),
        memory=memory,
        available=each[0].available,
        device=each[0].device,
        tokens=max(one.tokens for one in each),
        steps=max(one.steps for one in each),
        disk=max(each[0].disk, sum(one.disk for one in each) - shared),
        disk_free=each[0].disk_free,
        notes=list(dict.fromkeys(note for one in each for note in one.notes)),
    )


def _calibrated(result: SweepEstimate, members: Sequence[TrainSAESettings], model: LanguageModel | None) -> SweepEstimate:
    """Run the job itself for a while, in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="lm-saes-dry-run-") as name:
        start = time.monotonic()
        stream = TimedStream(open_stream(members[0], model, members[0].data_seed))
        batches = first_batches(members[0], stream)
        runs = []
        for index, member in enumerate(members):
            cfg = member.trainer.replace(exp_result_path=str(Path(name) / str(index)), n_checkpoints=0)
            runs.append(Run(start_dictionary(member, batches, model), cfg))
        del batches
        startup = time.monotonic() - start
        stream.begin(CALIBRATION_SECONDS)
        train(runs, stream)
    if not stream.tokens:
        return replace(result, notes=[*result.notes, "the stream gave no batch, so the time could not be measured"])
    return replace(result, tokens_per_second=stream.tokens / stream.elapsed, startup_seconds=startup)
