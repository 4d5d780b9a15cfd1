"""The jobs: train and evaluate a dictionary from settings. Thin on purpose: each step is one call into a room below.

`train_together` in order: the runs' folders are checked, the language model loaded, the stream opened, the joints between them checked; each
dictionary is initialised from the start of the stream (or loaded, or restored from a checkpoint); all are trained on the same batches,
folded, saved, and, if asked for, evaluated on held-out text. `train_sae` is the case of one; `lm_saes.sweep` of many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_saes.assembly import (
    FOLDABLE,
    check_joints,
    evaluation_stream,
    first_batches,
    load_dictionary,
    open_model,
    open_stream,
    start_dictionary,
    with_device,
)
from lm_saes.config import EvalConfig, EvaluateSAESettings, PretrainedSAE, StreamSettings, TrainSAESettings
from lm_saes.errors import NonFiniteError
from lm_saes.estimate_sweep import fitted
from lm_saes.evaluation.evaluator import Evaluator, Metrics
from lm_saes.evaluation.pca import PCABaseline
from lm_saes.lm.language_model import LanguageModel
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.records import check_finished, check_same, provenance, settings_of_run, settings_record
from lm_saes.training.checkpoint import Checkpoint, find_checkpoint, load_weights, newest_checkpoint, read_checkpoint, read_state
from lm_saes.training.loggers import TensorBoardLogger, TrackioLogger, WandbLogger
from lm_saes.training.loop import train
from lm_saes.training.resume import NO_CHECKPOINT, check_allowed, discard_newer, newest_moment
from lm_saes.training.run import Run
from lm_saes.training.run_folder import RunFolder, disk_errors, failure_of, write_failure, write_json

if TYPE_CHECKING:
    from lm_saes.models.initialization_report import InitializationReport
    from lm_saes.training.loggers import Logger

TOKENS_DURING_TRAINING = 50_000
"""Tokens of the evaluations inside a training."""

Report = Callable[[TrainSAESettings, str, Any], None]
"""Gets to know, for a run, what is known by name: "model", "initialization", "begin" (of training), "stream", "evaluation"."""


class Outcome(NamedTuple):
    """What became of one run."""

    settings: TrainSAESettings
    sae: SparseDictionary | None
    """The finished dictionary; `None` if the run was stopped."""
    error: NonFiniteError | None
    """What stopped it."""


def train_sae(
    settings: TrainSAESettings,
    *,
    resume: bool = False,
    allow_changes: Sequence[str] = (),
    loggers: Sequence[Logger] = (),
    report: Callable[[str, Any], None] | None = None,
) -> SparseDictionary:
    """Train an SAE or a transcoder and leave a run's folder at `settings.trainer.exp_result_path`.

    Args:
        settings: What to train, on what, how.
        resume: Go on from the newest whole checkpoint in the folder, or start afresh when it is empty.
        allow_changes: Settings that may differ from those that the run was begun with, such as "trainer.total_training_tokens".
        loggers: Where metrics go beside `metrics.jsonl` and what the settings name.
        report: Called with a name and a value as things become known: "model", "initialization", "begin" (of training), "stream",
            "evaluation".

    Returns:
        The finished dictionary, folded (unless the settings say otherwise) and in eval mode.

    Raises:
        LmSaesError: anything a user can mend; nothing is left half-written.
    """
    tell = report or (lambda _name, _value: None)
    (outcome,) = train_together(
        [settings], resume=resume, allow_changes=allow_changes, loggers=[loggers], report=lambda _, name, value: tell(name, value)
    )
    if outcome.sae is None:
        assert outcome.error is not None
        raise outcome.error
    return outcome.sae


def train_together(
    members: Sequence[TrainSAESettings], *, resume: bool, loggers: Sequence[Sequence[Logger]], report: Report, allow_changes: Sequence[str] = ()
) -> list[Outcome]:
    """Train dictionaries on one stream, each in a run's folder of its own. Each becomes what it would have become alone.

    Args:
        members: Settings that differ in nothing that the stream is made of (see `SweepSAESettings.members`).
        resume: Go on from the newest moment of which all have a whole checkpoint; afresh where there is none.
        allow_changes: Settings that may differ from those that the runs were begun with.
        loggers: For each member, where metrics go beside `metrics.jsonl` and what the settings name.

    Raises:
        LmSaesError: anything a user can mend, but for a number that is not finite: that stops one run, and its outcome says so.
    """
    allowed = check_allowed(allow_changes)
    with ExitStack() as owned:
        killed = [owned.enter_context(RunFolder(_folder(settings)).owned()) for settings in members]
        notes = [
            [f"{_folder(settings)} is taken over from {owner}, which was killed"] if owner else []
            for settings, owner in zip(members, killed, strict=True)
        ]
        return _train(members, resume, loggers, report, allowed, notes)


def _train(
    members: Sequence[TrainSAESettings],
    resume: bool,
    loggers: Sequence[Sequence[Logger]],
    report: Report,
    allowed: list[str],
    notes: list[list[str]],
) -> list[Outcome]:
    """`train_together`, in folders that are ours. `notes` are lines for a person, for each run."""
    several = len(members) > 1
    failures = {index: failure for index, settings in enumerate(members) if resume and several and (failure := failure_of(_folder(settings)))}
    errors = {index: NonFiniteError(failure) for index, failure in failures.items()}
    going = {index: settings for index, settings in enumerate(members) if index not in errors}
    checkpoints, found = _open_folders(list(going.values()), resume, allowed)
    checkpoints, found = dict(zip(going, checkpoints, strict=True)), dict(zip(going, found, strict=True))
    placed = {index: with_device(settings) for index, settings in going.items()}
    model = open_model(with_device(members[0]))
    for settings in members:
        check_joints(settings, model)
    fitting, cut = fitted([_as_begun(settings, checkpoints[index]) for index, settings in going.items()], model)
    micro_batches = {index: settings.trainer.gradient_accumulation_steps for index, settings in zip(going, fitting, strict=True)}
    report(members[0], "model", model)
    stream = open_stream(with_device(members[0]), model, members[0].data_seed)
    configured = {index: [*loggers[index], *_configured_loggers(settings, several)] for index, settings in going.items()}

    runs: dict[int, Run] = {}
    start = stream if len(going) == 1 or any(checkpoints.values()) else first_batches(members[0], stream)
    bearer = max(going, key=lambda index: _step(checkpoints[index]), default=None)  # of one moment, so one is read with the stream's state
    for index, settings in placed.items():
        try:
            sae, checkpoint = _dictionary(settings, start, model, checkpoints[index], report, with_stream=index == bearer)
        except NonFiniteError as error:
            errors[index] = error
            if several:
                write_failure(_folder(settings), 0, error)
            continue
        table = settings_record(members[index])
        sae.provenance = provenance(members[index], model)
        _write(_folder(settings) / "settings.json", table)
        eval_fn = _evaluation_during_training(settings, model) if settings.eval else None
        trainer, said = settings.trainer, [*notes[index], *found[index]]
        if micro_batches[index] != trainer.gradient_accumulation_steps:  # else it stays unset where nobody set it: `_as_begun` looks at that
            trainer = trainer.replace(gradient_accumulation_steps=micro_batches[index])
            said += [cut] if cut else []
        runs[index] = Run(sae, trainer, loggers=configured[index], settings=table, checkpoint=checkpoint, notes=said, eval_fn=eval_fn)
    del start
    if runs:
        report(members[0], "begin", None)
        train(list(runs.values()), stream)
        report(members[0], "stream", stream)
    errors |= {index: run.error for index, run in runs.items() if run.error is not None}
    finished = {index: run.sae for index, run in runs.items() if run.error is None}
    runs.clear()  # and with them the optimizers
    for index, sae in finished.items():
        _save(sae, members[index])
    known: dict[tuple[str, int], Metrics] = {}
    for index, sae in finished.items():
        if placed[index].eval:
            results = evaluate_dictionary(sae, placed[index].eval_config, placed[index], model, baselines=known)
            write_json(_folder(members[index]) / "evaluation.json", results)
            report(members[index], "evaluation", results)
    return [Outcome(settings, finished.get(index), errors.get(index)) for index, settings in enumerate(members)]


def _folder(settings: TrainSAESettings) -> Path:
    return Path(settings.trainer.exp_result_path)


def _open_folders(members: Sequence[TrainSAESettings], resume: bool, allowed: list[str]) -> tuple[list[Path | None], list[list[str]]]:
    """For each run the checkpoint to go on from, all of one moment, and what is to be said about it; `None` for all where none is to be gone
    on from."""
    folders = [RunFolder(_folder(settings)) for settings in members]
    for folder in folders:
        folder.open(resume)
    moment = newest_moment([settings.trainer for settings in members])
    if moment.checkpoints is None:
        for settings in members:
            _check_start(settings)
        return [None] * len(members), [[NO_CHECKPOINT.format(folder.path)] if folder.begun else [] for folder in folders]
    notes: list[list[str]] = []
    for settings, checkpoint in zip(members, moment.checkpoints, strict=True):
        changes = check_same(settings, _folder(settings), allowed)
        if changes:
            discard_newer(checkpoint)
        notes.append([*moment.notes, *changes])
    return [*moment.checkpoints], notes


def check_folders(members: Sequence[TrainSAESettings], resume: bool, allow_changes: Sequence[str]) -> None:
    """What `train_together` would say of the runs' folders. Touches nothing.

    Raises:
        LmSaesError: they cannot be used, or not with these settings; or the checkpoint that a run is to start from is not there.
    """
    allowed = check_allowed(allow_changes)
    for settings in members:
        RunFolder(_folder(settings)).check(resume)
        if resume and newest_checkpoint(_folder(settings)) is not None:
            check_same(settings, _folder(settings), allowed)
        else:
            _check_start(settings)


def _check_start(settings: TrainSAESettings) -> None:
    """The checkpoint whose weights a run starts from is there."""
    if settings.trainer.from_pretrained_path is not None:
        find_checkpoint(settings.trainer.from_pretrained_path)


def _step(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step_"))


def _dictionary(
    settings: TrainSAESettings,
    start: Iterable[dict[str, Any]],
    model: LanguageModel | None,
    folder: Path | None,
    report: Report,
    with_stream: bool,
) -> tuple[SparseDictionary, Checkpoint | None]:
    """A run's dictionary as it starts or goes on, and the checkpoint in `folder` that it goes on from."""
    if folder is not None:
        sae = SparseDictionary.from_pretrained(folder, fold_activation_scale=False, device=settings.sae.device)
        return sae, read_checkpoint(folder, with_stream)

    def initialized(measured: InitializationReport) -> None:
        _write(_folder(settings) / "initialization.json", measured.as_dict())
        report(settings, "initialization", measured)

    sae = start_dictionary(settings, start, model, initialized)
    if settings.trainer.from_pretrained_path is not None:
        load_weights(sae, find_checkpoint(settings.trainer.from_pretrained_path))
    return sae, None


def _as_begun(settings: TrainSAESettings, checkpoint: Path | None) -> TrainSAESettings:
    """With the micro-batches that a run has had so far, unless they are set: however much memory there is today, others would round differently."""
    if checkpoint is None or "gradient_accumulation_steps" in settings.trainer.model_fields_set:
        return settings
    so_far = read_state(checkpoint)["trainer"].get("gradient_accumulation_steps", 1)
    return settings.replace(trainer=settings.trainer.replace(gradient_accumulation_steps=so_far))


def _save(sae: SparseDictionary, settings: TrainSAESettings) -> None:
    """The finished dictionary, folded, in the run's folder."""
    if settings.fold_activation_scale and sae.cfg.norm_activation in FOLDABLE:
        sae.fold_activation_scale()
    with disk_errors(settings.trainer.exp_result_path):
        sae.save_pretrained(settings.trainer.exp_result_path)


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


def evaluate_dictionary(
    sae: SparseDictionary,
    cfg: EvalConfig,
    settings: StreamSettings,
    model: LanguageModel | None,
    baseline: bool = False,
    baselines: dict[tuple[str, int], Metrics] | None = None,
) -> dict[str, dict[str, Any]]:
    """The dictionary's metrics on held-out text, and those of PCA on the same text: of the rank that the config names or, with `baseline`
    and none named, of the dictionary's measured L0. `baselines` keeps the latter, by hook point and rank, for other dictionaries on the same text."""
    metrics = Evaluator(cfg).evaluate(sae, evaluation_stream(settings, model), model=model)
    results: dict[str, dict[str, Any]] = {"sae": metrics}
    rank = cfg.baseline_pca
    if rank is None and baseline:
        rank = min(max(1, round(metrics["metrics/l0"])), sae.cfg.d_model)  # pyright: ignore[reportArgumentType]  # L0 is a number
    if rank is not None:
        hook, known = sae.cfg.hooks_out[0], {} if baselines is None else baselines
        if (hook, rank) not in known:
            pca = PCABaseline(rank, hook).fit(open_stream(settings, model, seed=1), n_tokens=min(200_000, cfg.total_eval_tokens))
            known[hook, rank] = Evaluator(cfg).evaluate(pca, evaluation_stream(settings, model), model=model)
        results[f"pca-{rank}"] = known[hook, rank]
    return results


def _configured_loggers(settings: TrainSAESettings, several: bool) -> list[Logger]:
    """The loggers that the settings name."""
    loggers: list[Logger] = []
    table = settings_record(settings)
    if settings.wandb is not None:
        loggers.append(WandbLogger(settings.wandb, table, beside_others=several))
    if settings.tensorboard is not None:
        loggers.append(TensorBoardLogger(settings.tensorboard, settings.trainer.exp_result_path))
    if settings.trackio is not None:
        loggers.append(TrackioLogger(settings.trackio, table))
    return loggers


def _evaluation_during_training(settings: TrainSAESettings, model: LanguageModel | None) -> Callable[[SparseDictionary], dict[str, Any]]:
    """A smaller evaluation on the same held-out text, for the curve."""
    cfg = settings.eval_config.replace(total_eval_tokens=min(settings.eval_config.total_eval_tokens, TOKENS_DURING_TRAINING))
    return lambda sae: Evaluator(cfg).evaluate(sae, evaluation_stream(settings, model), model=model)


def _write(path: Path, table: dict[str, Any]) -> None:
    """Write a JSON file of a run; the folder is made now, when everything that can be checked was checked."""
    with disk_errors(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table)


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


__all__ = ["Outcome", "check_folders", "evaluate_dictionary", "evaluate_sae", "load_run", "train_sae", "train_together"]
