"""What a run would need and take, before it starts (`lm-saes train CONFIG --dry-run`).

Sizes are counted; time is measured: after the sizes have been found to fit, the run is started for twenty seconds in a temporary folder,
language model, initialisation, buffer and all, and its rate is what the estimate is made of.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_saes.assembly import check_joints, dictionary_config, open_model, open_stream, start_dictionary, with_device
from lm_saes.config import ActivationFactoryTarget, InitializerConfig, SAEConfig, TrainSAESettings
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training.trainer import Trainer

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel

CALIBRATION_SECONDS = 20.0
KNOBS = {
    "dictionary and its optimizer": "lower sae.expansion_factor",
    "shuffle buffer": "lower activation_factory.buffer_size",
    "one training step": "lower activation_factory.batch_size, or raise trainer.gradient_accumulation_steps",
    "initialisation": "lower initializer.n_batches",
    "python and libraries": "there is no room for more than Python and its libraries; close other programs",
    "language model": 'use a smaller model, or set model.dtype = "bfloat16"',
    "one forward of the language model": "lower activation_factory.model_batch_size or activation_factory.context_size",
}


@dataclass
class Estimate:
    """Sizes in bytes, times in seconds."""

    parameters: int
    memory: dict[str, int]
    available: int
    device: str
    tokens: int
    steps: int
    disk: int
    disk_free: int
    tokens_per_second: float | None = None
    startup_seconds: float | None = None
    notes: list[str] = field(default_factory=list)

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
            return "it does not fit on the disk: lower trainer.n_checkpoints, or set trainer.exp_result_path to another disk"
        largest = max(self.memory, key=lambda name: self.memory[name])
        return f"it does not fit in memory: the largest part is the {largest} ({size(self.memory[largest])}); {KNOBS[largest]}"


def estimate(settings: TrainSAESettings, calibrate: bool = True) -> Estimate:
    """Count the sizes of a run and, where it fits, measure its rate.

    Raises:
        LmSaesError: whatever would stop the run itself (unknown hook point, wrong width, missing dataset ...).
    """
    settings = with_device(settings)
    model = open_model(settings)
    check_joints(settings, model)
    result = count_sizes(settings, model)
    if calibrate and result.fits:
        _calibrate(settings, model, result)
    return result


def count_sizes(settings: TrainSAESettings, model: LanguageModel | None) -> Estimate:
    """The sizes of a run, counted; its time is not measured."""
    factory, trainer = settings.activation_factory, settings.trainer
    cfg = dictionary_config(settings)
    d, f = cfg.d_model, cfg.d_sae
    parameters = (
        d * f * (3 if cfg.use_glu_encoder else 2)
        + f * (2 if cfg.use_glu_encoder else 1)
        + (d if cfg.use_decoder_bias else 0)
        + (f if cfg.act_fn == "jumprelu" else 0)
    )
    rows = factory.target is ActivationFactoryTarget.ACTIVATIONS_2D
    context = factory.context_size or (min(model.max_context, 1024) if model else 1024)
    batch_tokens = factory.batch_size * (context if rows else 1)
    micro = -(-batch_tokens // trainer.gradient_accumulation_steps)
    widths = {hook: (model.hook_width(hook) if model else d) for hook in factory.hook_points}
    activations = factory.override_dtype or (settings.model.dtype if settings.model else torch.float32)
    assert isinstance(activations, torch.dtype)
    activation_bytes = activations.itemsize
    buffer = (factory.buffer_size or factory.batch_size) * (sum(widths.values()) * activation_bytes + 9)
    if factory.max_buffer_bytes is not None:
        buffer = min(buffer, factory.max_buffer_bytes)
    # At once in a step: pre-activations, gate values, codes and the gradients of two of them (of the TopK family, the codes are sparse); inputs,
    # labels, reconstruction, errors. In the initialisation: one batch of codes at a time, and all its activations, raw and scaled.
    step = 4 * micro * ((3 if cfg.act_fn in {"topk", "batchtopk"} else 5) * f * (2 if cfg.use_glu_encoder else 1) + 6 * d)
    n_batches = (settings.initializer or InitializerConfig()).n_batches if isinstance(settings.sae, SAEConfig) else 0
    initialisation = 4 * batch_tokens * n_batches * (f + 4 * sum(widths.values()))
    memory = {"dictionary and its optimizer": 4 * 4 * parameters, "shuffle buffer": buffer}
    memory |= {"one training step": step} if step >= initialisation else {"initialisation": initialisation}
    if model is not None:
        memory["language model"] = _language_model_bytes(model)
        memory["one forward of the language model"] = 4 * factory.model_batch_size * context * (sum(widths.values()) + 16 * model.d_model)
    if not _device_of(settings, model).startswith("cuda"):
        memory["python and libraries"] = max(0, resident_memory() - memory.get("language model", 0))
    folder = Path(trainer.exp_result_path)
    checkpoint = 3 * 4 * parameters + buffer
    return Estimate(
        parameters=parameters, memory=memory, available=available_memory(settings.device_type, model), device=_device_of(settings, model),
        tokens=trainer.total_training_tokens, steps=max(1, trainer.total_training_tokens // batch_tokens),
        disk=4 * parameters + checkpoint * max(1, trainer.n_checkpoints), disk_free=shutil.disk_usage(_existing_parent(folder)).free,
    )  # fmt: skip


def _calibrate(settings: TrainSAESettings, model: LanguageModel | None, result: Estimate) -> None:
    """Run the job itself for a while, in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="lm-saes-dry-run-") as name:
        start = time.monotonic()
        trainer_cfg = settings.trainer.replace(exp_result_path=str(Path(name) / "run"), n_checkpoints=0)
        settings = settings.replace(trainer=trainer_cfg)
        stream = TimedStream(open_stream(settings, model, trainer_cfg.seed))
        sae: SparseDictionary = start_dictionary(settings, stream, model)
        result.startup_seconds = time.monotonic() - start
        stream.begin(CALIBRATION_SECONDS)
        Trainer(trainer_cfg).fit(sae, stream)
        if stream.tokens:
            result.tokens_per_second = stream.tokens / stream.elapsed
        else:
            result.notes.append("the stream gave no batch, so the time could not be measured")


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


def _language_model_bytes(model: LanguageModel) -> int:
    module = getattr(model, "model", None)
    return sum(p.numel() * p.element_size() for p in module.parameters()) if isinstance(module, torch.nn.Module) else 0


def _device_of(settings: TrainSAESettings, model: LanguageModel | None) -> str:
    return str(model.device) if model is not None else str(settings.sae.device)


def available_memory(device: str, model: LanguageModel | None = None) -> int:
    """Bytes that a run could have on the device: what is free (says the driver on CUDA, the system elsewhere) and what this process has."""
    kind = model.device if model is not None else torch.device("cpu" if device == "auto" else device)
    if kind.type == "cuda":
        return int(torch.cuda.mem_get_info(kind)[0]) + torch.cuda.memory_reserved(kind)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 + resident_memory()
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_memory() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


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
