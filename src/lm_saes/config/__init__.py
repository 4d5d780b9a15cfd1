"""All configurations. Importing them imports no torch."""

from lm_saes.config.activations import (
    ActivationFactoryActivationsSource,
    ActivationFactoryConfig,
    ActivationFactoryDatasetSource,
    ActivationFactorySource,
    ActivationFactoryTarget,
    BufferShuffleConfig,
    DatasetConfig,
    LanguageModelConfig,
)
from lm_saes.config.base import BaseConfig, BaseModelConfig, load_settings
from lm_saes.config.dictionaries import InitializerConfig, MatryoshkaConfig, PretrainedSAE, SAEConfig, SparseDictionaryConfig
from lm_saes.config.settings import EvalConfig, EvaluateSAESettings, Settings, StreamSettings, TrainSAESettings
from lm_saes.config.sweep import SweepingItem, SweepSAESettings
from lm_saes.config.training import TensorBoardConfig, TrackioConfig, TrainerConfig, WandbConfig

BaseSAEConfig = SparseDictionaryConfig

__all__ = [
    "ActivationFactoryActivationsSource", "ActivationFactoryConfig", "ActivationFactoryDatasetSource", "ActivationFactorySource",
    "ActivationFactoryTarget", "BaseConfig", "BaseModelConfig", "BaseSAEConfig", "BufferShuffleConfig", "DatasetConfig", "EvalConfig",
    "EvaluateSAESettings", "InitializerConfig", "LanguageModelConfig", "MatryoshkaConfig", "PretrainedSAE", "SAEConfig", "Settings", "SparseDictionaryConfig",
    "StreamSettings", "SweepSAESettings", "SweepingItem", "TensorBoardConfig", "TrackioConfig", "TrainSAESettings", "TrainerConfig", "WandbConfig", "load_settings",
]  # fmt: skip
