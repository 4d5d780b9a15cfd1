"""What a sweep would need and take (`lm-saes sweep CONFIG ... --dry-run`): the sizes of its runs put together, and its rate measured.

All dictionaries and their optimizers are in memory at the same time; the language model, the buffer and the work of one step are there once.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_saes.assembly import check_joints, open_model, with_device
from lm_saes.config import SweepSAESettings, TrainSAESettings
from lm_saes.estimate import KNOBS, Estimate, calibrated, count_sizes, refuse_what_cannot_fit, whole_checkpoints
from lm_saes.fitting import available_memory, cut_to_fit
from lm_saes.lm.language_model import LanguageModel
from lm_saes.memory import DICTIONARY, ONE_FOR_EACH, device_of, largest, phases_together, stream_state_bytes

OF_EACH_RUN = DICTIONARY
"""The part of `Estimate.memory` that the table of a sweep's runs shows."""


class SweepEstimate(Estimate):
    """Of a whole sweep; `parameters` are those of all dictionaries, `tokens` and `steps` those of the longest run."""

    def verdict(self) -> str:
        """Whether it fits and, if not, which knob to turn."""
        largest = max(self.memory, key=lambda name: self.memory[name])
        if self.fits or self.peak <= self.available or largest not in ONE_FOR_EACH:
            return super().verdict()
        share = sum(self.memory.get(part, 0) for part in ONE_FOR_EACH) / self.peak
        return (
            f"it does not fit in memory: {share:.0%} of it are the dictionaries and their optimizers, which are there at the same time; "
            f"make two sweeps of the grid, or {KNOBS[DICTIONARY]}"
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
    members, note = cut_to_fit(members, model, available_memory(device_of(members[0], model)))
    each = [count_sizes(member, model) for member in members]
    result = together(members, each, model)
    result.notes += [note] if note else []
    return (calibrated(result, members, model) if calibrate and result.fits else result), each


def fitted(members: Sequence[TrainSAESettings], model: LanguageModel | None) -> tuple[list[TrainSAESettings], str | None]:
    """The runs (trained together, if they are several) as they fit into memory, and a line if their batches had to be cut for it.

    Raises:
        ConfigError: they cannot fit; saying what is needed, what there is, and what to change.
    """
    if not members:
        return [], None
    placed = [with_device(member) for member in members]
    placed, note = cut_to_fit(placed, model, available_memory(device_of(placed[0], model)))
    each = [count_sizes(member, model) for member in placed]
    refuse_what_cannot_fit(each[0] if len(each) == 1 else together(placed, each, model))
    return placed, note


def together(members: Sequence[TrainSAESettings], each: Sequence[Estimate], model: LanguageModel | None) -> SweepEstimate:
    """The sizes of runs that are trained together. The stream's state is on the disk once for each checkpoint."""
    phases = phases_together(members, model)
    shared = sum(whole_checkpoints(member.trainer) * stream_state_bytes(member, model) for member in members[1:])
    return SweepEstimate(
        parameters=sum(one.parameters for one in each),
        memory=largest(phases),
        available=each[0].available,
        device=each[0].device,
        tokens=max(one.tokens for one in each),
        steps=max(one.steps for one in each),
        disk=max(each[0].disk, sum(one.disk for one in each) - shared),
        disk_free=each[0].disk_free,
        notes=list(dict.fromkeys(note for one in each for note in one.notes)),
        phases=phases,
    )
