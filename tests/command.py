"""The command line in the process of a test."""

from __future__ import annotations

import sys

import pytest

from lm_saes import cli


def run(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """`lm-saes WORDS`; its exit code."""
    monkeypatch.setattr(sys, "argv", ["lm-saes", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
