"""Configurations of where activations come from: language model, text, and the stream of batches."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from lm_saes.config.base import BaseConfig, BaseModelConfig, DType, FloatingOrNone, PathString


class LanguageModelConfig(BaseModelConfig):
    """A language model. `model_name="demo"` is the one the package carries."""

    device: str = "auto"
    """Where the model runs; `auto` is the best there is."""
    dtype: DType = "float32"
    """Data type of the weights and the activations."""
    model_name: str = "gpt2"
    """A name on the Hugging Face hub, a folder, or "demo"."""
    model_from_pretrained_path: PathString | None = None
    """Where the weights are, if not at `model_name`."""
    cache_dir: PathString | None = None
    """Cache folder of the hub client."""
    local_files_only: bool = False
    """Never ask the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings. Off unless you say so."""
    random_weights: int | None = Field(default=None, ge=0)
    """Draw the weights anew, with this seed, as the architecture draws them before training: for comparison (`--baseline untrained-lm`)."""
    max_length: int = Field(default=2048, ge=2)
    """Longest context in tokens."""
    backend: Literal["huggingface", "transformer_lens", "tokenizer_only", "auto"] = "auto"
    """"auto" is Hugging Face."""
    prepend_bos: bool = True
    """Begin every context with the model's BOS token, if it has one."""
    bos_token_id: int | None = None
    """Instead of the tokenizer's."""
    eos_token_id: int | None = None
    """Instead of the tokenizer's."""
    pad_token_id: int | None = None
    """Instead of the tokenizer's."""

    def save_lm_config(self, folder: Any) -> None:
        """Write `lm_config.json` into an existing folder."""
        import json
        from pathlib import Path

        (Path(folder) / "lm_config.json").write_text(json.dumps(self.model_dump(mode="json", exclude={"device"}), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def from_pretrained_sae(pretrained_name_or_path: Any, **overrides: Any) -> LanguageModelConfig:
        """The configuration of the language model that a saved dictionary was trained on (`lm_config.json`, else its provenance). Code that the
        model brings is trusted only where `overrides` say so."""
        from pathlib import Path

        from lm_saes.config.base import validated
        from lm_saes.config.dictionaries import read_dictionary_config
        from lm_saes.errors import ConfigError
        from lm_saes.files import read_json_object

        path = Path(pretrained_name_or_path) / "lm_config.json"
        if path.is_file():
            table = read_json_object(path, ConfigError)
        else:
            _, provenance = read_dictionary_config(pretrained_name_or_path)
            table = provenance.get("model")
            if not isinstance(table, dict):
                raise ConfigError(f"{pretrained_name_or_path} does not record its language model; pass a LanguageModelConfig")
        code = {"trust_remote_code": False}  # whoever saved the dictionary does not decide that for whoever loads it
        return validated(LanguageModelConfig, {**table, **code, **overrides}, origin=str(path))


SLICE = re.compile(r"(\w+)(?:\[(?:(\d+)(%?))?:(?:(\d+)(%?))?\])?")
"""A split, or a part of it by the number of the document: its name, where the part begins and ends, and for each whether that is in percent."""


class DatasetConfig(BaseConfig):
    """Text. `dataset_name_or_path="demo"` is the Python standard library, which every machine with Python has."""

    dataset_name_or_path: PathString = "openwebtext"
    """A name on the Hugging Face hub, a folder, a `.txt`, `.jsonl`, `.json`, `.csv` or `.parquet` file (also a pattern with `*`), or "demo"."""
    cache_dir: PathString | None = None
    """Cache folder of the hub client."""
    is_dataset_on_disk: bool = False
    """The folder was written by `datasets.Dataset.save_to_disk`."""
    name: str | None = None
    """Configuration name on the hub."""
    split: str = "train"
    """Split ("train" or "heldout" for the demo corpus); or a part by the number of the document, "train[:95%]" and "train[95%:]"."""
    text_column: str = "text"
    """Column that holds the text."""
    streaming: bool = False
    """Read from the hub while training instead of downloading first."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Must stay off: datasets that bring code are not supported."""

    @model_validator(mode="after")
    def _no_code_from_datasets(self) -> Self:
        if self.trust_remote_code:
            raise ValueError("datasets with loading scripts are not supported; convert the dataset to parquet or jsonl")
        return self

    def may_overlap(self, other: DatasetConfig) -> bool:
        """Whether a document may be in both, as far as their names and splits say."""
        if (self.dataset_name_or_path, self.name) != (other.dataset_name_or_path, other.name):
            return False
        one, two = SLICE.fullmatch(self.split), SLICE.fullmatch(other.split)
        if one is None or two is None:  # a slice that only the hub understands
            return True
        return one[1] == two[1] and not (_ends_before(one, two) or _ends_before(two, one))


def _ends_before(one: re.Match[str], other: re.Match[str]) -> bool:
    """Whether a part surely ends where another begins, or before; percentages and numbers cannot be compared."""
    stop, stop_unit, start, start_unit = one[4], one[5], other[2], other[3]
    return None not in (stop, start) and stop_unit == start_unit and int(stop) <= int(start)


class ActivationFactoryTarget(Enum):
    """What a factory makes: token rows, activations in context, or single shuffled activations."""

    TOKENS = "tokens"
    ACTIVATIONS_2D = "activations-2d"
    ACTIVATIONS_1D = "activations-1d"

    @property
    def stage(self) -> int:
        return list(ActivationFactoryTarget).index(self)

    def __lt__(self, other: ActivationFactoryTarget) -> bool:
        return self.stage < other.stage

    def __le__(self, other: ActivationFactoryTarget) -> bool:
        return self.stage <= other.stage


class ActivationFactorySource(BaseConfig):
    """Base of the sources."""

    type: str
    """"dataset" or "activations"."""
    name: str
    """The dataset's key in `datasets`."""
    sample_weights: float = Field(default=1.0, gt=0)
    """Share of the tokens drawn from this source, relative to the others."""


class ActivationFactoryDatasetSource(ActivationFactorySource):
    """Text that a language model reads on the fly."""

    type: Literal["dataset"] = "dataset"  # pyright: ignore[reportIncompatibleVariableOverride]
    """"dataset"."""
    is_dataset_tokenized: bool = False
    """Rows already hold token ids in a column `tokens` (or `input_ids`)."""
    prepend_bos: bool | None = None
    """Override the language model's `prepend_bos` for this source."""


class ActivationFactoryActivationsSource(ActivationFactorySource):
    """Activations on disk."""

    type: Literal["activations"] = "activations"  # pyright: ignore[reportIncompatibleVariableOverride]
    """"activations"."""
    path: PathString | dict[str, PathString]
    """A cache's folder; or a folder of `.npy`, `.safetensors` or chunk files, with one folder per hook point in it; or a place for each hook point."""
    device: str = "cpu"
    """Where activations are loaded to, where there is no language model to go to."""
    dtype: FloatingOrNone = None
    """Cast on loading; `None` keeps the data type on disk (int8 becomes float32)."""
    num_workers: int = Field(default=4, ge=0)
    """Threads that read ahead; 0 reads when asked."""
    prefetch: int | None = Field(default=8, ge=1)
    """Pieces (2 MiB in float32, 1 MiB in float16, for each hook point) read ahead by each; `None` is 2."""
    skip_damaged: bool = False
    """Pass over damaged and missing shards, with a line in the log for each, instead of stopping."""


def _source_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind or ("activations" if isinstance(value, dict) and "path" in value else "dataset")


Source = Annotated[
    Annotated[ActivationFactoryDatasetSource, Tag("dataset")] | Annotated[ActivationFactoryActivationsSource, Tag("activations")],
    Discriminator(_source_kind),
]


class BufferShuffleConfig(BaseConfig):
    """Seed of the shuffle buffer."""

    perm_seed: int = 42
    """Seed of the permutations."""
    generator_device: str | None = None
    """Must stay unset or "cpu": the permutation is drawn on the CPU, so that it is the same on every machine."""

    @model_validator(mode="after")
    def _cpu(self) -> Self:
        if self.generator_device not in (None, "cpu"):
            raise ValueError("generator_device must be left out: permutations are drawn on the CPU, so that they are the same on every machine")
        return self


class ActivationFactoryConfig(BaseConfig):
    """A stream of batches: which text, which hook points, filtered and shuffled how."""

    sources: list[Source] = Field(min_length=1)
    """Where the text comes from."""
    target: ActivationFactoryTarget = ActivationFactoryTarget.ACTIVATIONS_1D
    """Single activations (1d), activations in context (2d) or tokens."""
    hook_points: list[str] = Field(min_length=1)
    """Hook points that are captured."""
    batch_size: int = Field(ge=1)
    """Tokens (activations-1d) or sequences (activations-2d, tokens) in a batch."""
    num_workers: int = 4
    """Without effect: tokenising is not where the time goes. Setting it warns."""
    context_size: int | None = Field(default=None, ge=2)
    """Tokens in a context, the BOS token included; `None` is the model's longest (at most 1024)."""
    model_batch_size: int = Field(default=1, ge=1)
    """Sequences in one forward of the language model."""
    override_dtype: FloatingOrNone = None
    """Cast the activations."""
    buffer_size: int | None = Field(default=None, ge=1)
    """Activations held in the shuffle buffer; `None` does not shuffle."""
    buffer_shuffle: BufferShuffleConfig | None = None
    """Seed of the shuffling; `None` takes the run's seed."""
    max_buffer_bytes: int | None = Field(default=None, ge=1)
    """Byte budget of the shuffle buffer: a larger `buffer_size` is lowered to it, with one log line."""
    prefetch: int | None = Field(default=None, ge=0)
    """Batches that a thread reads ahead while the dictionary is trained; `None` is 2 on CUDA, else 0. They are the same batches, in the same order."""
    ignore_token_ids: list[int] | None = None
    """Tokens whose activations are dropped. `None`: BOS, padding and the other special tokens; a list: those ids and nothing else."""
    outlier_norm_factor: float = Field(default=10.0, ge=0)
    """Drop activations whose norm exceeds this many times the running median at their hook point; 0 keeps them."""
    packing: bool = True
    """Concatenate documents, with the model's separator between them, so that no context is padded. Off: one context per document, the rest cut."""

    @model_validator(mode="after")
    def _joints(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources must have different names, got {names}")
        if self.buffer_size is not None and self.target is ActivationFactoryTarget.ACTIVATIONS_1D and self.buffer_size < self.batch_size:
            raise ValueError(f"buffer_size must be at least batch_size = {self.batch_size}, got {self.buffer_size}")
        return self
