"""What one command does: a dictionary, a stream, a model, a trainer; evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

from lm_saes.config.activations import ActivationFactoryConfig, ActivationFactoryDatasetSource, DatasetConfig, LanguageModelConfig
from lm_saes.config.base import BaseConfig
from lm_saes.config.dictionaries import InitializerConfig, PretrainedSAE, SAEConfig
from lm_saes.config.training import TensorBoardConfig, TrackioConfig, TrainerConfig, WandbConfig


def _dictionary_kind(value: Any) -> str:
    if isinstance(value, dict):
        return "pretrained" if "pretrained_name_or_path" in value else "sae"
    return "pretrained" if isinstance(value, PretrainedSAE) else "sae"


SAEOrPretrained = Annotated[Annotated[SAEConfig, Tag("sae")] | Annotated[PretrainedSAE, Tag("pretrained")], Discriminator(_dictionary_kind)]


class EvalConfig(BaseConfig):
    """How much is evaluated, and beside what."""

    total_eval_tokens: int = Field(default=1_000_000, ge=1)
    """Tokens that the stream keeps."""
    baseline_pca: int | None = Field(default=None, ge=1)
    """Evaluate PCA of this rank beside the dictionary, fitted on the start of the training text."""


class StreamSettings(BaseConfig):
    """A stream of activations, and where it is computed."""

    activation_factory: ActivationFactoryConfig
    """The stream of activations."""
    model: LanguageModelConfig | None = None
    """The language model (`None`: activations come from disk)."""
    model_name: str | None = None
    """Name under which the model is recorded."""
    datasets: dict[str, DatasetConfig] | None = None
    """Text by the names that the factory's sources use; a source named "demo" needs no entry."""
    data_parallel_size: int = 1
    """Must be 1 in this version."""
    model_parallel_size: int = 1
    """Must be 1 in this version."""
    device_type: str = "auto"
    """Device of the language model and the dictionary: auto, cpu, cuda, mps."""
    mongo: None = None
    """Not supported: features are stored in one SQLite file."""

    @model_validator(mode="before")
    @classmethod
    def _no_mongo(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("mongo") is not None:
            raise ValueError("mongo is not supported: nothing here needs a database server. Remove it; pass `model` and `datasets` in the settings")
        return data

    @model_validator(mode="after")
    def _settings_joints(self) -> Self:
        for name in ("data_parallel_size", "model_parallel_size"):
            if getattr(self, name) != 1:
                raise ValueError(f"{name} must be 1 in this version, got {getattr(self, name)}")
        known = set(self.datasets or {}) | {"demo"}
        for source in self.activation_factory.sources:
            if isinstance(source, ActivationFactoryDatasetSource):
                if source.name not in known:
                    raise ValueError(f"source '{source.name}' has no entry in datasets (there: {sorted(known)})")
                if self.model is None:
                    raise ValueError(f"source '{source.name}' is text, which needs a language model: set `model`")
        return self

    def evaluation_dataset(self, name: str) -> DatasetConfig:
        """The text that a source is evaluated on: that of `eval_datasets`, or the demo corpus's own held-out side, else that of the training."""
        held_out: dict[str, DatasetConfig] = getattr(self, "eval_datasets", None) or {}
        if name in held_out:
            return held_out[name]
        trained = self.dataset(name)
        return trained.replace(split="heldout") if trained.dataset_name_or_path == "demo" else trained

    def dataset(self, name: str) -> DatasetConfig:
        """The dataset of that name; "demo" is known without an entry."""
        return (self.datasets or {}).get(name) or DatasetConfig(dataset_name_or_path="demo")


class Settings(StreamSettings):
    """What all jobs on one dictionary share."""

    sae_name: str
    """Name of the dictionary."""
    sae_series: str = "default"
    """Series it belongs to."""
    wandb: WandbConfig | None = None
    """Report to Weights & Biases too."""


class TrainingSettings(StreamSettings):
    """What one run and many runs on one stream share."""

    eval: bool = False
    """Evaluate at the end (on held-out text where `eval_datasets` names some) and every `eval_frequency` steps."""
    eval_config: EvalConfig = EvalConfig()
    """Size of that evaluation."""
    eval_datasets: dict[str, DatasetConfig] | None = None
    """Held-out text for evaluation, by source name; sources without an entry keep their training text ("demo": its held-out split)."""
    fold_activation_scale: bool = True
    """Fold the activation scale into the final weights."""

    @model_validator(mode="before")
    @classmethod
    def _eval_is_a_switch(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("eval"), dict | EvalConfig):
            raise ValueError("eval is true or false in a training; how much is evaluated stands in eval_config (eval_config.total_eval_tokens)")
        return data


class TrainSAESettings(TrainingSettings, Settings):
    """Train an SAE or a transcoder, from scratch or from saved weights."""

    sae: SAEOrPretrained
    """The dictionary to build, or saved weights to fine-tune."""
    trainer: TrainerConfig
    """The run."""
    initializer: InitializerConfig | None = None
    """How it starts (`None`: the defaults of `InitializerConfig`)."""
    stream_seed: int | None = None
    """Seeds the order of the data, the mixing and the shuffling; `None` takes `trainer.seed`. The members of a sweep share it."""
    tensorboard: TensorBoardConfig | None = None
    """Write TensorBoard event files too."""
    trackio: TrackioConfig | None = None
    """Report to trackio too."""

    @model_validator(mode="after")
    def _hooks_are_captured(self) -> Self:
        if isinstance(self.sae, SAEConfig):
            missing = [hook for hook in self.sae.associated_hook_points if hook not in self.activation_factory.hook_points]
            if missing:
                raise ValueError(f"activation_factory.hook_points lacks {missing}, which the dictionary reads or reconstructs")
        if self.sae.__dict__["dtype"] == "float16":  # by name: the attribute would import torch
            raise ValueError(
                'weights cannot be trained in float16: small updates vanish; set sae.dtype = "float32", trainer.amp_dtype = "float16" computes in it'
            )
        return self

    @property
    def data_seed(self) -> int:
        """The seed of the stream."""
        return self.trainer.seed if self.stream_seed is None else self.stream_seed


class EvaluateSAESettings(Settings):
    """Evaluate a saved dictionary."""

    sae: PretrainedSAE
    """The saved weights."""
    eval: EvalConfig = EvalConfig()
    """How much, beside what."""
    fold_activation_scale: bool = True
    """Fold the activation scale into the weights when loading."""
