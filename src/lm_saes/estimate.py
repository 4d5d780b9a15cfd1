"""What a run would need and take, before it starts (`lm-saes train CONFIG --dry-run`).

Sizes are counted; time is measured: after the sizes have been found to fit, the run is started for twenty seconds in a temporary folder,
language model, initialisation, buffer and all, and its rate is what the estimate is made of.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lm_saes import memory
from lm_saes.assembly import check_joints, dictionary_config, first_batches, open_model, open_stream, start_dictionary, with_device
from lm_saes.config import TrainerConfig, TrainSAESettings
from lm_saes.errors import ConfigError
from lm_saes.files import existing_part
from lm_saes.fitting import available_memory, cut_to_fit, remedy
from lm_saes.training.loop import train
from lm_saes.training.run import Run

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel

CALIBRATION_SECONDS = 20.0
KNOBS = {
    memory.DICTIONARY: "lower sae.expansion_factor",
    memory.BUFFER: "lower activation_factory.buffer_size",
    memory.STEP: "lower activation_factory.batch_size, or raise trainer.gradient_accumulation_steps",
    memory.INITIALISATION: "lower initializer.n_batches",
    memory.CHECKPOINT: "lower sae.expansion_factor, or set trainer.n_checkpoints = 0",
    memory.SNAPSHOT: "lower activation_factory.buffer_size or activation_factory.prefetch, or set trainer.n_checkpoints = 0",
    memory.LIBRARIES: "there is no room for more than Python and its libraries; close other programs",
    memory.LANGUAGE_MODEL: 'use a smaller model, or set model.dtype = "bfloat16"',
    memory.FORWARD: "lower activation_factory.model_batch_size or activation_factory.context_size",
}


@dataclass
class Estimate:
    """Sizes in bytes, times in seconds."""

    parameters: int
    memory: dict[str, int]
    """What is in memory in the phase in which most is, by what it is for."""
    available: int
    device: str
    tokens: int
    steps: int
    disk: int
    disk_free: int
    tokens_per_second: float | None = None
    startup_seconds: float | None = None
    notes: list[str] = field(default_factory=list)
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    """What is in memory in each phase, see `lm_saes.memory`."""
    remedy: str | None = None
    """One change of the settings with which it would fit in memory, if it does not and there is one."""

    @property
    def peak(self) -> int:
        """Everything that is in memory at once."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return self.peak <= self.available and self.disk <= self.disk_free

    @property
    def seconds(self) -> float | None:
        """Duration of the run, from the calibration."""
        return None if self.tokens_per_second is None else self.tokens / self.tokens_per_second + (self.startup_seconds or 0.0)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, for printing."""
        rows = [
            ("parameters of the dictionary", f"{self.parameters:,}"),
            ("steps", f"{self.steps:,}"),
            ("tokens", f"{self.tokens:,}"),
        ]
        rows += [(f"memory: {name}", size(value)) for name, value in self.memory.items()]
        rows += [
            (f"memory on {self.device}", f"{size(self.peak)} of {size(self.available)} available"),
            ("disk", f"{size(self.disk)} of {size(self.disk_free)} free"),
        ]
        if self.seconds is not None:
            rows.append(("time", f"{duration(self.seconds)} ({self.tokens_per_second:,.0f} tokens/s, measured over {CALIBRATION_SECONDS:.0f} s)"))
        return rows + [("note", note) for note in self.notes]

    def verdict(self) -> str:
        """Whether it fits and, if not, which knob to turn."""
        if self.fits:
            return "it fits"
        if self.peak <= self.available:
            return (
                "it does not fit on the disk: lower trainer.keep_checkpoints or trainer.n_checkpoints, or set trainer.exp_result_path to another disk"
            )
        largest = max(self.memory, key=lambda name: self.memory[name])
        return f"it does not fit in memory: the largest part is the {largest} ({size(self.memory[largest])}); {self.remedy or KNOBS[largest]}"


def estimate(settings: TrainSAESettings, calibrate: bool = True) -> Estimate:
    """Count the sizes of a run and, where it fits, measure its rate.

    Raises:
        LmSaesError: whatever would stop the run itself (unknown hook point, wrong width, missing dataset ...).
    """
    settings = with_device(settings)
    model = open_model(settings)
    check_joints(settings, model)
    (settings,), note = cut_to_fit([settings], model, available_memory(memory.device_of(settings, model)))
    result = count_sizes(settings, model)
    result.notes += [note] if note else []
    return calibrated(result, [settings], model) if calibrate and result.fits else result


def count_sizes(settings: TrainSAESettings, model: LanguageModel | None) -> Estimate:
    """The sizes of a run, counted; its time is not measured."""
    trainer = settings.trainer
    parameters = memory.n_parameters(dictionary_config(settings))
    device = memory.device_of(settings, model)
    phases, available = memory.phases(settings, model), available_memory(device)
    fits = sum(memory.largest(phases).values()) <= available
    return Estimate(
        parameters=parameters, memory=memory.largest(phases), available=available,
        device=str(device), tokens=trainer.total_training_tokens,
        steps=max(1, trainer.total_training_tokens // memory.batch_of(settings, model).tokens),
        disk=_disk_bytes(settings, model),
        disk_free=shutil.disk_usage(existing_part(Path(trainer.exp_result_path))).free,
        phases=phases, remedy=None if fits else remedy(settings, model, available),
    )  # fmt: skip


def refuse_what_cannot_fit(result: Estimate) -> None:
    """Refuse what cannot fit, before work starts. An estimate that is too large by no more than its error is given the benefit of the doubt.

    Raises:
        ConfigError: saying what is needed, what there is, and what to change.
    """
    if result.peak > (1 + memory.ERROR) * result.available:
        raise ConfigError(
            f"a run needs about {size(result.peak)} of memory, {result.device} has {size(result.available)} available; {result.verdict()}"
        )


Counted = TypeVar("Counted", bound=Estimate)


def calibrated(result: Counted, members: Sequence[TrainSAESettings], model: LanguageModel | None) -> Counted:
    """The estimate of a run, or of several that are trained together, with its rate: the job itself, run for a while in a folder that is removed.

    Raises:
        LmSaesError: whatever would stop the job.
        KeyboardInterrupt: Ctrl-C or SIGTERM; nothing is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="lm-saes-dry-run-") as name:
        start = time.monotonic()
        stream = TimedStream(open_stream(members[0], model, members[0].data_seed))
        batches = stream if len(members) == 1 else first_batches(members[0], stream)
        runs = []
        for index, member in enumerate(members):
            cfg = member.trainer.replace(exp_result_path=str(Path(name) / str(index)), n_checkpoints=0)
            runs.append(Run(start_dictionary(member, batches, model), cfg))
        del batches
        startup = time.monotonic() - start
        stream.begin(CALIBRATION_SECONDS)
        train(runs, stream, save_when_interrupted=False)
    errors = [run.error for run in runs if run.error is not None]
    if len(errors) == len(runs):
        raise errors[0]
    if not stream.tokens:
        return replace(result, notes=[*result.notes, "the stream gave no batch, so the time could not be measured"])
    return replace(result, tokens_per_second=stream.tokens / stream.elapsed, startup_seconds=startup)


class TimedStream:
    """A stream that ends when its time is up, and counts what it gave. The first step (allocations, caches) is not counted."""

    def __init__(self, stream: Any):
        self._stream = iter(stream)
        self._deadline = float("inf")
        self._start: float | None = None
        self.tokens = 0
        self.elapsed = 0.0
        self._given = 0

    def begin(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        now = time.monotonic()
        if self._start is not None:
            self.tokens, self.elapsed = self._given, now - self._start
        if now > self._deadline:
            raise StopIteration
        batch = next(self._stream)
        if self._deadline < float("inf"):
            if self._start is None:
                self._start = now
            self._given += int(batch["mask"].sum())
        return batch


def whole_checkpoints(trainer: TrainerConfig) -> int:
    """Checkpoints with optimizer and stream that are on the disk at once: those that stay, and the one that is written before the oldest goes."""
    by_the_clock = trainer.checkpoint_minutes is not None and trainer.n_checkpoints > 0  # as many as the run is long
    return trainer.keep_checkpoints + 1 if by_the_clock else min(trainer.keep_checkpoints + 1, max(1, trainer.n_checkpoints))


def _disk_bytes(settings: TrainSAESettings, model: LanguageModel | None) -> int:
    """The most that a run has on the disk: whole checkpoints, the dictionaries of older ones of the plan, and the finished dictionary."""
    trainer, whole = settings.trainer, whole_checkpoints(settings.trainer)
    dictionary = memory.weights_bytes(dictionary_config(settings))
    dictionaries = 1 + max(0, trainer.n_checkpoints - trainer.keep_checkpoints)
    return whole * (3 * dictionary + memory.stream_state_bytes(settings, model)) + dictionaries * dictionary


def size(n_bytes: float) -> str:
    """A number of bytes for reading."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """A duration for reading."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
