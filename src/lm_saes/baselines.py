"""A run's baselines beside its dictionary (`lm_saes.config.baselines` says what they are)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_saes.assembly import evaluation_stream
from lm_saes.config import EvalConfig
from lm_saes.config.baselines import baseline_folder
from lm_saes.config.dictionaries import CONFIG_FILE
from lm_saes.errors import RunFolderError
from lm_saes.evaluation.evaluator import Evaluator
from lm_saes.runners import load_run


def check_trained(run: Path, names: Sequence[str]) -> None:
    """The baselines are there and finished.

    Raises:
        RunFolderError: one is not; the message is the command that trains it.
    """
    for name in names:
        if not (baseline_folder(run, name) / CONFIG_FILE).is_file():
            command = shlex.join(["lm-saes", "train", str(run / "settings.json"), "--baseline", name])
            raise RunFolderError(f"{run} has no finished baseline {name}; train it with: {command}")


def evaluate_baselines(run: Path, names: Sequence[str], cfg: EvalConfig) -> dict[str, dict[str, Any]]:
    """The metrics of trained baselines, by name, on the run's held-out text.

    An untrained language model predicts nothing that a reconstruction could spoil, so it is read but not spliced into: its baseline has no
    ΔCE and no recovered loss.

    Raises:
        RunFolderError: see `check_trained`.
    """
    check_trained(run, names)
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        sae, settings, model = load_run(baseline_folder(run, name))
        spliced = None if settings.model is None or settings.model.random_weights is not None else model
        results[name] = Evaluator(cfg).evaluate(sae, evaluation_stream(settings, model), model=spliced)
    return results
