"""lm_saes: sparse autoencoders and transcoders for language models.

    from lm_saes import SAEConfig, TrainSAESettings, train_sae

Public names are loaded when they are first used, so that importing the package costs nothing (no torch, no transformers).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lm_saes.version import __version__

if TYPE_CHECKING:
    from lm_saes.activations.factory import ActivationFactory as ActivationFactory
    from lm_saes.activations.text import load_dataset as load_dataset
    from lm_saes.activations.text import load_dataset_shard as load_dataset_shard
    from lm_saes.activations.writer import ActivationWriter as ActivationWriter
    from lm_saes.analysis.matching import DictionaryMatch as DictionaryMatch
    from lm_saes.analysis.matching import compare_dictionaries as compare_dictionaries
    from lm_saes.config import ActivationFactoryActivationsSource as ActivationFactoryActivationsSource
    from lm_saes.config import ActivationFactoryConfig as ActivationFactoryConfig
    from lm_saes.config import ActivationFactoryDatasetSource as ActivationFactoryDatasetSource
    from lm_saes.config import ActivationFactoryTarget as ActivationFactoryTarget
    from lm_saes.config import BaseSAEConfig as BaseSAEConfig
    from lm_saes.config import BufferShuffleConfig as BufferShuffleConfig
    from lm_saes.config import DatasetConfig as DatasetConfig
    from lm_saes.config import EvalConfig as EvalConfig
    from lm_saes.config import EvaluateSAESettings as EvaluateSAESettings
    from lm_saes.config import InitializerConfig as InitializerConfig
    from lm_saes.config import LanguageModelConfig as LanguageModelConfig
    from lm_saes.config import MatryoshkaConfig as MatryoshkaConfig
    from lm_saes.config import PretrainedSAE as PretrainedSAE
    from lm_saes.config import SAEConfig as SAEConfig
    from lm_saes.config import SparseDictionaryConfig as SparseDictionaryConfig
    from lm_saes.config import SweepingItem as SweepingItem
    from lm_saes.config import SweepSAESettings as SweepSAESettings
    from lm_saes.config import TensorBoardConfig as TensorBoardConfig
    from lm_saes.config import TrackioConfig as TrackioConfig
    from lm_saes.config import TrainerConfig as TrainerConfig
    from lm_saes.config import TrainSAESettings as TrainSAESettings
    from lm_saes.config import WandbConfig as WandbConfig
    from lm_saes.config.generation import ActivationWriterConfig as ActivationWriterConfig
    from lm_saes.config.generation import GenerateActivationsSettings as GenerateActivationsSettings
    from lm_saes.evaluation.evaluator import Evaluator as Evaluator
    from lm_saes.generate import generate_activations as generate_activations
    from lm_saes.inspection.inspect import inspect_activations as inspect_activations
    from lm_saes.inspection.report import ActivationReport as ActivationReport
    from lm_saes.lm.huggingface import HuggingFaceLanguageModel as HuggingFaceLanguageModel
    from lm_saes.lm.language_model import LanguageModel as LanguageModel
    from lm_saes.lm.language_model import TokenizerOnlyLanguageModel as TokenizerOnlyLanguageModel
    from lm_saes.lm.language_model import load_model as load_model
    from lm_saes.lm.transformer_lens import TransformerLensLanguageModel as TransformerLensLanguageModel
    from lm_saes.models.activation_functions import JumpReLU as JumpReLU
    from lm_saes.models.initializer import InitializationReport as InitializationReport
    from lm_saes.models.initializer import Initializer as Initializer
    from lm_saes.models.sae import SparseAutoEncoder as SparseAutoEncoder
    from lm_saes.models.sparse_dictionary import SparseDictionary as SparseDictionary
    from lm_saes.runners import evaluate_sae as evaluate_sae
    from lm_saes.runners import train_sae as train_sae
    from lm_saes.sweep import sweep_sae as sweep_sae
    from lm_saes.training.trainer import Trainer as Trainer

_PUBLIC_NAMES = {
    "lm_saes.activations.factory": ["ActivationFactory"],
    "lm_saes.activations.text": ["load_dataset", "load_dataset_shard"],
    "lm_saes.activations.writer": ["ActivationWriter"],
    "lm_saes.analysis.matching": ["DictionaryMatch", "compare_dictionaries"],
    "lm_saes.config": [
        "ActivationFactoryActivationsSource", "ActivationFactoryConfig", "ActivationFactoryDatasetSource", "ActivationFactoryTarget",
        "BaseSAEConfig", "BufferShuffleConfig", "DatasetConfig", "EvalConfig", "EvaluateSAESettings", "InitializerConfig", "LanguageModelConfig",
        "MatryoshkaConfig", "PretrainedSAE", "SAEConfig", "SparseDictionaryConfig", "SweepSAESettings", "SweepingItem", "TensorBoardConfig",
        "TrackioConfig", "TrainSAESettings", "TrainerConfig", "WandbConfig",
    ],
    "lm_saes.config.generation": ["ActivationWriterConfig", "GenerateActivationsSettings"],
    "lm_saes.evaluation.evaluator": ["Evaluator"],
    "lm_saes.generate": ["generate_activations"],
    "lm_saes.inspection.inspect": ["inspect_activations"],
    "lm_saes.inspection.report": ["ActivationReport"],
    "lm_saes.lm.huggingface": ["HuggingFaceLanguageModel"],
    "lm_saes.lm.language_model": ["LanguageModel", "TokenizerOnlyLanguageModel", "load_model"],
    "lm_saes.lm.transformer_lens": ["TransformerLensLanguageModel"],
    "lm_saes.models.activation_functions": ["JumpReLU"],
    "lm_saes.models.initializer": ["InitializationReport", "Initializer"],
    "lm_saes.models.sae": ["SparseAutoEncoder"],
    "lm_saes.models.sparse_dictionary": ["SparseDictionary"],
    "lm_saes.runners": ["evaluate_sae", "train_sae"],
    "lm_saes.sweep": ["sweep_sae"],
    "lm_saes.training.trainer": ["Trainer"],
}  # fmt: skip
_HOME = {name: module for module, names in _PUBLIC_NAMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        from lm_saes.errors import did_you_mean

        raise AttributeError(f"module 'lm_saes' has no attribute '{name}'{did_you_mean(name, _HOME)}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
