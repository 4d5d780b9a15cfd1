"""`lm-saes sweep` as people use it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lm_saes.config import SweepSAESettings, TrainSAESettings
from lm_saes.estimate_sweep import OF_EACH_RUN, estimate_sweep
from tests.command import run
from tests.test_cli import assert_one_line, small_run, write


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    return small_run(tmp_path)


def test_sweep_then_show_then_go_on(tmp_path, settings, monkeypatch, capsys):
    path, grid = write(tmp_path, settings), ["--grid", "trainer.lr=1e-3,1e-4", "--grid", "sae.act_fn=topk,batchtopk"]
    assert run("sweep", path, *grid, "--out", str(tmp_path / "sweep"), "--sae.top_k", "3", monkeypatch=monkeypatch) == 0
    output = capsys.readouterr().out
    assert "4 on one stream" in output
    assert output.count("lr=0.0001,batchtopk") >= 2
    assert f"lm-saes show {tmp_path}/sweep/lr=0.0" in output.splitlines()[-1]
    assert json.loads((tmp_path / "sweep/lr=0.001,topk/settings.json").read_text())["sae"]["top_k"] == 3
    assert not (tmp_path / "run").exists()
    assert run("show", str(tmp_path / "sweep"), monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.count("topk") == 4
    assert run("show", str(tmp_path / "sweep/lr=0.001,topk"), "--n", "1", monkeypatch=monkeypatch) == 0
    assert run("sweep", str(tmp_path / "sweep"), "--resume", monkeypatch=monkeypatch) == 0
    again = ["sweep", str(tmp_path / "sweep"), "--out", str(tmp_path / "again")]
    assert run(*again, monkeypatch=monkeypatch) == 0
    weights = [(tmp_path / folder / "lr=0.001,topk/sae_weights.safetensors").read_bytes() for folder in ("sweep", "again")]
    assert weights[0] == weights[1]


def test_a_sweep_in_which_every_run_is_stopped_fails(tmp_path, settings, monkeypatch, capsys):
    assert run("sweep", write(tmp_path, settings), "--grid", "trainer.lr=1e30,1e31", monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert_one_line(captured.err)
    assert "every run was stopped" in captured.err
    assert captured.out.count("stopped: lr=1e+3") == 2


def test_dry_run_of_a_sweep_lists_its_runs_and_leaves_nothing(tmp_path, settings, monkeypatch, capsys):
    monkeypatch.setattr("lm_saes.estimate.CALIBRATION_SECONDS", 0.3)
    path = write(tmp_path, settings)
    assert run("sweep", path, "--grid", "sae.expansion_factor=2,4", "--dry-run", monkeypatch=monkeypatch) == 0
    output = capsys.readouterr().out
    one, two = (32 * 32 * factor * 2 + 32 * factor + 32 for factor in (2, 4))
    for number in (one, two, one + two):
        assert f"{number:,}" in output
    assert "it fits" in output
    assert "tokens/s" in output
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_names_its_knob(settings):
    sweep = SweepSAESettings.from_grid(TrainSAESettings.model_validate(settings), {"sae.expansion_factor": [2, 4]})
    result, each = estimate_sweep(sweep, calibrate=False)
    assert result.memory[OF_EACH_RUN] == sum(one.memory[OF_EACH_RUN] for one in each)
    assert result.disk < sum(one.disk for one in each), "the stream's state is there once"
    assert result.fits
    assert "make two sweeps of the grid" in replace(result, memory={OF_EACH_RUN: 10**15}, available=1).verdict()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "demo"], "say what differs, such as --grid"),
        (["sweep", "dmeo", "--grid", "trainer.lr=1"], "did you mean 'demo'"),
        (["sweep", "demo", "--grid", "trainer.lrr=1"], "did you mean 'lr'"),
        (["sweep", "demo", "--grid", "model.dtype=a,b"], "one stream"),
        (["sweep", "demo", "--grid", "trainer.lr"], "--grid needs a field and its values"),
        (["sweep", "demo", "--grid"], "needs a value after --grid"),
        (["sweep"], "lm-saes sweep needs CONFIG"),
        (["sweep", "nowhere.toml", "--grid", "trainer.lr=1"], "no config file at nowhere.toml"),
    ],
)
def test_bad_words_of_a_sweep(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(*words, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert_one_line(error)
    assert message in error


def test_a_file_that_lists_its_runs(tmp_path, settings, monkeypatch, capsys):
    items = [{"sae_name": name, "sae": settings.pop("sae") if name == "a" else None, "trainer": {"total_training_tokens": 1024}} for name in "ab"]
    items[1]["sae"] = {**items[0]["sae"], "hook_point_in": "blocks.0.hook_resid_post"}
    shared = {name: settings[name] for name in ("model", "datasets", "activation_factory")}
    path = write(tmp_path, {**shared, "items": items, "exp_result_path": str(tmp_path / "sweep")})
    assert run("sweep", path, monkeypatch=monkeypatch) == 0
    assert (tmp_path / "sweep/a/config.json").is_file()
    assert json.loads((tmp_path / "sweep/b/settings.json").read_text())["activation_factory"]["hook_points"][1] == "blocks.0.hook_resid_post"
    capsys.readouterr()
    assert run("sweep", path, "--grid", "trainer.lr=1,2", monkeypatch=monkeypatch) == 2
    assert "leave out --grid" in capsys.readouterr().err
