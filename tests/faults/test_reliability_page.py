"""`docs/reliability.md` names a test for each row of its tables; they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = (FOLDER.parent.parent / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_is_there() -> None:
    there = {node.name for path in FOLDER.glob("test_*.py") for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) >= 20
    assert named <= there, named - there
    for file in re.findall(r"`((?:tests/faults/)?test_\w+\.py)`", PAGE):
        assert (FOLDER / Path(file).name).is_file(), file


def test_every_row_of_the_faults_has_a_test() -> None:
    section = PAGE.split("## Faults", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| Fault")]
    assert len(rows) >= 20
    for row in rows:
        assert "`test_" in row or "the same test" in row, row
