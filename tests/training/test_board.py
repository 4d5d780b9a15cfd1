"""The terminal during a sweep."""

from __future__ import annotations

import io

from rich.console import Console as RichConsole

from lm_saes.training import board as module
from lm_saes.training.board import Board


def metrics(variance: float) -> dict[str, float]:
    return {"losses/overall_loss": 1.5, "metrics/explained_variance": variance, "metrics/l0": 31.5, "sparsity/dead_fraction": 0.25}


def shown(terminal: bool, height: int = 30) -> tuple[Board, io.StringIO]:
    file = io.StringIO()
    return Board(RichConsole(file=file, force_terminal=terminal, width=110, height=height, color_system=None)), file


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    """At most every ten seconds, and when all runs have told their own: as the next step begins."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    board, file = shown(terminal=False)
    runs = [board.logger(name) for name in ("one", "two")]
    for run in runs:
        run.start(100, 10_000)
        run.message("the same for both")
    runs[0].message("for one [only]")
    for step, seconds in ((1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (100, 50.0)):
        now[0] = seconds
        for index, run in enumerate(runs):
            run.progress(step)
            run.log(step, metrics(0.5 + index / 4 + step / 1000))
    for run in runs:
        run.close()
    assert file.getvalue().splitlines() == [
        "the same for both",
        "one: for one [only]",
        "step 1/100  expl. var. 0.5010 to 0.7510 (two)  50 tokens/s  3:18 left",
        "step 2/100  expl. var. 0.5020 to 0.7520 (two)  15 tokens/s  10:37 left",
        "step 4/100  expl. var. 0.5040 to 0.7540 (two)  8 tokens/s  20:00 left",
        "step 100/100  expl. var. 0.6000 to 0.8500 (two)  200 tokens/s  0:00 left",
    ]


def test_a_line_for_each_run_and_one_bar_in_a_terminal():
    board, file = shown(terminal=True)
    runs = [board.logger(name) for name in ("one", "two", "three")]
    for run, steps in zip(runs, (100, 100, 10), strict=True):
        run.start(steps, steps * 100, first_step=5)
    for step in (6, 10, 40):
        for run in runs[:1] if step == 40 else runs:
            run.progress(step)
            run.log(step, metrics(0.7))
    runs[1].log(40, {"metrics/downstream": 1.0})
    text = RichConsole(file=io.StringIO(), width=110, color_system=None, record=True)
    text.print(board._render())
    lines = text.export_text().splitlines()
    assert lines[0].split() == ["loss", "expl.", "var.", "L0", "dead"]
    assert [line.split()[0] for line in lines[1:4]] == ["one", "two", "three"]
    assert "40/100" in lines[-1]
    assert "3 dictionaries" in lines[-1]
    for run in runs:
        run.close()
    assert "expl. var." in file.getvalue()


def test_more_runs_than_lines_in_the_terminal():
    board, _ = shown(terminal=True, height=10)
    for index in range(12):
        board.logger(f"run {index}").start(10, 100)
    text = RichConsole(file=io.StringIO(), width=110, record=True)
    text.print(board._render())
    assert "and 7 more" in text.export_text()
    board.close()
