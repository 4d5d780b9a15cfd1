"""Many dictionaries on one stream: the settings, and how a grid becomes them.

A sweep is a list of runs that read the same batches in the same order. What makes the stream (model, datasets, `activation_factory`) stands once;
each item holds what may differ: the dictionary, its initialisation and its training. `members()` gives each run as `train_sae` would take it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Self

from pydantic import Field, model_validator

from lm_saes.config.base import BaseConfig, PathString, merge, validated, value_of
from lm_saes.config.dictionaries import InitializerConfig, SAEConfig
from lm_saes.config.settings import SAEOrPretrained, TrainingSettings, TrainSAESettings
from lm_saes.config.training import TensorBoardConfig, TrainerConfig, WandbConfig
from lm_saes.errors import ConfigError, did_you_mean
from lm_saes.files import inside

Grid = Mapping[str, Sequence[Any]]
"""The values of each field that differs: `{"trainer.lr": [1e-4, 3e-4], "sae.act_fn": ["topk", "batchtopk"]}`."""

SWEEP_FILE = "sweep.json"
"""The settings in a sweep's folder."""

SWEPT = ("sae", "initializer", "trainer")
"""The tables of `TrainSAESettings` that may differ between runs on one stream."""


class SweepingItem(BaseConfig):
    """One run of a sweep."""

    sae_name: str
    """Name of the dictionary; different for each item."""
    sae_series: str = "default"
    """Series it belongs to."""
    sae: SAEOrPretrained
    """The dictionary to build, or saved weights to fine-tune."""
    trainer: TrainerConfig
    """The run. `seed` covers what is drawn for this dictionary; the data have the sweep's `stream_seed`. Without an `exp_result_path` the run's
    folder is the one of the name in the sweep's folder."""
    initializer: InitializerConfig | None = None
    """How it starts (`None`: the defaults of `InitializerConfig`)."""
    wandb: WandbConfig | None = None
    """Report to Weights & Biases too."""
    tensorboard: TensorBoardConfig | None = None
    """Write TensorBoard event files too."""


class SweepSAESettings(TrainingSettings):
    """Train many SAEs or transcoders from one reading of the text: each forward of the language model serves all of them."""

    items: list[SweepingItem] = Field(min_length=1)
    """The runs."""
    exp_result_path: PathString = "results"
    """The sweep's folder."""
    stream_seed: int = 0
    """Seeds the order of the data, the mixing and the shuffling, for all runs."""

    @model_validator(mode="after")
    def _sweep_joints(self) -> Self:
        names = [item.sae_name for item in self.items]
        if double := _double(names):
            raise ValueError(f"items must have different names, got sae_name = {double!r} twice")
        for item in self.items:
            if "exp_result_path" not in item.trainer.model_fields_set:  # its name is that of its folder
                inside(Path(self.exp_result_path), item.sae_name, ConfigError, "sae_name")
        folders = [os.path.normpath(self.folder(item)) for item in self.items]
        if double := _double([os.path.normpath(self.exp_result_path), *folders]):
            raise ValueError(f"each run and the sweep need folders of their own, got {double!r} twice; change exp_result_path")
        if len({item.trainer.non_finite for item in self.items}) > 1:
            raise ValueError("runs on one stream begin training at the same batch: give all the same trainer.non_finite, or make two sweeps")
        needed = {item.sae_name: _initialization_batches(item) for item in self.items}
        if len(set(needed.values())) > 1:
            (one, a), (other, b) = next(pair for pair in itertools.combinations(needed.items(), 2) if pair[0][1] != pair[1][1])
            raise ValueError(
                f"runs on one stream begin training at the same batch, but '{one}' is initialised from {a} batches and '{other}' from {b}; "
                "give all the same initializer.n_batches (saved weights take 0), or make two sweeps"
            )
        return self

    def folder(self, item: SweepingItem) -> str:
        """The run's folder."""
        if "exp_result_path" in item.trainer.model_fields_set:
            return item.trainer.exp_result_path
        return str(PurePath(self.exp_result_path) / item.sae_name)

    @property
    def hook_points(self) -> list[str]:
        """What is captured: the factory's hook points, and those of the dictionaries that it lacks."""
        needed = [hook for item in self.items if isinstance(item.sae, SAEConfig) for hook in item.sae.associated_hook_points]
        return list(dict.fromkeys([*self.activation_factory.hook_points, *needed]))

    def members(self) -> list[TrainSAESettings]:
        """Each run as `train_sae` would take it; trained alone, with these settings, its result is the same, bit for bit."""
        shared = self.model_dump(mode="json", exclude_unset=True, exclude={"items", "exp_result_path"})
        shared |= {"stream_seed": self.stream_seed, "activation_factory": {**shared["activation_factory"], "hook_points": self.hook_points}}
        members = []
        for item in self.items:
            own = item.model_dump(mode="json", exclude_unset=True)
            own["trainer"]["exp_result_path"] = self.folder(item)
            members.append(validated(TrainSAESettings, {**shared, **own}, origin=item.sae_name))
        return members

    @classmethod
    def from_grid(cls, base: TrainSAESettings, grid: Grid) -> Self:
        """Every combination of the grid's values, laid over the settings of one run.

        The sweep's folder is the run's (`trainer.exp_result_path`). Each member is named after the values that differ, in a series with the
        run's name (where the run names no series). The stream's seed is the one that the run would have had.

        Raises:
            ConfigError: a field does not exist, is not the dictionary's, the initializer's or the trainer's, or does not take a value.
        """
        for path, values in grid.items():
            _check_axis(path, values)
        table = base.model_dump(mode="json", exclude_unset=True)
        if base.trackio is not None:
            raise ConfigError("trackio takes one run at a time; leave it out of a sweep (wandb, tensorboard and metrics.jsonl take many)")
        shared = {name: value for name, value in table.items() if name in cls.model_fields}
        own = {name: value for name, value in table.items() if name in SweepingItem.model_fields}
        own["trainer"].pop("exp_result_path", None)
        own.setdefault("sae_series", base.sae_name)
        items = [_item(own, dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
        if any(path.startswith("sae.hook_point_") for path in grid):  # only what the members need: the run's own hook point may not be
            shared["activation_factory"]["hook_points"] = _hook_points(items)
        return validated(
            cls, {**shared, "items": items, "exp_result_path": base.trainer.exp_result_path, "stream_seed": base.data_seed}, origin="the grid"
        )


def parse_grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """A grid from the command line: `trainer.lr=1e-4,3e-4` and so on. Values are read as overrides are; commas within brackets do not
    separate.

    Raises:
        ConfigError: a word is no `field=value,value`, or a field comes twice.
    """
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        pieces = _split(text)
        if not equals or not name or not all(pieces):
            raise ConfigError(f"--grid needs a field and its values, such as trainer.lr=1e-4,3e-4; got '{word}'")
        path = name.replace("-", "_")
        if path in grid:
            raise ConfigError(f"--grid {path} comes twice; give all its values at once: {path}=a,b,c")
        grid[path] = [value_of(piece) for piece in pieces]
    return grid


def _split(text: str) -> list[str]:
    """The parts of `text` between its commas, but for those within brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def _check_axis(path: str, values: Sequence[Any]) -> None:
    table, _, field = path.partition(".")
    if table not in SWEPT:
        if table in TrainSAESettings.model_fields and table not in ("sae_name", "sae_series"):
            raise ConfigError(
                f"{path} cannot differ within a sweep: all its runs read one stream and are evaluated alike; make one sweep for each value "
                f"(what may differ: {', '.join(f'{name}.*' for name in SWEPT)})"
            )
        raise ConfigError(f"a grid is over fields of {', '.join(SWEPT)}, got '{path}'{did_you_mean(table, SWEPT)}")
    if not field:
        raise ConfigError(f"a grid is over single fields, such as trainer.lr; got the whole of '{path}'")
    if path == "trainer.exp_result_path":
        raise ConfigError("trainer.exp_result_path cannot be in a grid: the folder of each run is named after the values that differ")
    if isinstance(values, str) or not values:
        raise ConfigError(f"the grid needs a list of values of {path}, got {values!r}")
    if double := _double([_word(value) for value in values]):
        raise ConfigError(f"the grid has the value {double} of {path} twice")


def _item(base: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """The table of one item: the base with the point's values laid over it, named after them."""
    label = _label(point)
    changes: dict[str, Any] = {}
    sae = base["sae"]
    if "sae.hook_point_in" in point and "sae.hook_point_out" not in point and sae.get("hook_point_out") == sae.get("hook_point_in"):
        point = {**point, "sae.hook_point_out": point["sae.hook_point_in"]}  # an SAE stays one
    for path, value in point.items():
        *tables, field = path.split(".")
        inner = changes
        for name in tables:
            inner = inner.setdefault(name, {})
        inner[field] = value
    changes["sae_name"] = label or base["sae_name"]
    if base.get("wandb") is not None:
        if base["wandb"].get("wandb_run_id") is not None:
            raise ConfigError("wandb.wandb_run_id names one run; leave it out of a sweep")
        changes["wandb"] = {"exp_name": f"{base['wandb'].get('exp_name') or base['sae_name']}-{label}".rstrip("-")}
    if (base.get("tensorboard") or {}).get("log_dir") is not None:
        changes["tensorboard"] = {"log_dir": str(PurePath(base["tensorboard"]["log_dir"]) / label)}
    return validated(SweepingItem, merge(base, changes), origin=f"the run {label}" if label else "").model_dump(mode="json", exclude_unset=True)


def _label(point: Mapping[str, Any]) -> str:
    """A name that is also a folder's: the values of a point, numbers with their field."""
    fields = [path.rpartition(".")[2] for path in point]
    parts = []
    for field, (path, value) in zip(fields, point.items(), strict=True):
        name = field if fields.count(field) == 1 else path
        parts.append(_word(value) if isinstance(value, str) else f"{name}={_word(value)}")
    return re.sub(r"[^\w.=+,-]+", "-", ",".join(parts))


def _word(value: Any) -> str:
    """A value as it stands in a name."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "-".join(_word(part) for part in value)
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def _hook_points(items: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(item["sae"][name] for item in items for name in ("hook_point_in", "hook_point_out") if name in item["sae"]))


def _initialization_batches(item: SweepingItem) -> int:
    return (item.initializer or InitializerConfig()).n_batches if isinstance(item.sae, SAEConfig) else 0


def _double(values: Sequence[Any]) -> Any:
    """A value that comes more than once, or None."""
    return next((value for index, value in enumerate(values) if value in values[:index]), None)


__all__ = ["Grid", "SweepSAESettings", "SweepingItem", "parse_grid"]
