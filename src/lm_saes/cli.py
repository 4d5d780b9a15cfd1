"""The command `lm-saes`. It only dispatches: settings are merged and checked by `lm_saes.config`, the work is done by `lm_saes.runners`.

Heavy libraries are imported inside the commands, so that `--help` and a misspelt option answer at once. Whatever a user can mend ends in one
line on standard error and exit code 2; an interruption ends in 130; only a bug shows a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnusedCliTokensError

from lm_saes.bench_cli import bench
from lm_saes.cache_cli import cache, generate
from lm_saes.errors import ConfigError, LmSaesError, did_you_mean
from lm_saes.files import disk_is_full
from lm_saes.version import __version__

if TYPE_CHECKING:
    from lm_saes.config import SweepSAESettings, TrainSAESettings

app = App(
    name="lm-saes",
    version=__version__,
    help="Sparse autoencoders and transcoders for language models. Start with `lm-saes demo`.",
    help_format="markdown",
    default_parameter=Parameter(negative=()),
)
show = App(name="show", help="A run's summary and a few of its features; or one feature.", default_parameter=Parameter(negative=()), sort_key=5)
app.command(show)
app.command(generate, sort_key=8)
cache.sort_key = 9
app.command(cache)
bench.sort_key = 10
app.command(bench)

AllowChange = Annotated[
    list[str] | None,
    Parameter(help="With --resume: a setting that may differ from the run's, `trainer.total_training_tokens`. May be given several times."),
]
Count = Annotated[int, Parameter(name=["--n", "-n"])]
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Any setting: `--trainer.lr 1e-4 --sae.top_k 64`.")]


@app.command(sort_key=1)
def demo(*overrides: Overrides, out: Path = Path("runs/demo"), again: bool = False) -> None:
    """Train a sparse autoencoder on the bundled language model, evaluate it and show some of its features. Takes minutes, needs nothing else.

    Parameters
    ----------
    out
        The run's folder.
    again
        Start over although the folder holds a demo.
    """
    from lm_saes import commands

    settings = _settings(demo, recipe("demo"), overrides, out)
    commands.demo(settings, again=again, changed=bool(overrides))


@app.command(sort_key=3)
def train(
    config: Path,
    *overrides: Overrides,
    resume: bool = False,
    allow_change: AllowChange = None,
    dry_run: bool = False,
    baseline: str | None = None,
) -> None:
    """Train an SAE or a transcoder from a settings file (TOML, YAML or JSON).

    Parameters
    ----------
    config
        The settings (also the settings.json of another run), or the name of a recipe that the package carries ("demo").
    resume
        Go on from the newest checkpoint in the run's folder.
    dry_run
        Train nothing: check everything, estimate memory, disk and time, and say whether it fits.
    baseline
        Train a baseline of the run instead, in `baselines/` of its folder: `frozen-decoder`, `frozen-encoder` or `untrained-lm`.
    """
    settings = _settings(train, _file(config), overrides)
    if baseline is not None:
        from lm_saes.config.baselines import baseline_settings

        settings = baseline_settings(settings, baseline)
    from lm_saes import commands

    command = commands.dry_run if dry_run else commands.train
    command(settings, resume=resume, allow_changes=_allowed(allow_change, resume))


@app.command(sort_key=7)
def sweep(
    config: Path,
    *overrides: Overrides,
    grid: Annotated[list[str] | None, Parameter(help="A field and its values: `trainer.lr=1e-4,3e-4`. May be given several times.")] = None,
    out: Path | None = None,
    resume: bool = False,
    allow_change: AllowChange = None,
    dry_run: bool = False,
) -> None:
    """Train many dictionaries on one reading of the text, and compare them: `lm-saes sweep CONFIG --grid trainer.lr=1e-4,3e-4 --grid sae.top_k=32,64`.

    Parameters
    ----------
    config
        The settings of one run (a file or a recipe), of which every combination of the grid is trained; or a file that lists its runs (`items`); or the
        folder of a sweep.
    out
        The sweep's folder, instead of trainer.exp_result_path.
    resume
        Go on from the newest checkpoints that all runs have.
    dry_run
        Train nothing: check everything, list the runs, estimate memory, disk and time, and say whether it fits.
    """
    settings = _sweep_settings(config, overrides, grid or [], out)
    from lm_saes import commands

    command = commands.dry_run_of_sweep if dry_run else commands.sweep
    command(settings, resume=resume, allow_changes=_allowed(allow_change, resume))


@app.command(sort_key=4)
def evaluate(target: Path, *overrides: Overrides, baseline: list[str] | None = None) -> None:
    """Evaluate a run's dictionary, on held-out text where its settings name some; or what a settings file (EvaluateSAESettings) names.

    Parameters
    ----------
    target
        A run's folder, or a settings file.
    baseline
        Evaluate a baseline beside it: `pca`, of the dictionary's L0, or one that was trained (`frozen-decoder`, `frozen-encoder`, `untrained-lm`). May
        be given several times.
    """
    from lm_saes.config.baselines import check_baselines

    names = check_baselines(baseline or [])
    if not target.exists():
        raise ConfigError(f"neither a run's folder nor a settings file at {target}")
    from lm_saes import commands

    commands.evaluate(target, _overrides(overrides), names)


@app.command(sort_key=2)
def inspect(
    config: Path | None = None,
    *,
    model: str | None = None,
    hook_points: str | None = None,
    text: str | None = None,
    text_column: str | None = None,
    tokens: int = 100_000,
    context_size: int | None = None,
    device: str | None = None,
    json: bool = False,
    spectrum: Path | None = None,
) -> None:
    """Look at activations before training on them: norms, outliers, dimensionality, and the settings that follow.

    Parameters
    ----------
    config
        Settings of a training, or the name of a recipe: its model, text and hook points are inspected. Without it, those below.
    model
        A name on the hub, a folder, or "demo" (the default).
    hook_points
        Names with commas between; `*` is every block. Left out: attention output, MLP output and residual stream of every block.
    text
        A dataset's name, a file or folder (.txt, .jsonl, .parquet ...), or "demo" (the default).
    text_column
        The column of it that holds the text, if not `text`.
    tokens
        Tokens to look at.
    context_size
        Tokens in a context.
    device
        Where the model runs.
    json
        Print the whole record as JSON instead.
    spectrum
        Draw the spectra into this file (.png, .svg, .pdf; needs the extra `plot`).
    """
    settings = None if config is None else _settings(inspect, _file(config), ())
    from lm_saes.config import DatasetConfig
    from lm_saes.config.base import validated
    from lm_saes.inspection import command

    if text_column is not None and text is None:
        raise ConfigError("--text-column names a column of --text; give both")
    names = None if hook_points is None else [name.strip() for name in hook_points.split(",") if name.strip()]
    source = text if text is None or text_column is None else validated(DatasetConfig, {"dataset_name_or_path": text, "text_column": text_column})
    where = {"model": model, "text": source, "context_size": context_size, "device": device}
    command.inspect(settings, names, tokens=tokens, as_json=json, spectrum=spectrum, **where)


@app.command(sort_key=6)
def compare(first: Path, second: Path, *, tokens: int | None = None, json: bool = False) -> None:
    """Which latents two dictionaries of the same hook points share: matched by decoder direction, evaluated side by side.

    Parameters
    ----------
    first
        A run's folder, or that of a saved dictionary.
    second
        Another one.
    tokens
        Evaluate both on so many tokens of the same text, that on which the first folder which is a run's is evaluated.
    json
        Print the whole record as JSON instead.
    """
    from lm_saes.compare import compare

    compare(first, second, tokens=tokens, as_json=json)


@show.default
def show_run(run: Path, *, n: Count = 6) -> None:
    """A run's summary and a few of its features; a sweep's runs side by side.

    Parameters
    ----------
    run
        The folder of a run or of a sweep.
    n
        How many features.
    """
    from lm_saes import commands

    commands.show_run(run, n)


@show.command(name="feature")
def show_feature(run: Path, index: int, *, n: Count = 10, tokens: int = 200_000) -> None:
    """One feature: the contexts in which it fires hardest, of the text that the run is evaluated on.

    Parameters
    ----------
    run
        The run's folder.
    index
        The latent's number.
    n
        How many contexts.
    tokens
        How much text to search.
    """
    from lm_saes import commands

    commands.show_feature(run, index, n, tokens)


@app.command(name="recipe", sort_key=1)
def print_recipe(name: str | None = None) -> None:
    """Print a settings file that the package carries, to change and train: `lm-saes recipe demo > my.toml`.

    Parameters
    ----------
    name
        Which; without it, the names of all.
    """
    text = "".join(f"{known}\n" for known in _recipes()) if name is None else recipe(name).read_text(encoding="utf-8")
    sys.stdout.write(text)


# ----------------------------------------------------------------------------------------------------------------- pieces


def recipe(name: str) -> Path:
    """A settings file that the package carries (in the wheel, or beside the sources of an editable install).

    Raises:
        ConfigError: there is none of that name.
    """
    known = _recipes()
    if name not in known:
        raise ConfigError(f"no config file or recipe '{name}'{did_you_mean(name, known) or '.'} Recipes: {', '.join(known)}")
    return known[name]


def _recipes() -> dict[str, Path]:
    package = Path(__file__).parent
    folders = [package.parent.parent / "recipes", package / "recipes"]
    found = {path.stem: path for folder in folders for path in folder.glob("*.toml")}
    return {name: found[name] for name in sorted(found)}


def _file(config: Path) -> Path:
    """A settings file, or the recipe of that name."""
    if config.is_dir():
        raise ConfigError(f"{config} is a folder; give a settings file, such as the settings.json of a run ({config / 'settings.json'})")
    return config if config.suffix or config.is_file() else recipe(str(config))


def _allowed(changes: list[str] | None, resume: bool) -> list[str]:
    if changes and not resume:
        raise ConfigError("--allow-change says what may differ when a run goes on; give --resume with it")
    return changes or []


def _overrides(words: tuple[str, ...]) -> dict[str, Any]:
    from lm_saes.config.base import parse_overrides

    return parse_overrides(words)


def _check_options(command: Callable[..., None], names: Iterable[str]) -> None:
    """A word of the command line that is no setting anywhere and nearly an option of the command is that option, misspelt."""
    from lm_saes.config.base import is_field

    options = [f"--{name.replace('_', '-')}" for name, option in signature(command).parameters.items() if option.kind is option.KEYWORD_ONLY]
    for name in names:
        near = "" if is_field(name) else did_you_mean(f"--{name.replace('_', '-')}", options)
        if near:
            raise ConfigError(f"no option or setting --{name}{near}")


def _settings(command: Callable[..., None], path: Path, words: tuple[str, ...], out: Path | None = None) -> TrainSAESettings:
    from lm_saes.config import TrainSAESettings, load_settings
    from lm_saes.config.base import merge

    table = _overrides(words)
    _check_options(command, table)
    if out is not None:
        table = merge({"trainer": {"exp_result_path": str(out)}}, table)
    return load_settings(TrainSAESettings, path, table)


def _sweep_settings(config: Path, words: tuple[str, ...], grid: list[str], out: Path | None) -> SweepSAESettings:
    from lm_saes.config import SweepSAESettings, load_settings
    from lm_saes.config.base import read_config_file
    from lm_saes.config.sweep import SWEEP_FILE, parse_grid

    path = config / SWEEP_FILE if (config / SWEEP_FILE).is_file() else _file(config)
    if "items" not in read_config_file(path):
        if not grid:
            raise ConfigError(f"{path} holds the settings of one run; say what differs, such as --grid trainer.lr=1e-4,3e-4")
        return SweepSAESettings.from_grid(_settings(sweep, path, words, out), parse_grid(grid))
    if grid:
        raise ConfigError(f"{path} lists its runs (items), so there is nothing to lay a grid over; leave out --grid, or give the settings of one run")
    table = _overrides(words)
    _check_options(sweep, table)
    return load_settings(SweepSAESettings, path, table if out is None else {**table, "exp_result_path": str(out)})


def main() -> None:
    """The entry point: runs the command line and turns what a user can mend into one line and an exit code."""
    warnings.formatwarning = _warning
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(_words(error))
    except LmSaesError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if disk_is_full(error):
            _fail(f"the disk is full{f' (writing {error.filename})' if error.filename else ''}; free some space and run again with --resume")
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            _fail(f"no permission to write {error.filename}; choose another folder")
        raise


_plain_warning = warnings.formatwarning


def _warning(message: Warning | str, category: type[Warning], *place: Any) -> str:
    """Ours in one line, without the place in the code."""
    return f"warning: {message}\n" if category is UserWarning else _plain_warning(message, category, *place)


def _words(error: CycloptsError) -> str:
    """What is wrong with the words of a command, in one line."""
    command = " ".join(["lm-saes", *(error.command_chain or ())])
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected {' '.join(error.unused_tokens or ())}; see {command} --help"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        return f"{command} needs {name.lstrip('-').upper() if error.argument.required else 'a value after ' + name}; see {command} --help"
    return " ".join(str(error).split())


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


if __name__ == "__main__":
    main()
