"""docs/correctness.md claims nothing without a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")


def test_every_named_test_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 40
    for file, function in named:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not function or re.search(rf"^def {function}\(", text, re.MULTILINE), f"{file} has no {function}"


def test_every_named_script_exists():
    scripts = re.findall(r"`(scripts/[\w.]+)`", PAGE)
    assert len(scripts) == 3
    assert all((ROOT / script).is_file() for script in scripts)
