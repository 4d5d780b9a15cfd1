"""Where runs that were trained together go on together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lm_saes.config import TrainerConfig
from lm_saes.errors import RunFolderError
from lm_saes.training.checkpoint import STATE_FILE, whole_checkpoints
from lm_saes.training.schedules import total_steps


def common_checkpoints(cfgs: Sequence[TrainerConfig]) -> list[Path] | None:
    """For each run a whole checkpoint, all of the newest moment that they have in common: of the same step, or, of a run that has come to its
    end before that step, its last. `None` if they were stopped while they wrote their first.

    Raises:
        RunFolderError: they have no moment in common although some have gone further.
    """
    saved = [whole_checkpoints(cfg.exp_result_path) for cfg in cfgs]
    steps = sorted({step for checkpoints in saved for step in checkpoints}, reverse=True)
    for step in steps:
        chosen = [_at(step, cfg, checkpoints) for cfg, checkpoints in zip(cfgs, saved, strict=True)]
        if None not in chosen:
            return [path for path in chosen if path is not None]
    if len(steps) > 1:
        lacking, _ = min(zip(cfgs, saved, strict=True), key=lambda pair: len(pair[1]))
        raise RunFolderError(
            f"the runs have no whole checkpoint of the same step, so they cannot go on together ({lacking.exp_result_path} lacks some that others have); "
            "resume each alone with lm-saes train RUN/settings.json --resume, or choose another folder"
        )
    return None


def _at(step: int, cfg: TrainerConfig, checkpoints: dict[int, Path]) -> Path | None:
    """The run's checkpoint of that step, or the last one, if it was at its end by then."""
    if step in checkpoints:
        return checkpoints[step]
    earlier = next((folder for own, folder in checkpoints.items() if own < step), None)
    if earlier is None:
        return None
    state = json.loads((earlier / STATE_FILE).read_text(encoding="utf-8"))
    return earlier if state["step"] >= total_steps(cfg, state["tokens_per_batch"]) else None
