"""The commands of `lm-saes` about caches of activations; `cli.py` registers them. Like there, heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Any setting: `--total_tokens 10000000 --override_dtype int8`.")]

cache = App(name="cache", help="Look at, verify or end a cache of activations.", default_parameter=Parameter(negative=()))


def generate(config: Path, *overrides: Overrides, dry_run: bool = False) -> None:
    """Write activations to disk, for training without the language model. A cache that is not finished is gone on with.

    Parameters
    ----------
    config
        The settings (GenerateActivationsSettings; TOML, YAML or JSON).
    dry_run
        Write nothing: estimate disk and time, and say whether it fits.
    """
    from lm_saes.config import load_settings
    from lm_saes.config.base import parse_overrides
    from lm_saes.config.generation import GenerateActivationsSettings

    settings = load_settings(GenerateActivationsSettings, config, parse_overrides(overrides))
    from lm_saes import cache_commands

    cache_commands.generate(settings, dry_run=dry_run)


@cache.command
def verify(folder: Path) -> None:
    """Read a whole cache and compare it with what was written. Exit code 2 if anything is damaged.

    Parameters
    ----------
    folder
        The cache's folder.
    """
    from lm_saes import cache_commands

    cache_commands.verify(folder)


@cache.command
def show(folder: Path, *, buffer_size: int = 100_000, batch_size: int = 2048) -> None:
    """What a cache holds, and how well it is shuffled when it is read.

    Parameters
    ----------
    folder
        The cache's folder.
    buffer_size
        `buffer_size` of the training whose shuffling is judged.
    batch_size
        Its `batch_size`.
    """
    from lm_saes import cache_commands

    cache_commands.show(folder, buffer_size, batch_size)


@cache.command
def finish(folder: Path) -> None:
    """End a cache that is not finished (the disk was full, it was enough): what was written can then be read, and nothing is added any more.

    Parameters
    ----------
    folder
        The cache's folder.
    """
    from lm_saes import cache_commands

    cache_commands.finish(folder)
