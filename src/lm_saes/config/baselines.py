"""Baselines: what a run is when one thing that it is said to learn is taken away, everything else being the same.

What a dictionary's scores are worth shows beside those of one that could not learn (arXiv 2602.14111). A baseline is a run
of its own, in the folder `baselines/<name>` of the run that it stands beside; "pca" is none: it is fitted when it is evaluated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_saes.config.activations import ActivationFactoryDatasetSource
from lm_saes.config.base import BaseConfig
from lm_saes.config.dictionaries import SAEConfig
from lm_saes.config.settings import TrainSAESettings
from lm_saes.errors import ConfigError, did_you_mean

TRAINED_BASELINES: dict[str, dict[str, dict[str, Any]]] = {
    # The directions need not be learned? W_D stays as it starts.
    "frozen-decoder": {"trainer": {"frozen": "decoder"}},
    # The selection need not be learned? W_E and b_E stay as they start; nor do decoder norms, which are learned, take part in it.
    "frozen-encoder": {"trainer": {"frozen": "encoder"}, "sae": {"sparsity_include_decoder_norm": False}},
    # Is it the text alone? The same architecture with weights as drawn before training, embeddings included; norms are measured anew.
    "untrained-lm": {"model": {"random_weights": 0}, "sae": {"dataset_average_activation_norm": None}},
}
"""What is laid over a run's settings."""
BASELINES = ("pca", *TRAINED_BASELINES)


def check_baselines(names: list[str], known: tuple[str, ...] = BASELINES) -> list[str]:
    """The names, each once.

    Raises:
        ConfigError: there is no such baseline, or not here.
    """
    for name in names:
        if name not in known:
            here = (
                f" here{'; lm-saes evaluate RUN --baseline pca fits it' if name == 'pca' else ''}."
                if name in BASELINES
                else did_you_mean(name, known) or "."
            )
            raise ConfigError(f"no baseline '{name}'{here} Baselines: {', '.join(known)}")
    return list(dict.fromkeys(names))


def baseline_folder(run: str | Path, name: str) -> Path:
    """Where a baseline of the run in `run` is."""
    return Path(run) / "baselines" / name


def baseline_settings(settings: TrainSAESettings, name: str) -> TrainSAESettings:
    """The settings of a run's baseline.

    Raises:
        ConfigError: there is no such baseline to train, or the run starts from trained weights or from activations on disk, which it cannot have.
    """
    (name,) = check_baselines([name], tuple(TRAINED_BASELINES))
    if not isinstance(settings.sae, SAEConfig) or settings.trainer.from_pretrained_path is not None:
        raise ConfigError(
            f"--baseline {name} starts afresh, but this run starts from trained weights; give a config with the fields of a new dictionary"
        )
    if name == "untrained-lm" and (
        settings.model is None or not all(isinstance(source, ActivationFactoryDatasetSource) for source in settings.activation_factory.sources)
    ):
        raise ConfigError("--baseline untrained-lm needs text and a language model to read it; this run's activations come from disk")
    changed: dict[str, Any] = {"sae_name": f"{settings.sae_name}-{name}"}
    for part, fields in TRAINED_BASELINES[name].items():
        before = getattr(settings, part)
        assert isinstance(before, BaseConfig)
        changed[part] = before.replace(**fields)
    changed |= _reported_apart(settings, name)
    trainer = changed.get("trainer", settings.trainer)
    changed["trainer"] = trainer.replace(exp_result_path=str(baseline_folder(settings.trainer.exp_result_path, name)))
    return settings.replace(**changed)


def _reported_apart(settings: TrainSAESettings, name: str) -> dict[str, BaseConfig]:
    """Where a baseline's metrics go: beside those of its run, not among them."""
    changed: dict[str, BaseConfig] = {}
    if (wandb := settings.wandb) is not None:
        run_id = wandb.wandb_run_id and f"{wandb.wandb_run_id}-{name}"
        changed["wandb"] = wandb.replace(exp_name=f"{wandb.exp_name or settings.sae_name}-{name}", wandb_run_id=run_id)
    if (trackio := settings.trackio) is not None:
        changed["trackio"] = trackio.replace(name=f"{trackio.name or settings.sae_name}-{name}")
    if (tensorboard := settings.tensorboard) is not None and tensorboard.log_dir is not None:
        changed["tensorboard"] = tensorboard.replace(log_dir=str(Path(tensorboard.log_dir) / name))
    return changed


def baseline_of(settings: TrainSAESettings) -> str | None:
    """Which baseline a run is, whoever wrote its settings."""
    if settings.trainer.frozen is not None:
        return f"frozen-{settings.trainer.frozen}"
    return "untrained-lm" if settings.model is not None and settings.model.random_weights is not None else None
