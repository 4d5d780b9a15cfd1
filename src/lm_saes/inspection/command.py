"""What `lm-saes inspect` does: read the words, inspect, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from lm_saes import display
from lm_saes.config import ActivationFactoryDatasetSource, TrainSAESettings
from lm_saes.errors import ConfigError
from lm_saes.inspection.figure import require_matplotlib, save_spectrum
from lm_saes.inspection.inspect import TOKENS, inspect_activations, inspect_settings
from lm_saes.inspection.table import render, render_advice

DRY_RUN_TOKENS = 8192
"""Tokens that a dry run looks at."""


def inspect(
    settings: TrainSAESettings | None,
    hook_points: Sequence[str] | None = None,
    *,
    tokens: int = TOKENS,
    as_json: bool = False,
    spectrum: Path | None = None,
    **where: Any,
) -> None:
    """Inspect a settings file's stream or, without one, the model and text in `where` (see `inspect_activations`), and print the report.

    Raises:
        ConfigError: both a settings file and a model, a text, a context size or a device.
    """
    given = {name: value for name, value in where.items() if value is not None}
    if settings is not None and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"a config names its own model and text, so {names} cannot stand beside it; leave one of the two out")
    if spectrum is not None:
        require_matplotlib()
    terminal = display.console()
    with display.Terminal(stderr=True).status("reading"):
        report = inspect_activations(hook_points=hook_points, tokens=tokens, **given) if settings is None else inspect_settings(settings, hook_points, tokens=tokens)  # fmt: skip
    if spectrum is not None:
        save_spectrum(report, spectrum)
    if as_json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
        return
    terminal.print(render(report))
    if spectrum is not None:
        terminal.print(f"spectrum: {spectrum}", soft_wrap=True)


def advice_for(settings: TrainSAESettings) -> RenderableType | None:
    """What a dry run shows: the advice for the hook points of a run, from the start of its text; None where it reads no text."""
    sources = settings.activation_factory.sources
    if settings.model is None or not all(isinstance(source, ActivationFactoryDatasetSource) for source in sources):
        return None
    return render_advice(list(inspect_settings(settings, tokens=DRY_RUN_TOKENS).hook_points.values()))
