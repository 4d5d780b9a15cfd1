"""Runs side by side: order and marks."""

from __future__ import annotations

import io

from rich.console import Console

from lm_saes.comparison import COLUMNS, Row, caption, comparison_table, markdown


def row(name: str, hook_point: str = "a", error: str | None = None, **metrics: float) -> Row:
    known = {column.name: metrics.get(column.name) for column in COLUMNS}
    return Row(name, f"runs/{name}", hook_point, "held-out text", 100, {}, known, error)


ROWS = [
    row("a,x", l0=32.0, explained_variance=0.8, dead_fraction=0.0),
    row("a,y", l0=31.0, explained_variance=0.7, dead_fraction=0.0),
    row("b,x", "b", l0=32.0, explained_variance=0.6, dead_fraction=0.5),
    row("b,y", "b", l0=33.0, explained_variance=0.5, dead_fraction=0.25),
    row("b,z|", "b", error="step 3: NaN", explained_variance=0.9),
]


def printed(rows: list[Row], marked: bool, width: int = 80) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(comparison_table(rows, marked))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_best_of_each_column_is_marked_for_each_hook_point():
    lines = printed(ROWS, marked=True)
    assert lines[0].split() == ["L0", "expl.", "var.", "dead"], "columns that nobody has are left out"
    assert [line.split() for line in lines[1:]] == [
        ["a"], ["x", "32.0", "0.8000*", "0.0%"], ["y", "31.0", "0.7000", "0.0%"], [],
        ["b"], ["x", "32.0", "0.6000*", "50.0%"], ["y", "33.0", "0.5000", "25.0%*"], ["z|", "stopped", "–", "0.9000", "–"],
    ]  # fmt: skip
    assert "*" not in "".join(printed(ROWS, marked=False))
    assert "*" not in "".join(printed(ROWS[:1], marked=True)), "a single run is not the best of anything"


def test_long_names_are_folded_and_not_cut():
    name = "blocks.11.hook_resid_post,batchtopk,lr=0.0003,expansion_factor=16,top_k=128"
    lines = printed([row(name, l0=1.0, explained_variance=0.5)], marked=False, width=60)
    assert "".join(line[:40].strip() for line in lines[1:]).startswith(name[:30])
    assert all(len(line) <= 60 for line in lines)
    assert len(lines) > 2


def test_as_a_page():
    page = markdown(ROWS)
    assert "| a,x | 32.0 | **0.8000** | 0.0% |" in page
    assert "| b,z\\| (stopped) | – | 0.9000 | – |" in page
    assert "- b,z| was stopped: step 3: NaN" in page
    assert "held-out text" in caption(ROWS)
