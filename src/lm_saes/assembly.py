"""From settings to objects: the language model, the streams, the dictionary; and whether they fit together."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lm_saes.activations.factory import ActivationFactory
from lm_saes.activations.foreign_cache import open_activations
from lm_saes.config import (
    ActivationFactoryActivationsSource,
    ActivationFactoryDatasetSource,
    ActivationFactoryTarget,
    DatasetConfig,
    EvaluateSAESettings,
    InitializerConfig,
    PretrainedSAE,
    SAEConfig,
    StreamSettings,
    TrainSAESettings,
)
from lm_saes.config.base import BaseModelConfig
from lm_saes.errors import ConfigError, HookPointError
from lm_saes.lm.language_model import LanguageModel, load_model
from lm_saes.models.initializer import Initializer
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training.nonfinite import finite_batches

if TYPE_CHECKING:
    from lm_saes.activations.factory import ActivationStream
    from lm_saes.activations.stored import StoredActivations
    from lm_saes.models.initialization_report import InitializationReport

log = logging.getLogger("lm_saes")

FOLDABLE = ("dataset-wise", "batch-wise")
"""The normalisations whose scale is a constant after training, so that it can be folded into the weights."""

EVALUATION_ROWS = 8
"""Contexts in one batch of an evaluation: small enough for any machine, large enough to keep it busy."""


def with_device(settings: Any) -> Any:
    """The settings with `device_type` given to the language model and the dictionary, unless they name a device of their own."""
    from lm_saes.devices import resolve_device

    name = str(resolve_device(settings.device_type))

    def placed(config: BaseModelConfig | None) -> BaseModelConfig | None:
        if config is None or ("device" in config.model_fields_set and config.device != "auto"):
            return config
        return config.replace(device=name)

    return settings.replace(model=placed(settings.model), sae=placed(settings.sae))


def open_model(settings: StreamSettings) -> LanguageModel | None:
    """The language model of the settings, if they name one."""
    return None if settings.model is None else load_model(settings.model)


def open_stream(settings: StreamSettings, model: LanguageModel | None, seed: int) -> ActivationStream:
    """The training stream of the settings."""
    datasets = {source.name: settings.dataset(source.name) for source in settings.activation_factory.sources}
    return ActivationFactory(settings.activation_factory).process(model=model, model_name=settings.model_name, datasets=datasets, seed=seed)


def evaluation_stream(settings: StreamSettings, model: LanguageModel | None, seed: int = 0) -> ActivationStream:
    """The settings' text in context (2D), from its held-out side where there is one: `eval_datasets`, or the demo corpus's own split. Sources that are
    activations on disk are evaluated on text too, where the settings name some for them and have a model; else on what is on the disk."""
    held_out: dict[str, DatasetConfig] = getattr(settings, "eval_datasets", None) or {}
    named = {**(settings.datasets or {}), **held_out} if model is not None else {}
    factory, datasets, sources = settings.activation_factory, {}, []
    for source in factory.sources:
        if isinstance(source, ActivationFactoryActivationsSource):
            if source.name not in named:
                log.info("evaluating on the activations of '%s' themselves: the settings name no text for it, or no model", source.name)
                sources.append(source)
                continue
            source = ActivationFactoryDatasetSource(name=source.name, sample_weights=source.sample_weights)
        datasets[source.name] = settings.evaluation_dataset(source.name)
        sources.append(source)
    on_disk = stored_activations(settings)
    in_context = datasets or all(stored.sequences for stored in on_disk)
    factory = factory.replace(
        sources=sources,
        context_size=factory.context_size or next((stored.context_size for stored in on_disk if stored.context_size), None),
        target=ActivationFactoryTarget.ACTIVATIONS_2D if in_context else ActivationFactoryTarget.ACTIVATIONS_1D,
        batch_size=EVALUATION_ROWS if in_context else factory.batch_size,
        model_batch_size=EVALUATION_ROWS,
        buffer_size=None,
        buffer_shuffle=None,
        max_buffer_bytes=None,
    )
    return ActivationFactory(factory).process(model=model, model_name=settings.model_name, datasets=datasets, seed=seed)


def stored_activations(settings: StreamSettings) -> list[StoredActivations]:
    """What is on disk at those of the settings' sources that are activations.

    Raises:
        CacheError: nothing is there, or it is not finished, damaged, or lacks a hook point.
    """
    return [
        open_activations(source.path, settings.activation_factory.hook_points, skip_damaged=source.skip_damaged)
        for source in settings.activation_factory.sources
        if isinstance(source, ActivationFactoryActivationsSource)
    ]


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


def first_batches(settings: TrainSAESettings, stream: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What dictionaries that are trained together are initialised from: the start of their stream, as long as each asks for."""
    n = 0 if isinstance(settings.sae, PretrainedSAE) else (settings.initializer or InitializerConfig()).n_batches
    return list(itertools.islice(_finite(settings, stream), n))


def start_dictionary(
    settings: TrainSAESettings,
    stream: Iterable[dict[str, Any]],
    model: LanguageModel | None,
    report: Callable[[InitializationReport], None] | None = None,
) -> SparseDictionary:
    """A fresh dictionary: initialised from the start of the stream, or loaded from saved weights (fine-tuning). `report` gets what was measured."""
    if isinstance(settings.sae, PretrainedSAE):
        return load_dictionary(settings.sae)
    initializer = Initializer(settings.initializer or InitializerConfig())
    sae = initializer.initialize_sae_from_config(settings.sae, _finite(settings, stream), model=model, seed=settings.trainer.seed)
    if report is not None:
        report(initializer.report)
    return sae


def _finite(settings: TrainSAESettings, stream: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """The stream, without the batches that are not finite where the run passes over such."""
    return finite_batches(stream, settings.activation_factory.hook_points, log.warning) if settings.trainer.non_finite == "skip" else stream


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
    for stored in stored_activations(settings):
        for hook in cfg.associated_hook_points:
            if (width := stored.hook_widths[hook]) != cfg.d_model:
                raise HookPointError(f"d_model is {cfg.d_model}, but '{hook}' is {width} wide on disk; set sae.d_model = {width}")
