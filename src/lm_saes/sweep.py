"""Many dictionaries from one reading of the text.

    settings = SweepSAESettings.from_grid(one_run, {"trainer.lr": [1e-4, 3e-4], "sae.act_fn": ["topk", "batchtopk"]})
    sweep_sae(settings)

The sweep's folder holds `sweep.json` (its settings), `comparison.json` and `comparison.md`, and by default the folders of its runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_saes.comparison import compare, markdown
from lm_saes.config import SweepSAESettings, TrainSAESettings, load_settings
from lm_saes.config.sweep import SWEEP_FILE
from lm_saes.errors import ConfigError, RunFolderError
from lm_saes.records import settings_record
from lm_saes.runners import Outcome, Report, train_together
from lm_saes.training.run_folder import RunFolder, disk_errors, write_atomically, write_json

if TYPE_CHECKING:
    from lm_saes.training.loggers import Logger

COMPARISON_FILE = "comparison.json"


def sweep_sae(
    settings: SweepSAESettings,
    *,
    resume: bool = False,
    allow_changes: Sequence[str] = (),
    loggers: Callable[[TrainSAESettings], Sequence[Logger]] | None = None,
    report: Report | None = None,
) -> list[Outcome]:
    """Train dictionaries on one stream: one forward of the language model for all of them, a step for each.

    Each run leaves what `train_sae` leaves with the same settings (`settings.members()`), bit for bit. A run that meets NaN or infinity is
    stopped, and the others go on.

    Args:
        settings: the stream and the runs.
        resume: go on from the newest moment of which all runs have a whole checkpoint, or start afresh when there is none.
        allow_changes: settings that may differ from those that the runs were begun with, such as "trainer.total_training_tokens".
        loggers: gives for a run where its metrics go beside `metrics.jsonl` and what its settings name.
        report: called with a run's settings, a name and a value as things become known: "model", "begin" (of training) and "stream" once,
            "initialization" and "evaluation" of each run.

    Returns:
        For each run its settings and its finished dictionary, or what stopped it.

    Raises:
        LmSaesError: anything a user can mend; nothing is left half-written.
    """
    folder, members = Path(settings.exp_result_path), settings.members()

    def tell(member: TrainSAESettings, name: str, value: Any) -> None:
        if name == "model":  # all is checked, and nothing was written yet
            with disk_errors(str(folder)):
                folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / SWEEP_FILE, settings_record(settings))
        if report is not None:
            report(member, name, value)

    with RunFolder(folder).owned("sweep"):
        check_folder(settings, resume)
        outcomes = train_together(
            members,
            resume=resume,
            allow_changes=allow_changes,
            loggers=[[] if loggers is None else loggers(member) for member in members],
            report=tell,
        )
        rows = compare(members)
        write_json(folder / COMPARISON_FILE, {"runs": [row.as_dict() for row in rows]})
        with disk_errors(str(folder)):
            write_atomically(folder / "comparison.md", markdown(rows))
    return outcomes


def settings_of_sweep(folder: str | Path) -> SweepSAESettings:
    """The settings that a sweep's folder was made with.

    Raises:
        ConfigError: the folder holds no sweep, or its settings are not readable.
    """
    return load_settings(SweepSAESettings, Path(folder) / SWEEP_FILE)


def check_folder(settings: SweepSAESettings, resume: bool) -> None:
    """The sweep's folder is not that of a run, nor of another sweep. Touches nothing.

    Raises:
        LmSaesError: it is; or the sweep that is there has other runs.
    """
    folder = Path(settings.exp_result_path)
    if (folder / "settings.json").is_file():
        raise RunFolderError(f"{folder} holds a run, so it cannot hold a sweep; choose another folder with --out (exp_result_path)")
    if not (folder / SWEEP_FILE).is_file():
        return
    before = settings_of_sweep(folder)
    begun, now = ({item.sae_name: before_or_now.folder(item) for item in before_or_now.items} for before_or_now in (before, settings))
    if not resume and any(Path(path).exists() for path in begun.values()):
        raise RunFolderError(f"{folder} holds an earlier sweep; go on with it with --resume, or choose another folder with --out (exp_result_path)")
    if resume and begun != now:
        name = next(name for name in [*begun, *now] if begun.get(name) != now.get(name))
        what = "lacks" if name in now else "has"
        raise ConfigError(f"the sweep in {folder} {what} the run '{name}'; resume it as it was begun (lm-saes sweep {folder} --resume)")


__all__ = ["check_folder", "settings_of_sweep", "sweep_sae"]
