"""How many bytes a run needs at once, counted before it starts.

A run goes through phases, and the largest is the peak:

    initialisation   weights; the first batches, scaled, and what is measured on them
    reading          weights, gradients, Adam's moments; a forward of the language model (one phase with training where batches are read ahead)
    training         the same; a step, and the copy of the run's state while a thread writes it as a checkpoint

The shuffle buffer, the language model, Python and its libraries are there in all of them. Counted are the tensors that are there at the
worst moment of a phase; `_SPARE` and the factors beside it are what the allocator adds, measured (benchmarks/memory.py).

Letters: N tokens of a micro-batch, D width, F latents, k entries of a token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lm_saes import ops
from lm_saes.activations.prefetch import automatic_depth
from lm_saes.assembly import dictionary_config
from lm_saes.config import ActivationFactoryTarget, InitializerConfig, SAEConfig, TrainerConfig, TrainSAESettings
from lm_saes.models.statistics import MEDIAN_MAX_TOKENS
from lm_saes.ops.native.products import Integers, kept_bytes, rows_in_room
from lm_saes.ops.sparse import ROWS_AT_ONCE

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel

Parts = dict[str, int]
"""Bytes by what they are for."""

DICTIONARY, BUFFER, LIBRARIES = "dictionary and its optimizer", "shuffle buffer", "python and libraries"
LANGUAGE_MODEL, FORWARD = "language model", "one forward of the language model"
STEP, INITIALISATION = "one training step", "initialisation"
CHECKPOINT, SNAPSHOT = "checkpoint being written", "stream's state in that checkpoint"

ONE_FOR_EACH = (DICTIONARY, CHECKPOINT)
"""What each run has for itself where several are trained together; the rest is there once."""

ERROR = 0.15
"""How far a measured peak may be from the estimate, as a share of it."""

_SELECTING = ("topk", "batchtopk")
_ENTRY = 57
"""Bytes for each entry of sparse codes while gradients are made: value 4, latent 8, token 8, place and token among the entries of its latent
16, whether it fires 1, and five numbers of 4: slope, weight, scaled value, gradients to code and to pre-activation."""
_CANDIDATE = 38
"""Bytes more for each entry that BatchTopK needs, while it chooses among a quarter more than it needs."""
_GLU_ENTRY = 24
"""Bytes more for the two factors of a gated entry, their gradients and their own."""
_VECTORS = 5
"""Matrices [N, D] beside the scaled batch: reconstruction, error, deviation from the mean and a square, when metrics are made."""
_SPARE = 1.25
"""Bytes that the allocator takes for each byte of a step that never builds [N, F]."""
_DENSE = {"topk": 4.5, "batchtopk": 9.0, "relu": 9.5, "jumprelu": 11.0}
"""Matrices [N, F] that a step takes where codes are dense. Alive at once are 3.2, 7, 4.7 and 4.9; the rest is what the allocator cannot give
out again: from 6 to 14 have been seen for one and the same ReLU or JumpReLU."""
_DENSE_AT_START = {"topk": 4.0, "batchtopk": 4.0, "relu": 5.7, "jumprelu": 7.2}
"""The same in the initialisation, which maps and unmaps each matrix."""
_AT_WORK = 40 * 2**20
"""What Python and its libraries take beside what they have when the estimate is made: threads, the text's reader, kernels and their buffers."""
_ROWS_OF_SUMS = 4096
"""Tokens at a time that the initialisation runs the dictionary on and sums over in float64."""


@dataclass(frozen=True)
class Batch:
    """A batch of the stream as far as memory goes."""

    tokens: int
    bytes_per_token: int
    """Raw activations at all hook points, token and mask."""

    @property
    def bytes(self) -> int:
        return self.tokens * self.bytes_per_token


def batch_of(settings: TrainSAESettings, model: LanguageModel | None) -> Batch:
    """The batch that the settings' factory makes."""
    factory = settings.activation_factory
    d_model = dictionary_config(settings).d_model
    widths = [model.hook_width(hook) if model else d_model for hook in factory.hook_points]
    dtype = factory.override_dtype or (settings.model.dtype if settings.model else torch.float32)
    assert isinstance(dtype, torch.dtype)
    context = _context(settings, model) if factory.target is ActivationFactoryTarget.ACTIVATIONS_2D else 1
    return Batch(factory.batch_size * context, sum(widths) * dtype.itemsize + 9)


def weights_bytes(cfg: SAEConfig) -> int:
    """Bytes of the weights of a dictionary."""
    return n_parameters(cfg) * _width(cfg)


def n_parameters(cfg: SAEConfig) -> int:
    """Numbers in the weights of a dictionary."""
    d, f, encoders = cfg.d_model, cfg.d_sae, 2 if cfg.use_glu_encoder else 1
    optional = (d if cfg.use_decoder_bias else 0) + (f if cfg.act_fn == "jumprelu" else 0) + (d * d if cfg.use_skip_connection else 0)
    return (d * f + f) * encoders + f * d + optional


def stream_state_bytes(settings: TrainSAESettings, model: LanguageModel | None) -> int:
    """The state of a run's stream: where the entries of the shuffle buffer come from, and the batches that were read ahead."""
    batch = batch_of(settings, model)
    return 8 * _entries(settings, batch) + _ahead(settings, device_of(settings, model)) * batch.bytes


def device_of(settings: TrainSAESettings, model: LanguageModel | None) -> torch.device:
    """Where a run whose device is resolved (`assembly.with_device`) has its language model and its dictionary."""
    return model.device if model is not None else torch.device(settings.sae.device)


def phases(settings: TrainSAESettings, model: LanguageModel | None) -> dict[str, Parts]:
    """What is in memory in each phase of a run, in bytes, on the device of the language model and the dictionary."""
    trainer, cfg, batch = settings.trainer, dictionary_config(settings), batch_of(settings, model)
    device = device_of(settings, model)
    weights = weights_bytes(cfg)
    stays: Parts = {BUFFER: _buffer_bytes(settings, batch)}
    if model is not None:
        stays[LANGUAGE_MODEL] = _weights_of(model)
    if device.type != "cuda":
        stays[LIBRARIES] = max(0, resident_memory() - stays.get(LANGUAGE_MODEL, 0)) + _AT_WORK
    ahead = _ahead(settings, device)
    forward = _forward_bytes(settings, model) if model is not None else batch.bytes
    trained = {**stays, DICTIONARY: 4 * weights}  # weights, gradients, and Adam's two moments
    if trainer.n_checkpoints and device.type != "cuda":  # a thread writes copies of weights and moments; those of CUDA are on the host
        trained |= {CHECKPOINT: 3 * weights, SNAPSHOT: stream_state_bytes(settings, model)}
    training = {**trained, STEP: step_bytes(cfg, trainer, batch, device) + (ahead + 1) * batch.bytes}
    reading = {**trained, FORWARD: forward + batch.bytes}
    at_work = {"training": {**training, FORWARD: forward}} if ahead else {"training": training, "reading": reading}
    return {**at_work, **_initialisation(settings, batch, stays, forward)}


def phases_together(members: Sequence[TrainSAESettings], model: LanguageModel | None) -> dict[str, Parts]:
    """The same for runs that are trained together."""
    each = [phases(settings, model) for settings in members]
    names = {phase: dict.fromkeys(part for one in each for part in one.get(phase, {})) for one in each for phase in one}
    return {
        phase: {part: (sum if part in ONE_FOR_EACH else max)(one.get(phase, {}).get(part, 0) for one in each) for part in parts}
        for phase, parts in names.items()
    }


def largest(phases: Mapping[str, Parts]) -> Parts:
    """What is in memory in the phase in which most is."""
    return max(phases.values(), key=lambda parts: sum(parts.values()))


def peak(members: Sequence[TrainSAESettings], model: LanguageModel | None) -> int:
    """Bytes at the peak of a run, or of several that are trained together."""
    return sum(largest(phases_together(members, model)).values())


# ------------------------------------------------------------------------------------------------------------- pieces


def step_bytes(cfg: SAEConfig, trainer: TrainerConfig, batch: Batch, device: torch.device) -> int:
    """What a training step needs beside weights, gradients, moments and its raw batch."""
    rows = -(-batch.tokens // trainer.gradient_accumulation_steps)
    vector, matrix = batch.tokens * cfg.d_model * _width(cfg), cfg.d_model * cfg.d_sae * _width(cfg)
    scaled, vectors = vector * len(cfg.associated_hook_points), _VECTORS * vector
    how = ops._chosen(device.type)
    if cfg.act_fn in _SELECTING and how != "reference":
        entries = _entry_bytes(cfg) * rows * cfg.top_k
        needed = scaled + entries + max(vectors, _encoding_bytes(cfg, rows, how))  # the encoder's blocks are given back before the errors are made
        needed += 2 * matrix if how == "sparse" else 0  # sums over latents before and after they are transposed
        needed = int(needed * _SPARE)
    else:
        needed = scaled + vectors + int(_DENSE[cfg.act_fn] * rows * cfg.d_sae * _width(cfg) * (2 if cfg.use_glu_encoder else 1))
    if trainer.gradient_accumulation_steps > 1:
        needed += matrix + vector  # a gradient beside the sum that it is added to; reconstructions kept for the metrics
    if trainer.auxk_coefficient:  # as if half of the latents were dead: their entries, their own weights, and the gradient that comes back
        dead = cfg.d_sae // 2
        needed += rows * min(trainer.k_aux, dead) * _ENTRY + 3 * matrix
    return needed


def _encoding_bytes(cfg: SAEConfig, rows: int, how: str) -> int:
    """What the product with the encoder takes: the block of rows that is made, the one before it, for torch's selection its gate values, for
    BatchTopK one more, since it goes through the rows twice. Screened: the weights as integers need them, which is more than bfloat16 takes; of a
    block the bounds in 16 bits, and its rows in integers, twice and the rest."""
    if how == "screened" and not cfg.use_glu_encoder:
        block = min(rows, rows_in_room(Integers.rows_at_once, cfg.d_sae))
        return kept_bytes(Integers, cfg.d_model, cfg.d_sae) + block * (2 * cfg.d_sae + 3 * cfg.d_model)
    block = min(rows, ROWS_AT_ONCE) * cfg.d_sae
    blocks = 2 + (how == "sparse") + (cfg.act_fn == "batchtopk") + (3 if cfg.use_glu_encoder else 0)  # gated: both factors, twice, and their product
    return blocks * block * _width(cfg)


def _initialisation(settings: TrainSAESettings, batch: Batch, stays: Parts, forward: int) -> dict[str, Parts]:
    """The phase of a dictionary that does not start from saved weights: batches scaled, one of them raw, a sample of the tokens, and sums in float64."""
    if not isinstance(settings.sae, SAEConfig):
        return {}
    cfg = settings.sae
    tokens, hooks = batch.tokens * (settings.initializer or InitializerConfig()).n_batches, len(cfg.associated_hook_points)
    vector, some = cfg.d_model * _width(cfg), min(_ROWS_OF_SUMS, tokens)
    how = ops._chosen("cpu") if LIBRARIES in stays else "reference"
    if cfg.act_fn in _SELECTING and how != "reference":
        codes = some * cfg.top_k * _ENTRY + _encoding_bytes(cfg, some, how)
    else:
        codes = int(_DENSE_AT_START[cfg.act_fn] * some * cfg.d_sae * _width(cfg))
    measured = (tokens * hooks + min(tokens, MEDIAN_MAX_TOKENS) * hooks) * vector + batch.bytes + 4 * some * cfg.d_model * 8 + codes
    weights = weights_bytes(cfg)
    return {"initialisation": {**stays, DICTIONARY: weights, INITIALISATION: max(forward, measured)}}


def _buffer_bytes(settings: TrainSAESettings, batch: Batch) -> int:
    bytes_of_all = _entries(settings, batch) * (batch.bytes_per_token + 16)  # 16: the entry's place, and where it comes from
    return int(min(bytes_of_all, settings.activation_factory.max_buffer_bytes or math.inf))


def _ahead(settings: TrainSAESettings, device: torch.device) -> int:
    """Batches that are read ahead."""
    prefetch = settings.activation_factory.prefetch
    return automatic_depth(device) if prefetch is None else prefetch


def _entries(settings: TrainSAESettings, batch: Batch) -> int:
    """Tokens in the shuffle buffer."""
    factory = settings.activation_factory
    return (factory.buffer_size or 0) * (batch.tokens // factory.batch_size)


def _forward_bytes(settings: TrainSAESettings, model: LanguageModel) -> int:
    """What a forward of the language model needs: hidden states of some layers' parts, and what is captured, twice."""
    factory = settings.activation_factory
    positions = factory.model_batch_size * _context(settings, model)
    assert settings.model is not None
    assert isinstance(settings.model.dtype, torch.dtype)
    return positions * (16 * model.d_model + 2 * sum(model.hook_width(hook) for hook in factory.hook_points)) * settings.model.dtype.itemsize


def _context(settings: TrainSAESettings, model: LanguageModel | None) -> int:
    """Tokens in a context."""
    return settings.activation_factory.context_size or (min(model.max_context, 1024) if model else 1024)


def _weights_of(model: LanguageModel) -> int:
    """Bytes of a language model's parameters."""
    module = getattr(model, "model", None)
    return sum(p.numel() * p.element_size() for p in module.parameters()) if isinstance(module, torch.nn.Module) else 0


def resident_memory() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _width(cfg: SAEConfig) -> int:
    assert isinstance(cfg.dtype, torch.dtype)
    return cfg.dtype.itemsize


def _entry_bytes(cfg: SAEConfig) -> int:
    return _ENTRY + (_CANDIDATE if cfg.act_fn == "batchtopk" else 0) + (_GLU_ENTRY if cfg.use_glu_encoder else 0)
