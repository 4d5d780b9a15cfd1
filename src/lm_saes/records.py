"""What a run's folder says about the run: its settings, the versions, where its dictionary comes from."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_saes.activations.foreign_cache import open_activations
from lm_saes.config import ActivationFactoryActivationsSource, TrainSAESettings
from lm_saes.config.base import RUN_RECORDS, BaseConfig, validated
from lm_saes.config.dictionaries import CONFIG_FILE
from lm_saes.errors import ConfigError, RunFolderError
from lm_saes.version import __version__

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel


def settings_record(settings: BaseConfig) -> dict[str, Any]:
    """What `settings.json` holds: the settings that were given (defaults depend on the run's length and on the machine, so they must stay
    defaults when the file is read again), versions, and all settings as they were resolved."""
    return {"versions": versions(), **settings.model_dump(mode="json", exclude_unset=True), "resolved": settings.as_dict()}


def versions() -> dict[str, str]:
    """Versions that a run's results depend on."""
    from importlib.metadata import version

    import torch

    return {"lm_saes": __version__, "torch": torch.__version__, "transformers": version("transformers"), "python": platform.python_version()}


def settings_of_run(folder: str | Path) -> TrainSAESettings:
    """The settings that a run's folder was made with.

    Raises:
        ConfigError: the folder holds no run, or its settings are not readable.
    """
    path = Path(folder) / "settings.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a run's folder: there is no settings.json in it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path} must hold a table of settings, got {type(table).__name__}")
    return validated(TrainSAESettings, {name: value for name, value in table.items() if name not in RUN_RECORDS}, origin=str(path))


def check_same(settings: TrainSAESettings, folder: Path) -> None:
    """A run goes on with the dictionary, the model and the text that it began with.

    Raises:
        ConfigError: one of them is another one now.
    """
    if not (folder / "settings.json").is_file():
        return
    before, now = settings_of_run(folder).as_dict(), settings.as_dict()
    for part in ("sae", "initializer", "model", "datasets", "activation_factory"):
        old, new = before[part], now[part]
        if isinstance(old, dict) and isinstance(new, dict):
            differing = [name for name in new if name != "device" and old.get(name) != new[name]]
            part, old, new = (f"{part}.{differing[0]}", old.get(differing[0]), new[differing[0]]) if differing else (part, None, None)
        if old != new:
            raise ConfigError(f"{folder} was begun with {part} = {old}, got {new}; resume with its own settings, or choose another exp_result_path")


def check_finished(folder: str | Path) -> None:
    """The run in the folder has its dictionary.

    Raises:
        RunFolderError: it was not trained to its end.
    """
    if not (Path(folder) / CONFIG_FILE).is_file():
        raise RunFolderError(f"the run in {folder} is not finished; finish it with lm-saes train {Path(folder) / 'settings.json'} --resume")


def provenance(settings: TrainSAESettings, model: LanguageModel | None) -> dict[str, Any]:
    """What a saved dictionary says about where it comes from."""
    record: dict[str, Any] = {
        "sae_name": settings.sae_name,
        "sae_series": settings.sae_series,
        "hook_points": settings.activation_factory.hook_points,
        "datasets": {},
        "context_size": settings.activation_factory.context_size,
        "total_training_tokens": settings.trainer.total_training_tokens,
        "seed": settings.trainer.seed,
        "stream_seed": settings.data_seed,
    }
    for source in settings.activation_factory.sources:
        if isinstance(source, ActivationFactoryActivationsSource):
            cached = open_activations(source.path, settings.activation_factory.hook_points, skip_damaged=True).provenance
            record["datasets"][source.name] = {"activations": source.path, **cached}
            record |= {name: cached[name] for name in ("model", "model_identity") if cached.get(name)}
        else:
            record["datasets"][source.name] = settings.dataset(source.name).as_dict()
    if settings.model is not None and model is not None:
        record["model"] = settings.model.model_dump(mode="json", exclude={"device"})
        record["model_identity"] = model.provenance()
    return record
