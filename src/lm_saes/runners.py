"""The jobs: train and evaluate a dictionary from settings. Thin on purpose: each step is one call into a room below.

`train_sae` in order: the run's folder is checked, the language model loaded, the stream opened, the joints between them checked; the
dictionary is initialised from the start of the stream (or loaded, or restored from a checkpoint); it is trained, folded, saved,
and, if asked for, evaluated on held-out text.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_saes.activations.factory import ActivationFactory
from lm_saes.config import (
    ActivationFactoryTarget,
    DatasetConfig,
    EvalConfig,
    EvaluateSAESettings,
    InitializerConfig,
    PretrainedSAE,
    SAEConfig,
    Settings,
    TrainSAESettings,
)
from lm_saes.config.base import RUN_RECORDS, BaseModelConfig, validated
from lm_saes.config.dictionaries import CONFIG_FILE
from lm_saes.errors import ConfigError, HookPointError, RunFolderError
from lm_saes.evaluation.evaluator import Evaluator
from lm_saes.evaluation.pca import PCABaseline
from lm_saes.lm.language_model import LanguageModel, load_model
from lm_saes.models.initializer import Initializer
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training.checkpoint import RunFolder, disk_errors, write_json
from lm_saes.training.loggers import TensorBoardLogger, TrackioLogger, WandbLogger
from lm_saes.training.trainer import Trainer
from lm_saes.version import __version__

if TYPE_CHECKING:
    from lm_saes.activations.factory import ActivationStream
    from lm_saes.training.loggers import Logger

FOLDABLE = ("dataset-wise", "batch-wise")
"""The normalisations whose scale is a constant after training, so that it can be folded into the weights."""

EVALUATION_ROWS = 8
"""Contexts in one batch of an evaluation: small enough for any machine, large enough to keep it busy."""

TOKENS_DURING_TRAINING = 50_000
"""Tokens of the evaluations inside a training."""


def train_sae(
    settings: TrainSAESettings, *, resume: bool = False, loggers: Sequence[Logger] = (), report: Callable[[str, Any], None] | None = None
) -> SparseDictionary:
    """Train an SAE or a transcoder and leave a run's folder at `settings.trainer.exp_result_path`.

    Args:
        settings: What to train, on what, how.
        resume: Go on from the newest whole checkpoint in the folder, or start afresh when it is empty.
        loggers: Where metrics go beside `metrics.jsonl` and what the settings name.
        report: Called with a name and a value as things become known: "model", "initialization", "stream", "evaluation".

    Returns:
        The finished dictionary, folded (unless the settings say otherwise) and in eval mode.

    Raises:
        LmSaesError: anything a user can mend; nothing is left half-written.
    """
    report = report or _silent
    folder = Path(settings.trainer.exp_result_path)
    newest = RunFolder(folder).open(resume) if folder.exists() else None
    if newest is not None:
        check_same(settings, folder)
    placed = with_device(settings)
    model = open_model(placed)
    report("model", model)
    check_joints(settings, model)
    stream = open_stream(placed, model, settings.trainer.seed)
    table = settings_record(settings)
    configured = _configured_loggers(settings, table)

    if newest is not None:
        sae = SparseDictionary.from_pretrained(newest, fold_activation_scale=False, device=placed.sae.device)
    else:
        sae = start_dictionary(placed, stream, model, report, folder)
    sae.provenance = provenance(settings, model)
    _write(folder / "settings.json", table)

    trainer = Trainer(settings.trainer, loggers=[*loggers, *configured], settings=table, resume=resume)
    trainer.fit(sae, stream, _evaluation_during_training(placed, model) if settings.eval else None)
    report("stream", stream)
    if settings.fold_activation_scale and sae.cfg.norm_activation in FOLDABLE:
        sae.fold_activation_scale()
    with disk_errors(str(folder)):
        sae.save_pretrained(folder)
    if settings.eval:
        results = evaluate_dictionary(sae, settings.eval_config, placed, model)
        write_json(folder / "evaluation.json", results)
        report("evaluation", results)
    return sae


def evaluate_sae(settings: EvaluateSAESettings, *, baseline: bool = False) -> dict[str, dict[str, Any]]:
    """Evaluate a saved dictionary on the settings' text; `{"sae": metrics, "pca-<k>": metrics}`.

    Args:
        settings: What to evaluate, on what.
        baseline: Evaluate PCA beside it, of the dictionary's L0 where the settings name no rank.
    """
    placed = with_device(settings)
    model = open_model(placed)
    check_joints(settings, model)
    sae = load_dictionary(placed.sae.replace(fold_activation_scale=settings.fold_activation_scale and settings.sae.fold_activation_scale))
    return evaluate_dictionary(sae, settings.eval, placed, model, baseline)


# ----------------------------------------------------------------------------------------------------------------- pieces


def _silent(name: str, value: Any) -> None:
    """A report that nobody reads."""
    del name, value


def with_device(settings: Any) -> Any:
    """The settings with `device_type` given to the language model and the dictionary, unless they name a device of their own."""
    from lm_saes.devices import resolve_device

    name = str(resolve_device(settings.device_type))

    def placed(config: BaseModelConfig | None) -> BaseModelConfig | None:
        if config is None or ("device" in config.model_fields_set and config.device != "auto"):
            return config
        return config.replace(device=name)

    return settings.replace(model=placed(settings.model), sae=placed(settings.sae))


def load_dictionary(reference: PretrainedSAE) -> SparseDictionary:
    """Saved weights. They are folded where the reference asks for it and where folding exists: a dictionary whose scale is that of each vector
    (token-wise), and one that was folded already, are loaded as they are."""
    foldable = SAEConfig.from_pretrained(reference.pretrained_name_or_path).norm_activation in FOLDABLE
    return SparseDictionary.from_pretrained(
        reference.pretrained_name_or_path,
        fold_activation_scale=reference.fold_activation_scale and foldable,
        strict_loading=reference.strict_loading,
        device=reference.device,
        dtype=reference.dtype,
    )


def open_model(settings: Settings) -> LanguageModel | None:
    """The language model of the settings, if they name one."""
    return None if settings.model is None else load_model(settings.model)


def open_stream(settings: Settings, model: LanguageModel | None, seed: int) -> ActivationStream:
    """The training stream of the settings."""
    datasets = {source.name: settings.dataset(source.name) for source in settings.activation_factory.sources}
    return ActivationFactory(settings.activation_factory).process(model=model, model_name=settings.model_name, datasets=datasets, seed=seed)


def evaluation_stream(settings: Settings, model: LanguageModel | None, seed: int = 0) -> ActivationStream:
    """The settings' text in context (2D), from its held-out side where there is one: `eval_datasets`, or the demo corpus's own split."""
    held_out: dict[str, DatasetConfig] = getattr(settings, "eval_datasets", None) or {}
    datasets = {}
    for source in settings.activation_factory.sources:
        dataset = held_out.get(source.name) or settings.dataset(source.name)
        if source.name not in held_out and dataset.dataset_name_or_path == "demo":
            dataset = dataset.replace(split="heldout")
        datasets[source.name] = dataset
    factory = settings.activation_factory.replace(
        target=ActivationFactoryTarget.ACTIVATIONS_2D,
        batch_size=EVALUATION_ROWS,
        model_batch_size=EVALUATION_ROWS,
        buffer_size=None,
        buffer_shuffle=None,
        max_buffer_bytes=None,
    )
    return ActivationFactory(factory).process(model=model, model_name=settings.model_name, datasets=datasets, seed=seed)


def evaluate_dictionary(
    sae: SparseDictionary, cfg: EvalConfig, settings: Settings, model: LanguageModel | None, baseline: bool = False
) -> dict[str, dict[str, Any]]:
    """The dictionary's metrics on held-out text, and those of PCA on the same text: of the rank that the config names or, with `baseline`
    and none named, of the dictionary's measured L0."""
    metrics = Evaluator(cfg).evaluate(sae, evaluation_stream(settings, model), model=model)
    results: dict[str, dict[str, Any]] = {"sae": metrics}
    rank = cfg.baseline_pca
    if rank is None and baseline:
        rank = min(max(1, round(metrics["metrics/l0"])), sae.cfg.d_model)  # pyright: ignore[reportArgumentType]  # L0 is a number
    if rank is not None:
        fitting = open_stream(settings, model, seed=1)
        pca = PCABaseline(rank, sae.cfg.hooks_out[0]).fit(fitting, n_tokens=min(200_000, cfg.total_eval_tokens))
        results[f"pca-{rank}"] = Evaluator(cfg).evaluate(pca, evaluation_stream(settings, model), model=model)
    return results


def start_dictionary(
    settings: TrainSAESettings,
    stream: Iterable[dict[str, Any]],
    model: LanguageModel | None,
    report: Callable[[str, Any], None] = _silent,
    folder: Path | None = None,
) -> SparseDictionary:
    """A fresh dictionary: initialised from the start of the stream, or loaded from saved weights (fine-tuning)."""
    if isinstance(settings.sae, PretrainedSAE):
        return load_dictionary(settings.sae)
    initializer = Initializer(settings.initializer or InitializerConfig())
    sae = initializer.initialize_sae_from_config(settings.sae, stream, model=model, seed=settings.trainer.seed)
    if folder is not None:
        _write(folder / "initialization.json", initializer.report.as_dict())
    report("initialization", initializer.report)
    return sae


def _configured_loggers(settings: TrainSAESettings, table: dict[str, Any]) -> list[Logger]:
    """The loggers that the settings name."""
    loggers: list[Logger] = []
    if settings.wandb is not None:
        loggers.append(WandbLogger(settings.wandb, table))
    if settings.tensorboard is not None:
        loggers.append(TensorBoardLogger(settings.tensorboard, settings.trainer.exp_result_path))
    if settings.trackio is not None:
        loggers.append(TrackioLogger(settings.trackio, table))
    return loggers


def _evaluation_during_training(settings: TrainSAESettings, model: LanguageModel | None) -> Callable[[SparseDictionary], dict[str, Any]]:
    """A smaller evaluation on the same held-out text, for the curve."""
    cfg = settings.eval_config.replace(total_eval_tokens=min(settings.eval_config.total_eval_tokens, TOKENS_DURING_TRAINING))
    return lambda sae: Evaluator(cfg).evaluate(sae, evaluation_stream(settings, model), model=model)


def dictionary_config(settings: TrainSAESettings | EvaluateSAESettings) -> SAEConfig:
    """The configuration of the settings' dictionary, read from its folder where it is a saved one."""
    sae = settings.sae
    return sae if isinstance(sae, SAEConfig) else SAEConfig.from_pretrained(sae.pretrained_name_or_path)


def check_joints(settings: TrainSAESettings | EvaluateSAESettings, model: LanguageModel | None) -> None:
    """The dictionary's hook points are captured, exist in the model, and are as wide as the dictionary.

    Raises:
        ConfigError, HookPointError, WeightsError: they are not; or the saved dictionary that is named cannot be read.
    """
    cfg, captured = dictionary_config(settings), settings.activation_factory.hook_points
    missing = [hook for hook in cfg.associated_hook_points if hook not in captured]
    if missing:
        raise ConfigError(f"activation_factory.hook_points lacks {missing}, which the dictionary reads or reconstructs")
    if model is not None:
        widths = {hook: model.hook_width(hook) for hook in captured}
        for hook in cfg.associated_hook_points:
            if widths[hook] != cfg.d_model:
                raise HookPointError(f"d_model is {cfg.d_model}, but '{hook}' is {widths[hook]} wide; set sae.d_model = {widths[hook]}")


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


def provenance(settings: TrainSAESettings, model: LanguageModel | None) -> dict[str, Any]:
    """What a saved dictionary says about where it comes from."""
    record: dict[str, Any] = {
        "sae_name": settings.sae_name,
        "sae_series": settings.sae_series,
        "hook_points": settings.activation_factory.hook_points,
        "datasets": {source.name: settings.dataset(source.name).as_dict() for source in settings.activation_factory.sources},
        "context_size": settings.activation_factory.context_size,
        "total_training_tokens": settings.trainer.total_training_tokens,
        "seed": settings.trainer.seed,
    }
    if settings.model is not None and model is not None:
        record["model"] = settings.model.model_dump(mode="json", exclude={"device"})
        record["model_identity"] = model.provenance()
    return record


def _write(path: Path, table: dict[str, Any]) -> None:
    """Write a JSON file of a run; the folder is made now, when everything that can be checked was checked."""
    with disk_errors(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table)


def settings_record(settings: TrainSAESettings) -> dict[str, Any]:
    """What `settings.json` holds: the settings that were given (defaults depend on the run's length and on the machine, so they must stay
    defaults when the file is read again), versions, and all settings as they were resolved."""
    return {"versions": versions(), **settings.model_dump(mode="json", exclude_unset=True), "resolved": settings.as_dict()}


def versions() -> dict[str, str]:
    """Versions that a run's results depend on."""
    from importlib.metadata import version

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


def check_finished(folder: str | Path) -> None:
    """The run in the folder has its dictionary.

    Raises:
        RunFolderError: it was not trained to its end.
    """
    if not (Path(folder) / CONFIG_FILE).is_file():
        raise RunFolderError(f"the run in {folder} is not finished; finish it with lm-saes train {Path(folder) / 'settings.json'} --resume")


def load_run(folder: str | Path, device: str = "auto") -> tuple[SparseDictionary, TrainSAESettings, LanguageModel | None]:
    """A run's finished dictionary, its settings and its language model.

    Raises:
        LmSaesError: the folder holds no finished run, or its language model is not where it was.
    """
    settings = settings_of_run(folder)
    check_finished(folder)
    placed = with_device(settings.replace(device_type=device))
    sae = load_dictionary(PretrainedSAE(pretrained_name_or_path=str(folder), device=placed.sae.device))
    return sae, placed, open_model(placed)


__all__ = ["evaluate_sae", "load_run", "settings_of_run", "train_sae"]
