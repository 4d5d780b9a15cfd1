"""The public face is pinned: the names, that each can be loaded, and that both lists of them (lazy and for type checkers) agree."""

import ast
from pathlib import Path

import pytest

import lm_saes

PINNED = [
    "ActivationFactory",
    "ActivationFactoryActivationsSource",
    "ActivationFactoryConfig",
    "ActivationFactoryDatasetSource",
    "ActivationFactoryTarget",
    "ActivationReport",
    "ActivationWriter",
    "ActivationWriterConfig",
    "BaseSAEConfig",
    "BufferShuffleConfig",
    "DatasetConfig",
    "DictionaryMatch",
    "EvalConfig",
    "EvaluateSAESettings",
    "Evaluator",
    "GenerateActivationsSettings",
    "HuggingFaceLanguageModel",
    "InitializationReport",
    "Initializer",
    "InitializerConfig",
    "JumpReLU",
    "LanguageModel",
    "LanguageModelConfig",
    "MatryoshkaConfig",
    "PretrainedSAE",
    "SAEConfig",
    "SparseAutoEncoder",
    "SparseDictionary",
    "SparseDictionaryConfig",
    "SweepSAESettings",
    "SweepingItem",
    "TensorBoardConfig",
    "TokenizerOnlyLanguageModel",
    "TrackioConfig",
    "TrainSAESettings",
    "Trainer",
    "TrainerConfig",
    "TransformerLensLanguageModel",
    "WandbConfig",
    "__version__",
    "compare_dictionaries",
    "evaluate_sae",
    "generate_activations",
    "inspect_activations",
    "load_dataset",
    "load_dataset_shard",
    "load_model",
    "sweep_sae",
    "train_sae",
]


def test_public_names_are_pinned():
    assert sorted(lm_saes.__all__) == sorted(PINNED)


def test_each_public_name_loads():
    for name in lm_saes.__all__:
        assert getattr(lm_saes, name) is not None


def test_lists_for_type_checkers_and_for_lazy_loading_agree():
    tree = ast.parse(Path(lm_saes.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    typed = {(node.module, alias.asname) for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == {(module, name) for name, module in lm_saes._HOME.items()}


def test_a_misspelt_name_is_answered_with_its_neighbour():
    with pytest.raises(AttributeError, match="did you mean 'SAEConfig'"):
        lm_saes.SAEConfg  # noqa: B018
