"""Configurations of activation caches: what is written, and the job that writes it."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from lm_saes.config.activations import ActivationFactoryTarget, BufferShuffleConfig, DatasetConfig, LanguageModelConfig
from lm_saes.config.base import BaseConfig, OptionalDType, PathString

STORED_DTYPES = ("float32", "bfloat16", "float16", "int8")
"""The data types that a cache can hold. int8 has a scale per token, and keeps outlier dimensions apart."""


def _stored_dtype(value: str | None) -> str | None:
    if value is not None and str(value).removeprefix("torch.") not in STORED_DTYPES:
        raise ValueError(f"a cache holds {', '.join(STORED_DTYPES)}, got {value}")
    return value


def _activations(value: ActivationFactoryTarget) -> ActivationFactoryTarget:
    if value is ActivationFactoryTarget.TOKENS:
        raise ValueError('target must be "activations-1d" or "activations-2d": a cache holds activations')
    return value


def _no_pickles(value: str) -> str:
    if value != "safetensors":
        raise ValueError(f'format must be "safetensors", got "{value}": pickled files are not written')
    return value


class ActivationWriterConfig(BaseConfig):
    """How a stream of activations becomes a cache."""

    hook_points: list[str] = Field(min_length=1)
    """Hook points that are written, all in one pass."""
    cache_dir: PathString = "activations"
    """The cache's folder."""
    total_generating_tokens: int | None = Field(default=None, ge=1)
    """Kept tokens after which the writing stops; `None` writes the whole stream."""
    n_samples_per_chunk: int | None = Field(default=None, ge=1)
    """Samples in one shard: tokens (activations-1d) or sequences (activations-2d). `None`: as many as fill 256 MiB."""
    format: str = "safetensors"
    """Must be "safetensors"."""
    num_workers: int | None = Field(default=None, ge=0)
    """Without effect: a shard is written in one go. Setting it warns."""
    target: ActivationFactoryTarget = ActivationFactoryTarget.ACTIVATIONS_2D
    """Single kept activations (activations-1d), or whole sequences with their masks (activations-2d)."""
    dtype: OptionalDType = None
    """Data type on disk: float32, bfloat16, float16 or int8; `None` is that of the activations."""
    buffer_size: int | None = Field(default=None, ge=1)
    """Samples that are held in memory and shuffled before they are cut into shards; `None`: those of one shard."""
    seed: int = 0
    """Seed of that shuffling."""
    n_shards: int = Field(default=1, ge=1)
    """Processes that write the cache together."""
    start_shard: int = Field(default=0, ge=0)
    """Which of them this one is, from 0."""

    _check_dtype = field_validator("dtype")(_stored_dtype)
    _check_format = field_validator("format")(_no_pickles)
    _check_target = field_validator("target")(_activations)

    @model_validator(mode="after")
    def _part_exists(self) -> Self:
        if self.start_shard >= self.n_shards:
            raise ValueError(f"start_shard must lie in [0, n_shards) = [0, {self.n_shards}), got {self.start_shard}")
        return self


class GenerateActivationsSettings(BaseConfig):
    """Write a cache of activations: one pass of a language model over text, for any number of hook points."""

    model: LanguageModelConfig
    """The language model."""
    model_name: str | None = None
    """Name under which it is recorded; `None` is the name in `model`."""
    dataset: DatasetConfig | None = None
    """The text; `None` only for `dataset_name = "demo"`."""
    dataset_name: str
    """Name under which it is recorded."""
    hook_points: list[str] = Field(min_length=1)
    """Hook points that are written."""
    output_dir: PathString
    """The cache's folder. A cache that is not finished is gone on with."""
    target: ActivationFactoryTarget = ActivationFactoryTarget.ACTIVATIONS_2D
    """Single kept activations (activations-1d: for training; shuffled best), or whole sequences (activations-2d: evaluation and analysis too)."""
    model_batch_size: int = Field(default=1, ge=1)
    """Sequences in one forward of the language model."""
    batch_size: int | None = Field(default=None, ge=1)
    """Without effect: shards have n_samples_per_chunk samples. Setting it warns."""
    buffer_size: int | None = Field(default=None, ge=1)
    """Samples that are held in memory and shuffled before they are cut into shards; `None`: those of one shard."""
    buffer_shuffle: BufferShuffleConfig | None = None
    """Seed of that shuffling; `None` takes `seed`."""
    total_tokens: int | None = Field(default=None, ge=1)
    """Kept tokens that this process writes; `None` is the whole text."""
    context_size: int = Field(default=128, ge=2)
    """Tokens in a context, the BOS token included."""
    n_samples_per_chunk: int | None = Field(default=None, ge=1)
    """Samples in one shard: tokens or sequences. `None`: as many as fill 256 MiB."""
    num_workers: int | None = Field(default=None, ge=0)
    """Without effect: a shard is written in one go. Setting it warns."""
    format: str = "safetensors"
    """Must be "safetensors"."""
    n_shards: int = Field(default=1, ge=1)
    """Processes that write the cache together; each reads its own share of the documents. They need not know each other."""
    start_shard: int = Field(default=0, ge=0)
    """Which of them this one is, from 0."""
    mongo: None = None
    """Not supported: set `model` and `dataset`."""
    ignore_token_ids: list[int] | None = None
    """Tokens whose activations are dropped. `None`: BOS, padding and the other special tokens; a list: those ids and nothing else."""
    outlier_norm_factor: float = Field(default=10.0, ge=0)
    """Drop activations whose norm exceeds this many times the running median at their hook point; 0 keeps them."""
    packing: bool = True
    """Concatenate documents, so that no context is padded. Off: one context per document, the rest cut."""
    device_type: str = "auto"
    """Device of the language model: auto, cpu, cuda, mps."""
    override_dtype: OptionalDType = None
    """Data type on disk: float32, bfloat16, float16 or int8; `None` is the language model's."""
    seed: int = 0
    """Orders the documents, and shuffles."""

    _check_dtype = field_validator("override_dtype")(_stored_dtype)
    _check_format = field_validator("format")(_no_pickles)
    _check_target = field_validator("target")(_activations)

    @model_validator(mode="after")
    def _joints(self) -> Self:
        if self.dataset is None and self.dataset_name != "demo":
            raise ValueError(f"dataset is missing: say where the text of '{self.dataset_name}' is (only \"demo\" needs no entry)")
        self.writer()
        return self

    def writer(self) -> ActivationWriterConfig:
        """What of these settings concerns the writing."""
        return ActivationWriterConfig(
            hook_points=self.hook_points,
            cache_dir=self.output_dir,
            total_generating_tokens=self.total_tokens,
            n_samples_per_chunk=self.n_samples_per_chunk,
            target=self.target,
            dtype=self.override_dtype,
            buffer_size=self.buffer_size,
            seed=self.seed if self.buffer_shuffle is None else self.buffer_shuffle.perm_seed,
            n_shards=self.n_shards,
            start_shard=self.start_shard,
        )
