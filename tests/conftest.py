"""Tests are offline and deterministic."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def short_demo_run(tmp_path_factory: pytest.TempPathFactory):
    """The demo at a hundredth of its length, for tests that look at a finished run. Its folder."""
    from lm_saes.cli import recipe
    from lm_saes.config import TrainSAESettings, load_settings
    from lm_saes.runners import train_sae

    folder = tmp_path_factory.mktemp("runs") / "demo"
    settings = load_settings(
        TrainSAESettings,
        recipe("demo"),
        {
            "trainer": {"exp_result_path": str(folder), "total_training_tokens": 16_384},
            "activation_factory": {"buffer_size": 4096, "batch_size": 1024},
            "eval_config": {"total_eval_tokens": 4_000, "baseline_pca": 8},
        },
    )
    train_sae(settings)
    return folder
