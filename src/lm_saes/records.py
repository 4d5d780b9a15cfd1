"""What a run's folder says about the run: its settings, the versions, where its dictionary comes from."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_saes.activations.foreign_cache import open_activations
from lm_saes.config import ActivationFactoryActivationsSource, ActivationFactoryDatasetSource, DatasetConfig, StreamSettings, TrainSAESettings
from lm_saes.config.base import RUN_RECORDS, BaseConfig, validated
from lm_saes.config.baselines import baseline_of
from lm_saes.config.dictionaries import CONFIG_FILE
from lm_saes.errors import ConfigError, RunFolderError
from lm_saes.files import read_json_object
from lm_saes.training.resume import allowed_changes, differences, trainer_table
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
        table = read_json_object(path, ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a run's folder: there is no settings.json in it") from None
    return validated(TrainSAESettings, {name: value for name, value in table.items() if name not in RUN_RECORDS}, origin=str(path))


def check_same(settings: TrainSAESettings, folder: Path, allow: Sequence[str] = ()) -> list[str]:
    """A run goes on with the settings that it began with, but for those in `allow`; a line for each of these that has changed. Where it is written,
    how often, on what device, and who is told, may change freely.

    Raises:
        ConfigError: a setting is another one now; or the folder does not say with which the run began.
    """
    return allowed_changes(differences(_decisive(settings_of_run(folder)), _decisive(settings)), allow, folder)


def _decisive(settings: TrainSAESettings) -> dict[str, Any]:
    """What of the settings decides what becomes of the run."""
    table = {name: value for name, value in settings.as_dict().items() if name not in _FREE}
    table["trainer"] = trainer_table(settings.trainer)
    table["stream_seed"] = settings.data_seed
    for part in ("sae", "model"):
        table[part] = table[part] and {name: value for name, value in table[part].items() if name != "device"}
    factory = {name: value for name, value in table["activation_factory"].items() if name not in _FREE_OF_STREAM}
    sources = [{name: value for name, value in source.items() if name not in _FREE_OF_STREAM} for source in factory.pop("sources")]
    table["activation_factory"] = {**factory, "sources": sources}
    return table


_FREE = ("device_type", "wandb", "tensorboard", "trackio")
_FREE_OF_STREAM = ("device", "num_workers", "prefetch", "path")


def evaluated_on(settings: StreamSettings) -> str:
    """What an evaluation with these settings reads (see `assembly.evaluation_stream`), in words: "held-out text" only where all of it is, as
    far as names and splits say."""
    held_out: dict[str, DatasetConfig] = getattr(settings, "eval_datasets", None) or {}
    kinds = []
    for source in settings.activation_factory.sources:
        of_text = isinstance(source, ActivationFactoryDatasetSource)
        if not of_text and (settings.model is None or source.name not in {**(settings.datasets or {}), **held_out}):
            kinds.append("activations it was trained on")
            continue
        trained, read = settings.dataset(source.name), settings.evaluation_dataset(source.name)
        if read == trained:
            kinds.append("text it was trained on")
        else:
            kinds.append("text it may have been trained on" if read.may_overlap(trained) else "held-out text")
    return " and ".join(dict.fromkeys(kinds))


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
    if (baseline := baseline_of(settings)) is not None:
        record["baseline"] = baseline
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
