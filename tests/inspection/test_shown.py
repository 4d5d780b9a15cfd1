"""What an inspection looks like: the table, the picture, the command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lm_saes.config import TrainSAESettings, load_settings
from lm_saes.errors import ConfigError
from lm_saes.inspection import figure
from lm_saes.inspection.command import advice_for
from lm_saes.inspection.inspect import inspect_batches
from lm_saes.inspection.report import ActivationReport
from lm_saes.inspection.table import abbreviated, render
from tests.command import run
from tests.lm.tiny_models import save_tiny

NAMES = [f"blocks.{block}.{kind}" for kind in ("hook_attn_out", "hook_resid_post") for block in range(3)]


def report(*names: str) -> ActivationReport:
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(600, 12, generator=generator) * torch.linspace(0.01, 1, 12) for name in names}
    x[names[0]][500] *= 300
    tokens = torch.arange(600) % 7
    records = inspect_batches([{**x, "tokens": tokens}], list(names), tokens=None, token_texts=lambda ids: [f"\x1b[31m{index}" for index in ids])
    return ActivationReport("tiny", "demo", 16, records, 1.0)


def printed(value: Any) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(value)
    console.file.close()
    return console.export_text()


def test_many_hook_points_are_a_table_with_grouped_advice() -> None:
    text = printed(render(report(*NAMES)))
    for name in NAMES:
        assert name in text
    assert "settings for blocks.1-2.hook_attn_out, blocks.0-2.hook_resid_post" in " ".join(text.split())
    assert text.count("[initializer]") == 2  # one for the hook point with an outlier token, one for all others


def test_one_hook_point_is_shown_in_full_and_hostile_tokens_do_nothing() -> None:
    text = printed(render(report(NAMES[0])))
    for words in ("scale", "geometric median", "effective rank", "outlier tokens", "1 above 10 × the median norm", "left out of all other figures"):
        assert words in " ".join(text.split())
    assert "\x1b[31m" not in text


def test_neighbouring_blocks_are_abbreviated() -> None:
    assert abbreviated(["blocks.3.x", "blocks.0.x", "blocks.1.x", "blocks.1.y", "embed"]) == ["blocks.0-1,3.x", "blocks.1.y", "embed"]


@pytest.mark.parametrize("names", [NAMES, NAMES[:1], ["embed:out"]])
def test_the_picture_is_drawn(tmp_path: Path, names: list[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "pictures" / "spectrum.png"
    figure.save_spectrum(report(*names), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="png"):
        figure.save_spectrum(report(*names), tmp_path / "spectrum.doc")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(figure, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    with pytest.raises(ConfigError, match=r"pip install 'lm-saes\[plot\]'"):
        figure.save_spectrum(report(*NAMES), tmp_path / "spectrum.png")


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text and the settings of a run on them."""
    folder = tmp_path_factory.mktemp("inspect")
    save_tiny("gpt_neox", folder / "model")
    (folder / "text.txt").write_text("some words to read, and others too. " * 400)
    settings = {
        "sae_name": "s",
        "sae": {"hook_point_in": "blocks.1.hook_resid_post", "d_model": 32, "expansion_factor": 2, "act_fn": "topk", "top_k": 4},
        "trainer": {"total_training_tokens": 4096, "exp_result_path": str(folder / "run")},
        "model": {"model_name": str(folder / "model")},
        "datasets": {"text": {"dataset_name_or_path": str(folder / "text.txt")}},
        "activation_factory": {
            "sources": [{"name": "text"}], "hook_points": ["blocks.1.hook_resid_post"], "batch_size": 256, "buffer_size": 512, "context_size": 32,
            "model_batch_size": 4,
        },
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def test_inspect_of_a_model_prints_json(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(place / "model"), "--text", str(place / "text.txt"), "--hook-points", "blocks.*.hook_mlp_out", "--tokens", "600"]
    assert run("inspect", *words, "--context-size", "32", "--json", monkeypatch=monkeypatch) == 0
    table = json.loads(capsys.readouterr().out)
    assert list(table["hook_points"]) == [f"blocks.{block}.hook_mlp_out" for block in range(3)]
    assert table["context_size"] == 32
    assert all(600 <= record["tokens"] < 600 + 8 * 32 for record in table["hook_points"].values())
    again = run("inspect", *words, "--context-size", "32", "--json", monkeypatch=monkeypatch)
    repeated = json.loads(capsys.readouterr().out)
    assert again == 0
    assert repeated["hook_points"] == table["hook_points"]


def test_inspect_of_a_config_prints_the_table_and_draws(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = place / "spectrum.png"
    assert run("inspect", str(place / "settings.json"), "--tokens", "500", "--spectrum", str(picture), monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "blocks.1.hook_resid_post, 32 wide" in out
    assert "[initializer]" in out
    assert picture.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CONFIG", "--model", "demo"], "--model cannot stand beside"),
        (["--hook-points", "blocks.0.hook_nothing"], "no hook point 'blocks.0.hook_nothing'"),
        (["--tokens", "0"], "tokens must be at least 1"),
        (["CONFIG", "--spectrum", "spectrum.doc", "--tokens", "100"], ".png, .svg or .pdf"),
    ],
)
def test_misuse_is_one_line(place: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", *(str(place / "settings.json") if word == "CONFIG" else word for word in words), monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_dry_run_shows_the_advice_where_there_is_text_to_read(place: Path) -> None:
    settings = load_settings(TrainSAESettings, place / "settings.json", {})
    text = printed(advice_for(settings))
    assert "settings for blocks.1.hook_resid_post" in text
    assert "[initializer]" in text
    cached = {"activation_factory": {**settings.activation_factory.as_dict(), "sources": [{"type": "activations", "name": "c", "path": str(place)}]}}
    assert advice_for(settings.replace(model=None, **cached)) is None
