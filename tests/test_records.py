"""With which settings a run goes on: those that it began with, but for what may change freely and what is allowed to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_saes.cli import main
from lm_saes.config import TrainSAESettings
from lm_saes.config.base import merge
from lm_saes.errors import ConfigError
from lm_saes.records import check_same, evaluated_on, settings_record
from lm_saes.training.resume import check_allowed, may_change

BEGUN: dict[str, Any] = {
    "sae_name": "small",
    "sae": {"hook_point_in": "h", "d_model": 32, "expansion_factor": 2, "act_fn": "topk", "top_k": 4},
    "trainer": {"total_training_tokens": 1024, "lr": 1e-3},
    "activation_factory": {
        "sources": [{"type": "activations", "name": "a", "path": "cache"}],
        "hook_points": ["h"],
        "batch_size": 64,
        "buffer_size": 512,
    },
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "settings.json").write_text(json.dumps(settings_record(TrainSAESettings.model_validate(BEGUN))))
    return tmp_path


def now(changes: dict[str, Any]) -> TrainSAESettings:
    return TrainSAESettings.model_validate(merge(BEGUN, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"lr": 1e-4}}, "trainer.lr = 0.001, got 0.0001"),
        ({"trainer": {"total_training_tokens": 2048}}, "trainer.total_training_tokens = 1024, got 2048"),
        ({"trainer": {"lr_warm_up_steps": 5000}}, "trainer.lr_warm_up_steps = the default, got 5000"),
        ({"eval": True}, "eval = False, got True"),
        ({"eval_config": {"total_eval_tokens": 9}}, "eval_config.total_eval_tokens = 1000000, got 9"),
    ],
)
def test_a_change_is_refused_and_can_be_allowed(run, changes, message):
    with pytest.raises(ConfigError) as caught:
        check_same(now(changes), run)
    assert f"was begun with {message}; " in str(caught.value)
    name = message.split(" = ")[0]
    assert f"--allow-change {name}" in str(caught.value)
    assert check_same(now(changes), run, check_allowed([name])) == [
        f"{name} = {message.split(', got ')[1]} from here on; it was {message.split(' = ')[1].split(',')[0]}"
    ]
    assert len(check_same(now(changes), run, check_allowed([name.split(".")[0]]))) == 1


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"sae": {"top_k": 5}}, "sae.top_k"),
        ({"activation_factory": {"buffer_size": 600}}, "activation_factory.buffer_size"),
        ({"trainer": {"seed": 3}}, "trainer.seed"),
        ({"stream_seed": 3}, "stream_seed"),
        ({"initializer": {"n_batches": 3}}, "initializer"),
    ],
)
def test_what_a_checkpoint_holds_cannot_change(run, changes, name):
    with pytest.raises(ConfigError) as caught:
        check_same(now(changes), run)
    assert f"was begun with {name} = " in str(caught.value)
    assert "--allow-change" not in str(caught.value)
    assert not may_change(name)
    with pytest.raises(ConfigError, match="cannot change when a run goes on"):
        check_allowed([name])


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {"exp_result_path": "elsewhere", "n_checkpoints": 3, "keep_checkpoints": 1, "checkpoint_minutes": 5.0}},
        {"device_type": "cpu", "sae": {"device": "cpu"}, "tensorboard": {}},
        {"activation_factory": {"prefetch": 2, "sources": [{"type": "activations", "name": "a", "path": "moved", "num_workers": 9}]}},
        {"stream_seed": 0},
    ],
)
def test_where_how_often_and_on_what_device_may_change_freely(run, changes):
    assert check_same(now(changes), run) == []


def test_a_run_that_does_not_say_how_it_was_begun_does_not_go_on(run):
    (run / "settings.json").unlink()
    with pytest.raises(ConfigError, match=r"there is no settings\.json in it"):
        check_same(now({}), run)


def test_misspelt_names_are_refused(run, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"no trainer\.totl_training_tokens that could change; did you mean 'total_training_tokens'"):
        check_allowed(["trainer.totl_training_tokens"])
    monkeypatch.setattr("sys.argv", ["lm-saes", "train", str(run / "settings.json"), "--allow-change", "trainer.lr"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "give --resume with it" in capsys.readouterr().err


TEXT = {"sources": [{"name": "a"}], "hook_points": ["h"], "batch_size": 64}
CACHE = {"sources": [{"type": "activations", "name": "a", "path": "cache"}], "hook_points": ["h"], "batch_size": 64}
MIXED = {"sources": [{"name": "demo"}, {"name": "a"}], "hook_points": ["h"], "batch_size": 64}
MINE, OTHER = {"a": {"dataset_name_or_path": "a.jsonl"}}, {"a": {"dataset_name_or_path": "b.jsonl"}}
DEMO = {"demo": {"dataset_name_or_path": "demo"}}


def part(split: str) -> dict[str, str]:
    return {**MINE["a"], "split": split}


@pytest.mark.parametrize(
    ("factory", "more", "words"),
    [
        (TEXT, {"datasets": MINE}, "text it was trained on"),
        (TEXT, {"datasets": MINE, "eval_datasets": MINE}, "text it was trained on"),
        (TEXT, {"datasets": MINE, "eval_datasets": OTHER}, "held-out text"),
        (TEXT, {"datasets": MINE, "eval_datasets": {"a": part("train[95%:]")}}, "text it may have been trained on"),
        (TEXT, {"datasets": {"a": part("train[:95%]")}, "eval_datasets": {"a": part("train[90%:]")}}, "text it may have been trained on"),
        (TEXT, {"datasets": {"a": part("train[:95%]")}, "eval_datasets": {"a": part("train[95%:]")}}, "held-out text"),
        (TEXT, {"datasets": {"a": part("train[100:200]")}, "eval_datasets": {"a": part("train[:100]")}}, "held-out text"),
        (TEXT, {"datasets": {"a": part("train[:95%]")}, "eval_datasets": {"a": part("train[1000:]")}}, "text it may have been trained on"),
        (TEXT, {"datasets": {"a": part("train[:95%]")}, "eval_datasets": {"a": part("train[-5%:]")}}, "text it may have been trained on"),
        (TEXT, {"datasets": {"a": part("train")}, "eval_datasets": {"a": part("test[:10%]")}}, "held-out text"),
        (TEXT, {"datasets": {"a": DEMO["demo"]}}, "held-out text"),
        (TEXT, {"datasets": {"a": {**DEMO["demo"], "split": "heldout"}}}, "text it was trained on"),
        (MIXED, {"datasets": MINE}, "held-out text and text it was trained on"),
        (CACHE, {}, "activations it was trained on"),
        (CACHE, {"datasets": MINE}, "text it was trained on"),
        (CACHE, {"datasets": MINE, "model": None}, "activations it was trained on"),
        (CACHE, {"eval_datasets": OTHER}, "held-out text"),
        (CACHE, {"datasets": DEMO | MINE, "eval_datasets": OTHER}, "held-out text"),
    ],
)
def test_what_an_evaluation_reads_is_called_held_out_only_where_it_is(factory, more, words):
    assert evaluated_on(TrainSAESettings.model_validate({**BEGUN, "model": {"model_name": "demo"}, "activation_factory": factory, **more})) == words
