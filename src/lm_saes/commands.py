"""What the commands of `lm-saes` print around the jobs of `lm_saes.runners`."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lm_saes import display
from lm_saes.analysis.features import Feature, FeatureFinder, find_features, pick
from lm_saes.config import EvalConfig, EvaluateSAESettings, SAEConfig, TrainSAESettings, load_settings
from lm_saes.errors import ConfigError, RunFolderError
from lm_saes.estimate import estimate
from lm_saes.runners import evaluate_dictionary, evaluate_sae, evaluation_stream, load_run, settings_of_run, train_sae, write_json
from lm_saes.training import loggers
from lm_saes.training.checkpoint import newest_checkpoint

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel
    from lm_saes.models.sparse_dictionary import SparseDictionary

FEATURE_TOKENS = 200_000
"""Held-out tokens searched for contexts of features."""
SHOWN = 6


def demo(settings: TrainSAESettings, again: bool = False) -> None:
    """Train, evaluate, show; a finished demo is only shown again, an interrupted one goes on."""
    terminal = display.console()
    folder = Path(settings.trainer.exp_result_path)
    if again and folder.is_dir():
        if not (folder / "settings.json").is_file():
            raise RunFolderError(f"{folder} does not look like a run's folder, so it is not removed; choose another with --out")
        shutil.rmtree(folder)
    if not (folder / "evaluation.json").is_file():
        interrupted = folder.is_dir() and newest_checkpoint(folder) is not None
        if folder.is_dir() and not interrupted and (folder / "settings.json").is_file():
            shutil.rmtree(folder)  # stopped before its first checkpoint: nothing to go on from
        train(settings, resume=interrupted, terminal=terminal)
    else:
        terminal.print(Text(f"{folder} holds a finished demo; lm-saes demo --again trains it anew", style="dim"))
    terminal.print()
    show_run(folder, SHOWN, terminal)


def train(settings: TrainSAESettings, resume: bool = False, terminal: Console | None = None) -> None:
    """Train with a progress bar and say what is known when it is known."""
    terminal = terminal or display.console()
    folder = Path(settings.trainer.exp_result_path)
    start = time.monotonic()
    sae = settings.sae
    if isinstance(sae, SAEConfig):
        terminal.print(display.rows_table(display.summary_rows(settings.as_dict())))

    def report(name: str, value: Any) -> None:
        if name == "initialization":
            terminal.print(Text("\ninitialisation", style="bold"))
            terminal.print(display.rows_table(value.rows()))
            terminal.print()
        elif name == "stream":
            terminal.print(Text(value.description(), style="dim"))
        elif name == "evaluation":
            terminal.print(Text("\nevaluation on held-out text", style="bold"))
            terminal.print(display.evaluation_table(value))

    train_sae(settings, resume=resume, loggers=[loggers.Console(terminal)], report=report)
    minutes = (time.monotonic() - start) / 60
    terminal.print(Text(f"\nfinished in {minutes:.1f} min: {folder}", style="bold"))
    terminal.print(Text.assemble("look at it:  ", (f"lm-saes show {folder}", "cyan")))


def dry_run(settings: TrainSAESettings) -> None:
    """Print what a run would need and take."""
    terminal = display.console()
    terminal.print(display.rows_table(display.summary_rows(settings.as_dict())))
    result = estimate(settings)
    terminal.print()
    terminal.print(display.rows_table(result.rows()))
    terminal.print(Text(f"\n{result.verdict()}", style="bold green" if result.fits else "bold red"))


def evaluate(target: Path, overrides: dict[str, Any], baseline: str | None) -> None:
    """Evaluate a run's folder or a settings file and print the table."""
    terminal = display.console()
    if target.is_dir():
        sae, settings, model = load_run(target)
        table = {**settings.eval_config.as_dict(), **overrides.pop("eval", {})}
        if overrides:
            raise ConfigError(
                f"a run is evaluated with its own settings; only --eval.* can be overridden, got {', '.join('--' + name for name in overrides)}"
            )
        cfg = EvalConfig.model_validate(table)
        if baseline and cfg.baseline_pca is None:
            cfg = cfg.replace(baseline_pca=sae.cfg.top_k)
        results = evaluate_dictionary(sae, cfg, settings, model)
        write_json(target / "evaluation.json", results)
    else:
        settings = load_settings(EvaluateSAESettings, target, overrides)
        if baseline and settings.eval.baseline_pca is None:
            top_k = SAEConfig.from_pretrained(settings.sae.pretrained_name_or_path).top_k
            settings = settings.replace(eval=settings.eval.replace(baseline_pca=top_k))
        results = evaluate_sae(settings)
    terminal.print(display.evaluation_table(results))
    terminal.print(Text("explained variance: 1 - Σ‖x - x̂‖² / Σ‖x - mean x‖² over the kept tokens, in float64", style="dim"))


def show_run(run: Path, n: int = SHOWN, terminal: Console | None = None) -> None:
    """A run's summary, its evaluation and a handful of features; the features are kept in `features.json` for the next time."""
    terminal = terminal or display.console()
    settings = settings_of_run(run)
    terminal.print(display.rows_table(display.summary_rows(settings.as_dict())))
    results = display.read_json(run / "evaluation.json")
    if results:
        terminal.print()
        terminal.print(display.evaluation_table(results))
    features = features_of_run(run, n)
    terminal.print(
        Text("\nfeatures", style="bold").append(
            "  (each line a context of held-out text; the warmer a token, the harder the feature fires on it)", style="dim"
        )
    )
    for feature in features:
        terminal.print()
        terminal.print(Padding(display.feature_card(feature, terminal.width - 2), (0, 0, 0, 1)))
    if features:
        terminal.print(Text.assemble("\nmore of one:  ", (f"lm-saes show feature {run} {features[0].index}", "cyan")))


def show_feature(run: Path, index: int, n: int = 10, tokens: int = FEATURE_TOKENS) -> None:
    """The strongest contexts of one latent."""
    terminal = display.console()
    sae, settings, model = load_run(run)
    if not 0 <= index < sae.cfg.d_sae:
        raise ConfigError(f"feature {index} does not exist: the dictionary has features 0 to {sae.cfg.d_sae - 1}")
    finder = _search(sae, settings, model, tokens, n)
    assert model is not None
    terminal.print(display.feature_card(finder.feature(index, model.token_texts), terminal.width - 1, n))


def _search(sae: SparseDictionary, settings: TrainSAESettings, model: LanguageModel | None, tokens: int, n_contexts: int = 5) -> FeatureFinder:
    if model is None:
        raise ConfigError("this run was trained without a language model, so there is no text to show; set `model` in its settings.json")
    return find_features(sae, evaluation_stream(settings, model), tokens, n_contexts)


def features_of_run(run: Path, n: int) -> list[Feature]:
    """A handful of features: those kept in `features.json`, or found now and kept there."""
    saved = display.read_json(run / "features.json")
    if saved and len(saved["features"]) >= n:
        return [Feature.from_dict(table) for table in saved["features"][:n]]
    sae, settings, model = load_run(run)
    finder = _search(sae, settings, model, FEATURE_TOKENS)
    assert model is not None
    features = [finder.feature(index, model.token_texts) for index in pick(finder, n)]
    write_json(run / "features.json", {"features": [feature.as_dict() for feature in features]})
    return features
