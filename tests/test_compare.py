"""`lm-saes compare` on saved dictionaries and on a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lm_saes import SparseDictionary
from lm_saes.compare import _names
from tests.command import run


@pytest.fixture
def copy(short_demo_run: Path, tmp_path: Path) -> Path:
    """A saved copy of the run's dictionary with its latents turned round, and no run around it."""
    sae = SparseDictionary.from_pretrained(short_demo_run)
    with torch.no_grad():
        for tensor, dim in ((sae.W_D, 0), (sae.W_E, 1), (sae.b_E, 0)):
            tensor.copy_(tensor.flip(dim))
    sae.save_pretrained(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_and_its_turned_copy_are_one(
    short_demo_run: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", str(copy), str(short_demo_run), "--tokens", "1000", "--json", monkeypatch=monkeypatch) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["match"]["mean_matched_cosine"] == pytest.approx(1, abs=1e-5)
    assert table["match"]["shared"] == 1
    one, other = table["evaluation"].values()
    assert list(table["evaluation"]) == ["copy", "demo"]
    assert one["metrics/n_tokens"] >= 1000
    for metric in ("metrics/explained_variance", "metrics/l0"):
        assert one[metric] == pytest.approx(other[metric], rel=1e-4)


def test_the_table_names_both(short_demo_run: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run("compare", str(short_demo_run), str(copy), monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    for words in (
        "demo, 1,536 latents",
        "copy, 1,536 latents",
        "optimal assignment",
        "decoder 1.000, encoder 1.000",
        "100.0 % of the first, 100.0 % of the second",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["COPY", "nowhere"], "nowhere"), (["COPY", "COPY", "--tokens", "100"], "settings.json"), (["COPY", "COPY", "--tokens", "0"], "at least 1")],
)
def test_misuse_is_one_line(copy: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", *(str(copy) if word == "COPY" else word for word in words), monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_folders_of_one_name_are_told_apart() -> None:
    assert _names(Path("runs/a"), Path("runs/b")) == ("a", "b")
    assert _names(Path("one/seed"), Path("two/seed")) == ("one/seed", "two/seed")
    assert len(set(_names(Path("runs/a"), Path("runs/a")))) == 2
