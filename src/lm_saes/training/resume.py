"""Where runs go on, together or alone, and with what: the newest checkpoints that are whole, and a configuration that has not changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_saes.config import TrainerConfig
from lm_saes.errors import ConfigError, RunFolderError, did_you_mean
from lm_saes.training.checkpoint import checkpoint_folders, damage, discard, read_state, resumable_folders
from lm_saes.training.run_folder import disk_errors
from lm_saes.training.schedules import CLAMPED, total_steps

WITHOUT_EFFECT = frozenset({"exp_result_path", "n_checkpoints", "check_point_save_mode", "keep_checkpoints", "checkpoint_minutes"})
"""Fields of `TrainerConfig` that decide where a run is written and how often, not what becomes of it: they may change."""
AT_THE_START = frozenset({"seed", "from_pretrained_path"})
"""Fields of `TrainerConfig` that have had their effect when a run goes on: they cannot change."""
DEFAULT = "the default"
NO_CHECKPOINT = "{} holds no checkpoint yet: the run starts from its beginning"

Differences = Mapping[str, tuple[Any, Any]]


class Moment(NamedTuple):
    """Where runs go on."""

    checkpoints: list[Path] | None
    """For each run its checkpoint; `None` where they start from the beginning."""
    notes: list[str]
    """What was found damaged on the way, a line each."""


def newest_moment(cfgs: Sequence[TrainerConfig]) -> Moment:
    """For each run a whole checkpoint, all of the newest moment that they have in common: of the same step, or, of a run that has come to its
    end before that step, its last. Every byte of them is read and compared with its checksum. They start from the beginning if they were stopped
    before they all had one.

    Raises:
        RunFolderError: there are checkpoints, and all are damaged; or the runs have no moment in common although some have gone further.
    """
    found = [resumable_folders(cfg.exp_result_path) for cfg in cfgs]
    damaged: dict[Path, str] = {}
    steps = sorted({step for folders in found for step in folders}, reverse=True)
    for step in steps:
        chosen = [_at(step, cfg, folders, damaged) for cfg, folders in zip(cfgs, found, strict=True)]
        if None not in chosen:
            where = f"going on from step {step}"
            return Moment([path for path in chosen if path is not None], [f"{path} is damaged ({why}): {where}" for path, why in damaged.items()])
    if damaged:
        path, why = next(iter(damaged.items()))
        raise RunFolderError(f"there is no whole checkpoint to resume from: {path} is damaged ({why}); choose another exp_result_path")
    if len(steps) > 1:
        lacking, _ = min(zip(cfgs, found, strict=True), key=lambda pair: len(pair[1]))
        raise RunFolderError(
            f"the runs have no whole checkpoint of the same step, so they cannot go on together ({lacking.exp_result_path} lacks some that others have); "
            "resume each alone with lm-saes train RUN/settings.json --resume, or choose another folder"
        )
    return Moment(None, [])


def _at(step: int, cfg: TrainerConfig, folders: dict[int, Path], damaged: dict[Path, str]) -> Path | None:
    """The run's checkpoint of that step, or the last one, if it was at its end by then. Takes note of what is damaged."""
    if step in folders:
        return folders[step] if _sound(folders[step], damaged) else None
    earlier = next((folders[own] for own in sorted(folders, reverse=True) if own < step), None)
    if earlier is None or not _sound(earlier, damaged):
        return None
    state = read_state(earlier)
    return earlier if state["step"] >= total_steps(cfg, state["tokens_per_batch"]) else None


def _sound(folder: Path, damaged: dict[Path, str]) -> bool:
    if folder not in damaged and (why := damage(folder)) is not None:
        damaged[folder] = why
    return folder not in damaged


def discard_newer(checkpoint: Path) -> None:
    """Remove the checkpoints of a run that are newer than one of them: they belong to a run with another configuration.

    Raises:
        RunFolderError: the disk cannot be written.
    """
    with disk_errors(str(checkpoint.parent)):
        for step, path in checkpoint_folders(checkpoint.parent.parent).items():
            if step > int(checkpoint.name.removeprefix("step_")):
                discard(path)


# ------------------------------------------------------------------------------------------------------- what has changed


def trainer_table(cfg: TrainerConfig) -> dict[str, Any]:
    """What of a configuration decides what becomes of a run. A default that is clamped to the run is another thing than the same number, set."""
    table = {name: value for name, value in cfg.as_dict().items() if name not in WITHOUT_EFFECT}
    return {name: DEFAULT if name in CLAMPED and name not in cfg.model_fields_set else value for name, value in table.items()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two nested tables, by their dotted names, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found[f"{prefix}{name}"] = (old, new)
    return found


def allowed_changes(changes: Differences, allow: Iterable[str], folder: str | Path) -> list[str]:
    """Refuse changes that nobody has allowed; a line for each that was.

    Args:
        allow: names of fields; `trainer` allows all below it.

    Raises:
        ConfigError: a field has changed that is not allowed to.
    """
    allow, notes = list(allow), []
    for name, (old, new) in changes.items():
        if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in allow):
            may = f", or allow the change with --allow-change {name} (allow_changes)" if may_change(name) else ""
            raise ConfigError(
                f"{folder} was begun with {name} = {old}, got {new}; resume with its own settings, or choose another exp_result_path{may}"
            )
        notes.append(f"{name} = {new} from here on; it was {old}")
    return notes


CHANGEABLE = ("trainer", "eval", "eval_config", "eval_datasets", "fold_activation_scale", "sae_name", "sae_series")
"""The settings of a run that can be changed when it goes on. The others are in the checkpoint already: the dictionary and the place in the data."""


def may_change(name: str) -> bool:
    """Whether a field, by its dotted name, can be changed when a run goes on."""
    table, _, field = name.partition(".")
    return table in CHANGEABLE and not (table == "trainer" and field.partition(".")[0] in AT_THE_START)


def check_allowed(allow: Iterable[str]) -> list[str]:
    """The names of fields that may change.

    Raises:
        ConfigError: one of them is no field, or one that cannot change.
    """
    names = [name.replace("-", "_") for name in allow]
    for name in names:
        table, _, field = name.partition(".")
        if not may_change(name):
            near = "" if table in CHANGEABLE else did_you_mean(table, CHANGEABLE)
            raise ConfigError(
                f"{name} cannot change when a run goes on{near}; what can: trainer.* (but {', '.join(sorted(AT_THE_START))}), {', '.join(CHANGEABLE[1:])}"
            )
        if table == "trainer" and field and field not in TrainerConfig.model_fields:
            raise ConfigError(f"there is no {name} that could change{did_you_mean(field, TrainerConfig.model_fields)}")
    return names
