"""What the commands of `lm-saes` print around the jobs of `lm_saes.runners`."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lm_saes import display
from lm_saes.analysis.features import Feature, find_features, pick
from lm_saes.assembly import evaluation_stream
from lm_saes.baselines import check_trained, evaluate_baselines
from lm_saes.comparison import Row, caption, compare, comparison_table
from lm_saes.config import EvalConfig, EvaluateSAESettings, StreamSettings, SweepSAESettings, TrainSAESettings, load_settings
from lm_saes.config.base import validated
from lm_saes.config.dictionaries import CONFIG_FILE
from lm_saes.config.sweep import SWEEP_FILE
from lm_saes.errors import ConfigError, NonFiniteError
from lm_saes.estimate import estimate, size
from lm_saes.estimate_sweep import OF_EACH_RUN, estimate_sweep
from lm_saes.inspection.command import advice_for
from lm_saes.locks import LOCK_FILE
from lm_saes.records import check_finished, check_same, evaluated_on, settings_of_run
from lm_saes.runners import check_folders, evaluate_dictionary, evaluate_sae, load_run, train_sae
from lm_saes.sweep import check_folder, settings_of_sweep, sweep_sae
from lm_saes.training import loggers
from lm_saes.training.board import Board
from lm_saes.training.run_folder import RunFolder, write_json

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel

FEATURE_TOKENS = 200_000
"""Tokens of the evaluation's text searched for contexts of features."""
SHOWN = 6
NO_TEXT = "this run was trained without a language model, so there is no text to show; set `model` and `eval_datasets` in its settings.json"


RUN_FILES = (
    "settings.json",
    "initialization.json",
    "metrics.jsonl",
    "config.json",
    "sae_weights.safetensors",
    "evaluation.json",
    "features.json",
    "failure.json",
    LOCK_FILE,
    f"{LOCK_FILE}.json",
)
"""What a run leaves in its folder, beside `checkpoints/`."""


def demo(settings: TrainSAESettings, again: bool = False, changed: bool = False) -> None:
    """Train, evaluate, show; a finished demo is only shown again (unless settings were `changed`), an interrupted one goes on."""
    terminal = display.console()
    folder = Path(settings.trainer.exp_result_path)
    if again and folder.is_dir():
        with RunFolder(folder).owned():
            remove_run(folder)
    if (folder / ("evaluation.json" if settings.eval else CONFIG_FILE)).is_file():
        if changed:
            check_same(settings, folder)
        terminal.print(Text(f"{folder} holds a finished demo; lm-saes demo --again trains it anew\n", style="dim"), soft_wrap=True)
        show_run(folder, SHOWN, terminal)
    else:
        train_with_bar(settings, True, terminal)  # a folder without a checkpoint is a fresh start
        show_features(folder, SHOWN, terminal)


def remove_run(folder: Path) -> None:
    """Remove what a run left in its folder, and the folder if nothing else is in it.

    Raises:
        ConfigError: the folder holds no run, so nothing is removed.
    """
    settings_of_run(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path in [*(folder / name for name in RUN_FILES), *folder.glob("nonfinite_step_*.safetensors")]:
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def train(settings: TrainSAESettings, resume: bool = False, allow_changes: Sequence[str] = ()) -> None:
    """Train with a progress bar, and name the command that shows the result."""
    terminal = display.console()
    train_with_bar(settings, resume, terminal, allow_changes)
    _hint(terminal, "look at it:", "lm-saes", "show", settings.trainer.exp_result_path)


def train_with_bar(settings: TrainSAESettings, resume: bool, terminal: display.Terminal, allow_changes: Sequence[str] = ()) -> None:
    """Train with a progress bar and say what is known when it is known."""
    start = time.monotonic()
    terminal.print(display.rows_table(display.summary_rows(settings.as_dict())))

    def report(name: str, value: Any) -> None:
        if name == "initialization":
            terminal.print(Text("\ninitialisation", style="bold"))
            terminal.print(display.rows_table(value.rows()))
            terminal.print()
        elif name == "stream":
            terminal.print(Text(value.description(), style="dim"))
        elif name == "evaluation":
            _print_evaluation(value, settings, terminal)

    train_sae(settings, resume=resume, allow_changes=allow_changes, loggers=[loggers.Console(terminal)], report=report)
    minutes = (time.monotonic() - start) / 60
    terminal.print(Text(f"\nfinished in {minutes:.1f} min: {settings.trainer.exp_result_path}", style="bold"), soft_wrap=True)


def _print_evaluation(results: dict[str, Any], settings: StreamSettings, terminal: display.Terminal) -> None:
    """The metrics under a heading that says what they were measured on."""
    on = evaluated_on(settings)
    seen = "" if on == "held-out text" else "  (eval_datasets names other text)"
    terminal.print(Text(f"\nevaluation on {on}", style="bold").append(seen, style="dim"))
    terminal.print(display.evaluation_table(results))


def _hint(terminal: display.Terminal, label: str, *words: str) -> None:
    """A command to copy; never broken into lines."""
    terminal.print(Text.assemble(f"\n{label}  ", (shlex.join(words), "cyan")), soft_wrap=True)


def sweep(settings: SweepSAESettings, resume: bool = False, allow_changes: Sequence[str] = ()) -> None:
    """Train all runs of a sweep and print what they came to, side by side."""
    terminal = display.console()
    start = time.monotonic()
    members = settings.members()
    terminal.print(display.rows_table(sweep_rows(settings, members)))
    terminal.print()
    board = Board(terminal)
    waiting = terminal.status(f"initialising {len(members)} dictionaries")
    evaluated = 0

    def report(member: TrainSAESettings, name: str, value: Any) -> None:
        nonlocal evaluated
        if name == "model":
            waiting.start()
        elif name == "initialization":
            terminal.print(Text.assemble(f"{member.sae_name}  ", (dict(value.rows())["at the start"], "dim")), soft_wrap=True)
        elif name == "begin":
            waiting.stop()
        elif name == "stream":
            terminal.print(Text(value.description(), style="dim"))
            waiting.update("evaluating")
            waiting.start()
        elif name == "evaluation":
            evaluated += 1
            waiting.update(f"evaluating: {evaluated} of {len(members)}")

    try:
        sweep_sae(settings, resume=resume, allow_changes=allow_changes, loggers=lambda member: [board.logger(member.sae_name)], report=report)
    finally:
        waiting.stop()
    rows = compare(members)
    show_comparison(rows, terminal)
    minutes = (time.monotonic() - start) / 60
    terminal.print(Text(f"\n{len(members)} runs in {minutes:.1f} min: {settings.exp_result_path}", style="bold"), soft_wrap=True)
    finished = [row for row in rows if row.error is None]
    if not finished:
        raise NonFiniteError(f"every run was stopped; the first: {rows[0].error}")
    _hint(terminal, "look at the first:", "lm-saes", "show", finished[0].folder)


def sweep_rows(settings: SweepSAESettings, members: Sequence[TrainSAESettings]) -> list[tuple[str, str]]:
    """What is swept over what."""
    common = [row for row in display.summary_rows(members[0].as_dict()) if row[0] in ("model", "text", "activations")]
    tokens = dict.fromkeys(f"{member.trainer.total_training_tokens:,}" for member in members)
    return [
        *common,
        ("hook points", ", ".join(settings.hook_points)),
        ("dictionaries", f"{len(members)} on one stream"),
        ("tokens", ", ".join(tokens)),
    ]


def show_comparison(rows: Sequence[Row], terminal: display.Terminal) -> None:
    """The runs of a sweep side by side, and what stopped those that were stopped."""
    terminal.print()
    terminal.print(comparison_table(rows, marked=terminal.marked))
    for row in rows:
        if row.error is not None:
            terminal.print(Text.assemble(("\nstopped: ", "bold red"), f"{row.name}: {row.error}"), soft_wrap=True)
    terminal.print(Text(f"\n{caption(rows)}", style="dim"))


def dry_run(settings: TrainSAESettings, resume: bool = False, allow_changes: Sequence[str] = ()) -> None:
    """Print what a run would need and take."""
    check_folders([settings], resume, allow_changes)
    terminal = display.console()
    terminal.print(display.rows_table(display.summary_rows(settings.as_dict())))
    with terminal.status("measuring for twenty seconds"):
        result = estimate(settings)
        advice = advice_for(settings) if result.fits else None
    terminal.print()
    terminal.print(display.rows_table(result.rows()))
    if advice is not None:
        terminal.print()
        terminal.print(advice)
    terminal.print(Text(f"\n{result.verdict()}", style="bold green" if result.fits else "bold red"), soft_wrap=True)


def dry_run_of_sweep(settings: SweepSAESettings, resume: bool = False, allow_changes: Sequence[str] = ()) -> None:
    """Print the runs of a sweep, and what they would need and take together."""
    members = settings.members()
    check_folder(settings, resume)
    check_folders(members, resume, allow_changes)
    terminal = display.console()
    terminal.print(display.rows_table(sweep_rows(settings, members)))
    with terminal.status("measuring for twenty seconds"):
        result, each = estimate_sweep(settings)
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for title in ("parameters", "memory", "steps"):
        table.add_column(title, justify="right", no_wrap=True)
    for member, one in zip(members, each, strict=True):
        table.add_row(member.sae_name, f"{one.parameters:,}", size(one.memory[OF_EACH_RUN]), f"{one.steps:,}")
    terminal.print()
    terminal.print(table)
    terminal.print()
    terminal.print(display.rows_table(result.rows()))
    terminal.print(Text(f"\n{result.verdict()}", style="bold green" if result.fits else "bold red"), soft_wrap=True)


def evaluate(target: Path, overrides: dict[str, Any], baselines: Sequence[str] = ()) -> None:
    """Evaluate a run's folder or a settings file, and baselines beside it, and print the table."""
    terminal = display.console()
    pca, trained = "pca" in baselines, [name for name in baselines if name != "pca"]
    if target.is_dir():
        settings = settings_of_run(target)
        cfg = _evaluation_config(settings, overrides)
        check_trained(target, trained)
        sae, settings, model = load_run(target)
        with terminal.status("evaluating"):
            results = evaluate_dictionary(sae, cfg, settings, model, pca) | evaluate_baselines(target, trained, cfg)
        write_json(target / "evaluation.json", results)
        _print_evaluation(results, settings, terminal)
    else:
        if trained:
            raise ConfigError(f"--baseline {trained[0]} stands beside a run; give the run's folder instead of a settings file")
        settings = load_settings(EvaluateSAESettings, target, overrides)
        with terminal.status("evaluating"):
            results = evaluate_sae(settings, baseline=pca)
        terminal.print(display.evaluation_table(results))
    terminal.print(Text("\nexplained variance: 1 - Σ‖x - x̂‖² / Σ‖x - mean x‖² over the kept tokens, in float64", style="dim"))


def _evaluation_config(settings: TrainSAESettings, overrides: dict[str, Any]) -> EvalConfig:
    """The evaluation of a run as its settings say, with `--eval.*` laid over it."""
    table = overrides.get("eval", {})
    strangers = [f"--{name}" for name in overrides if name != "eval"] if isinstance(table, dict) else ["--eval without a field"]
    if strangers:
        raise ConfigError(f"a run is evaluated with its own settings; only --eval.FIELD can be overridden, got {', '.join(strangers)}")
    return validated(EvalConfig, {**settings.eval_config.as_dict(), **table}, origin="--eval")


def show_run(run: Path, n: int = SHOWN, terminal: display.Terminal | None = None) -> None:
    """A run's summary, its evaluation and a handful of features; the features are kept in `features.json` for the next time. Of a sweep, its runs
    side by side."""
    _at_least_one("--n", n)
    terminal = terminal or display.console()
    if (run / SWEEP_FILE).is_file():
        show_comparison(compare(settings_of_sweep(run).members()), terminal)
        return
    settings = settings_of_run(run)
    check_finished(run)
    terminal.print(display.rows_table(display.summary_rows(settings.as_dict())))
    results = display.read_json(run / "evaluation.json")
    if results:
        _print_evaluation(results, settings, terminal)
    show_features(run, n, terminal)


def show_features(run: Path, n: int, terminal: display.Terminal) -> None:
    """A handful of a run's features, and the command that shows more of one; where the run has no language model, why there are none."""
    settings = settings_of_run(run)
    if settings.model is None:
        terminal.print(Text(f"\nno features: {NO_TEXT}", style="dim"))
        return
    with terminal.status("reading text"):
        features = features_of_run(run, n)
    where = evaluated_on(settings)
    firing = "in « » the token it fires hardest on" if terminal.marked else "the warmer a token, the harder it fires on it"
    terminal.print(Text("\nfeatures", style="bold").append(f"  and where each fires in {where}: {firing}", style="dim"))
    for feature in features:
        terminal.print()
        terminal.print(Padding(display.feature_card(feature, terminal.width - 2, marked=terminal.marked), (0, 0, 0, 1)))
    _hint(terminal, "more of one:", "lm-saes", "show", "feature", str(run), str(features[0].index))


def show_feature(run: Path, index: int, n: int = 10, tokens: int = FEATURE_TOKENS) -> None:
    """The strongest contexts of one latent."""
    _at_least_one("--n", n)
    _at_least_one("--tokens", tokens)
    terminal = display.console()
    sae, settings, model = load_run(run)
    if not 0 <= index < sae.cfg.d_sae:
        raise ConfigError(f"feature {index} does not exist: the dictionary has features 0 to {sae.cfg.d_sae - 1}")
    model = _needed(model)
    with terminal.status("reading text"):
        finder = find_features(sae, evaluation_stream(settings, model), tokens, n)
    feature = finder.feature(index, model.token_texts)
    terminal.print(display.feature_card(feature, terminal.width - 1, n, marked=terminal.marked))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}")


def _needed(model: LanguageModel | None) -> LanguageModel:
    if model is None:
        raise ConfigError(NO_TEXT)
    return model


def features_of_run(run: Path, n: int) -> list[Feature]:
    """A handful of features: those kept in `features.json` where as many were asked for, or found now and kept there."""
    saved = display.read_json(run / "features.json") or {}
    if saved.get("n") == n:
        with suppress(KeyError, TypeError, ValueError):  # of another version, or not ours: found again
            return [Feature.from_dict(table) for table in saved["features"]]
    sae, settings, model = load_run(run)
    model = _needed(model)
    finder = find_features(sae, evaluation_stream(settings, model), FEATURE_TOKENS)
    features = [finder.feature(index, model.token_texts) for index in pick(finder, n)]
    write_json(run / "features.json", {"n": n, "features": [feature.as_dict() for feature in features]})
    return features
