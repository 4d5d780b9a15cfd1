"""Shared pieces of the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm_saes.config import TrainerConfig


@pytest.fixture
def trainer_config(tmp_path: Path) -> Callable[..., TrainerConfig]:
    """A configuration for `steps` steps of 64 tokens, in a folder of its own."""

    def make(steps: int = 20, folder: str = "run", **options: Any) -> TrainerConfig:
        return TrainerConfig(total_training_tokens=64 * steps, exp_result_path=str(tmp_path / folder), **options)

    return make
