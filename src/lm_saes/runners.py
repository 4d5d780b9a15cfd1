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
    ActivationFactoryConfig,
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
from lm_saes.config.base import BaseModelConfig
from lm_saes.errors import ConfigError, HookPointError
from lm_saes.evaluation.evaluator import Evaluator
from lm_saes.evaluation.pca import PCABaseline
from lm_saes.lm.language_model import LanguageModel, load_model
from lm_saes.models.initializer import Initializer
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training.checkpoint import RunFolder, write_atomically
from lm_saes.training.loggers import TensorBoardLogger, TrackioLogger, WandbLogger
from lm_saes.training.trainer import Trainer
from lm_saes.version import __version__

if TYPE_CHECKING:
    from lm_saes.activations.factory import ActivationStream
    from lm_saes.training.loggers import Logger

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
    placed = with_device(settings)
    model = open_model(placed)
    report("model", model)
    check_widths(settings, model)
    stream = open_stream(placed, model, settings.trainer.seed)

    if newest is not None:
        sae = SparseDictionary.from_pretrained(newest, fold_activation_scale=False, device=placed.sae.device)
    else:
        sae = start_dictionary(placed, stream, model, report, folder)
    sae.provenance = provenance(settings, model)
    table = {"versions": versions(), **settings.as_dict()}
    write_json(folder / "settings.json", table)

    trainer = Trainer(settings.trainer, loggers=[*loggers, *_configured_loggers(settings, table)], settings=table, resume=resume)
    trainer.fit(sae, stream, _evaluation_during_training(placed, model) if settings.eval else None)
    report("stream", stream)
    if settings.fold_activation_scale and sae.cfg.norm_activation in {"dataset-wise", "batch-wise"}:
        sae.fold_activation_scale()
    sae.save_pretrained(folder)
    if settings.eval:
        results = evaluate_dictionary(sae, settings.eval_config, placed, model)
        write_json(folder / "evaluation.json", results)
        report("evaluation", results)
    return sae


def evaluate_sae(settings: EvaluateSAESettings) -> dict[str, dict[str, Any]]:
    """Evaluate a saved dictionary on the settings' text; `{"sae": metrics, "pca-<k>": metrics}`."""
    device_settings = with_device(settings)
    model = open_model(device_settings)
    check_widths_of(settings.activation_factory, model)
    reference = device_settings.sae
    sae = SparseDictionary.from_pretrained(
        reference.pretrained_name_or_path,
        fold_activation_scale=settings.fold_activation_scale and reference.fold_activation_scale,
        strict_loading=reference.strict_loading,
        device=reference.device,
    )
    return evaluate_dictionary(sae, settings.eval, device_settings, model)


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
    )
    return ActivationFactory(factory).process(model=model, model_name=settings.model_name, datasets=datasets, seed=seed)


def evaluate_dictionary(sae: SparseDictionary, cfg: EvalConfig, settings: Settings, model: LanguageModel | None) -> dict[str, dict[str, Any]]:
    """The dictionary's metrics on held-out text, and those of the baselines that the config names, on the same text."""
    results = {"sae": Evaluator(cfg).evaluate(sae, evaluation_stream(settings, model), model=model)}
    if cfg.baseline_pca is not None:
        fitting = open_stream(settings, model, seed=1)
        baseline = PCABaseline(cfg.baseline_pca, sae.cfg.hooks_out[0]).fit(fitting, n_tokens=min(200_000, cfg.total_eval_tokens))
        results[f"pca-{cfg.baseline_pca}"] = Evaluator(cfg).evaluate(baseline, evaluation_stream(settings, model), model=model)
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
        return SparseDictionary.from_pretrained(
            settings.sae.pretrained_name_or_path,
            fold_activation_scale=settings.sae.fold_activation_scale,
            strict_loading=settings.sae.strict_loading,
            device=settings.sae.device,
        )
    initializer = Initializer(settings.initializer or InitializerConfig())
    sae = initializer.initialize_sae_from_config(settings.sae, stream, model=model, seed=settings.trainer.seed)
    if folder is not None:
        write_json(folder / "initialization.json", initializer.report.as_dict())
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


def check_widths(settings: TrainSAESettings, model: LanguageModel | None) -> None:
    """The hook points exist and have the width of the dictionary."""
    if model is None:
        return
    check_widths_of(settings.activation_factory, model)
    if isinstance(settings.sae, SAEConfig):
        for hook in settings.sae.associated_hook_points:
            width = model.hook_width(hook)
            if width != settings.sae.d_model:
                raise HookPointError(f"d_model is {settings.sae.d_model}, but '{hook}' is {width} wide; set sae.d_model = {width}")


def check_widths_of(factory: ActivationFactoryConfig, model: LanguageModel | None) -> None:
    """The hook points exist."""
    if model is not None:
        for hook in factory.hook_points:
            model.hook_width(hook)


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


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Replace a JSON file, whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(table, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions that a run's results depend on."""
    from importlib.metadata import version

    return {"lm_saes": __version__, "torch": torch.__version__, "transformers": version("transformers"), "python": platform.python_version()}


def settings_of_run(folder: str | Path) -> TrainSAESettings:
    """The settings that a run's folder was made with.

    Raises:
        ConfigError: the folder holds no run, or its settings are not readable.
    """
    from lm_saes.config.base import validated

    path = Path(folder) / "settings.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a run's folder: there is no settings.json in it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    table.pop("versions", None)
    return validated(TrainSAESettings, table, origin=str(path))


def load_run(folder: str | Path, device: str = "auto") -> tuple[SparseDictionary, TrainSAESettings, LanguageModel | None]:
    """A run's finished dictionary, its settings and its language model."""
    settings = with_device(settings_of_run(folder).replace(device_type=device))
    sae = SparseDictionary.from_pretrained(folder, device=settings.sae.device)
    return sae, settings, open_model(settings)


__all__ = ["evaluate_sae", "load_run", "settings_of_run", "train_sae"]
