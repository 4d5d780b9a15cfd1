"""`lm-saes compare A B`: two saved dictionaries or runs of the same hook points, side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_saes import display
from lm_saes.analysis.matching import DictionaryMatch, compare_dictionaries
from lm_saes.assembly import load_dictionary, open_model, with_device
from lm_saes.config import PretrainedSAE, TrainSAESettings
from lm_saes.errors import ConfigError
from lm_saes.models.sae import SparseAutoEncoder
from lm_saes.records import settings_of_run
from lm_saes.runners import evaluate_dictionary


def compare(first: Path, second: Path, *, tokens: int | None = None, as_json: bool = False) -> None:
    """Match the latents of two dictionaries, evaluate both on the same held-out text if `tokens` says on how much, and print it.

    Raises:
        WeightsError: a folder holds no dictionary.
        ConfigError: they are of different hook points; or they shall be evaluated, and neither folder is a run's.
    """
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--tokens must be at least 1, got {tokens}")
    names = _names(first, second)
    one, other = _load(first), _load(second)
    settings = _settings(first, second) if tokens is not None else None
    terminal = display.console()
    with display.Terminal(stderr=True).status("comparing"):
        match = compare_dictionaries(one, other)
        evaluation = _evaluate({names[0]: one, names[1]: other}, settings, tokens) if settings is not None and tokens is not None else None
    if as_json:
        table = {"first": str(first), "second": str(second), "match": match.as_dict(), "evaluation": evaluation}
        sys.stdout.write(json.dumps(table, indent=2, ensure_ascii=False) + "\n")
        return
    terminal.print(display.rows_table(rows(match, names)))
    if evaluation is not None:
        terminal.print()
        terminal.print(display.evaluation_table(evaluation))


def rows(match: DictionaryMatch, names: tuple[str, str]) -> list[tuple[str, str]]:
    """Label and value of everything that is known of a match."""

    def both(values: tuple[float, float], percent: bool = False) -> str:
        one, other = (f"{100 * value:.1f} %" if percent else f"{value:.3f}" for value in values)
        return f"{one} of the first, {other} of the second"

    note = "" if match.method == "optimal assignment" else f" of {min(match.latents):,}; the others have no partner, so the means flatter"
    return [
        *((place, f"{name}, {latents:,} latents") for place, name, latents in zip(("first", "second"), names, match.latents, strict=True)),
        ("matched by", f"{match.method} of decoder rows, {match.pairs:,} pairs{note}"),
        ("mean cosine of matched pairs", f"decoder {match.mean_matched_cosine:.3f}, encoder {match.mean_matched_encoder_cosine:.3f}"),
        ("the same feature", f"{100 * match.shared:.1f} % of pairs (decoder and encoder cosine at least 0.7)"),
        ("mean largest cosine", f"{both(match.mean_max_cosine)}; by chance {match.chance:.3f}"),
        *((f"with a partner at {at} or more", both(shares, percent=True)) for at, shares in match.share_with_partner.items()),
    ]


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The folders' last names; as much of the paths as tells them apart."""
    one, other = first.absolute().parts, second.absolute().parts
    for length in range(1, min(len(one), len(other))):
        if one[-length:] != other[-length:]:
            return "/".join(one[-length:]), "/".join(other[-length:])
    return f"{first} (first)", f"{second} (second)"


def _load(path: Path) -> SparseAutoEncoder:
    dictionary = load_dictionary(PretrainedSAE(pretrained_name_or_path=str(path)))
    if not isinstance(dictionary, SparseAutoEncoder):
        raise ConfigError(f"{path} holds a {type(dictionary).__name__}; SAEs and transcoders can be compared")
    return dictionary


def _settings(*folders: Path) -> TrainSAESettings:
    """Settings to evaluate with: those of the first folder that is a run's."""
    for folder in folders:
        if (folder / "settings.json").is_file():
            return settings_of_run(folder)
    raise ConfigError(f"--tokens needs the text and the model of a run, but neither {folders[0]} nor {folders[1]} has a settings.json")


def _evaluate(dictionaries: Mapping[str, SparseAutoEncoder], settings: TrainSAESettings, tokens: int) -> dict[str, dict[str, Any]]:
    """The metrics of both on the same held-out text."""
    placed = with_device(settings)
    model = open_model(placed)
    cfg = settings.eval_config.replace(total_eval_tokens=tokens, baseline_pca=None)
    results = {}
    for name, dictionary in dictionaries.items():
        dictionary.to(model.device if model is not None else "cpu")
        results[name] = evaluate_dictionary(dictionary, cfg, placed, model)["sae"]
    return results
