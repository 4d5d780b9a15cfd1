"""What to do about a run that does not fit into memory: cut its batches where that changes nothing, else say which one change would help.

Cutting a batch into micro-batches (`trainer.gradient_accumulation_steps`) leaves the gradient what it is, up to the order of its sums,
unless an option looks at the whole batch at once (BatchTopK, tanh-quad, AuxK).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lm_saes.assembly import dictionary_config
from lm_saes.config import InitializerConfig, TrainSAESettings
from lm_saes.memory import peak, resident_memory
from lm_saes.training.schedules import accumulation_clash

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel

MOST_MICRO_BATCHES = 64
UNKNOWN = 2**62
"""Bytes that a system has which nobody asked (Windows): there nothing is refused."""
_FIELD = "gradient_accumulation_steps"


def cut_to_fit(members: Sequence[TrainSAESettings], model: LanguageModel | None, available: int) -> tuple[list[TrainSAESettings], str | None]:
    """The settings of one run, or of several that are trained together, with batches cut into as few micro-batches as it takes to fit into
    `available` bytes; and a line that says so. As they were, and no line, where they fit, or where cutting does not help or is not allowed:
    a number of micro-batches that was set is obeyed.
    """
    members = list(members)
    if peak(members, model) <= available:
        return members, None
    free = [_FIELD not in settings.trainer.model_fields_set and _may_be_cut(settings) for settings in members]
    n = 2
    while any(free) and n <= min(MOST_MICRO_BATCHES, members[0].activation_factory.batch_size):
        cut = [_with(settings, "trainer", _FIELD, n) if may else settings for settings, may in zip(members, free, strict=True)]
        if peak(cut, model) <= available:
            return cut, f"batches are cut into {n} micro-batches, which fit into memory; the gradient is that of the whole batch"
        n *= 2
    return members, None


def remedy(settings: TrainSAESettings, model: LanguageModel | None, available: int) -> str | None:
    """The first single change of the settings, of a few that give up little, with which a run fits into `available` bytes."""
    trainer, factory = settings.trainer, settings.activation_factory
    micro_batches = [2**i for i in range(1, 7) if _may_be_cut(settings) and trainer.gradient_accumulation_steps < 2**i <= factory.batch_size]
    changes: list[tuple[str, str, list[int]]] = [
        ("trainer", _FIELD, micro_batches),
        ("activation_factory", "buffer_size", [n for n in _halves(factory.buffer_size) if n >= factory.batch_size]),
        ("initializer", "n_batches", _halves((settings.initializer or InitializerConfig()).n_batches)),
        ("activation_factory", "model_batch_size", _halves(factory.model_batch_size)),
        ("activation_factory", "batch_size", _halves(factory.batch_size)),
    ]
    for room, field, values in changes:
        for value in values:
            if peak([_with(settings, room, field, value)], model) <= available:
                return f"set {room}.{field} = {value}"
    return None


def available_memory(device: torch.device) -> int:
    """Bytes that a run could have on the device: what is free (says the driver on CUDA, the system elsewhere) and what this process has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    with suppress(OSError):  # only Linux says what is free
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min([int(line.split()[1]) * 1024, *_left_to_groups()]) + resident_memory()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else UNKNOWN  # all there is, then


def _left_to_groups(system: Path = Path("/")) -> Iterator[int]:
    """Bytes that each control group with a limit which this process is in (a container, a job of a cluster) may still take. A group is in its parents,
    too; cached files are not counted as taken. https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/memory.html for the older kind."""
    with suppress(OSError):  # a system without control groups
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            if not controllers:
                tree, names = system / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                tree, names = system / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            group = tree / own.strip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(tree):  # a container may see its own group as the tree, and a path of the host that is not there
                    with suppress(OSError, StopIteration, ValueError):  # the root has no limit, and one without a limit says "max"
                        limit, used = (int((folder / name).read_text()) for name in names[:2])
                        fields = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                        yield max(0, limit - used + next(int(number) for name, number in fields if name == names[2]))


def _may_be_cut(settings: TrainSAESettings) -> bool:
    return accumulation_clash(settings.trainer, dictionary_config(settings)) is None


def _with(settings: TrainSAESettings, room: str, field: str, value: int) -> TrainSAESettings:
    return settings.replace(**{room: (getattr(settings, room) or InitializerConfig()).replace(**{field: value})})


def _halves(number: int | None) -> list[int]:
    """number / 2, / 4, ... down to 1."""
    return [] if number is None else [number >> i for i in range(1, number.bit_length())]
