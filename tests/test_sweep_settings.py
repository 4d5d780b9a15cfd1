"""Settings of sweeps: grids from the command line and from Python, the runs that they become, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lm_saes.config import SweepSAESettings, TrainSAESettings
from lm_saes.config.base import validated
from lm_saes.config.sweep import parse_grid
from lm_saes.errors import ConfigError

HOOK = "blocks.2.hook_resid_post"


def base(**changes) -> TrainSAESettings:
    table = {
        "sae_name": "mine",
        "sae": {"hook_point_in": HOOK, "d_model": 16, "expansion_factor": 4, "act_fn": "topk", "top_k": 4},
        "trainer": {"lr": 1e-3, "exp_result_path": "runs/x", "seed": 5},
        "model": {"model_name": "demo"},
        "activation_factory": {"sources": [{"name": "demo"}], "hook_points": [HOOK], "batch_size": 64},
        **changes,
    }
    return TrainSAESettings.model_validate(table)


def swept(*words: str, **changes) -> SweepSAESettings:
    return SweepSAESettings.from_grid(base(**changes), parse_grid(words))


# ------------------------------------------------------------------------------------------------------- words to grids

NUMBERS = st.one_of(st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False))
WORDS = st.from_regex(r"[a-z][a-z_.]{0,12}", fullmatch=True).filter(lambda word: word not in ("none", "true", "false", "inf", "nan", "infinity"))
VALUES = st.one_of(NUMBERS, WORDS, st.none(), st.booleans(), st.lists(NUMBERS, min_size=1, max_size=3))


def typed(value: object) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


@given(st.dictionaries(st.from_regex(r"trainer\.[a-z]{1,8}", fullmatch=True), st.lists(VALUES, min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_is_typed_is_what_is_read(grid):
    read = parse_grid([f"{name}={','.join(typed(value) for value in values)}" for name, values in grid.items()])
    assert read == grid
    assert [type(value) for values in read.values() for value in values] == [type(value) for values in grid.values() for value in values]


def test_numbers_without_a_dot_dashes_and_leading_hyphens():
    assert parse_grid(["--trainer.lr-warm-up-steps=1e-4, 3E-4"]) == {"trainer.lr_warm_up_steps": [1e-4, 3e-4]}


@pytest.mark.parametrize("word", ["trainer.lr", "trainer.lr=", "=1", "trainer.lr=1,,2", "trainer.lr=,1", "trainer.lr=1,", ""])
def test_words_that_are_no_grid(word):
    with pytest.raises(ConfigError, match="--grid needs a field and its values"):
        parse_grid([word])


def test_a_field_comes_once():
    with pytest.raises(ConfigError, match=r"trainer.lr comes twice"):
        parse_grid(["trainer.lr=1", "trainer.lr=2"])


# -------------------------------------------------------------------------------------------------------- grids to runs


def test_every_combination_the_first_field_slowest():
    settings = swept("trainer.lr=1e-4,3e-4", "sae.act_fn=topk,batchtopk", "trainer.initial_k=none,8")
    members = settings.members()
    assert [member.sae_name for member in members][:3] == [
        "lr=0.0001,topk,initial_k=none",
        "lr=0.0001,topk,initial_k=8",
        "lr=0.0001,batchtopk,initial_k=none",
    ]
    assert [(member.trainer.lr, member.sae.act_fn, member.trainer.initial_k) for member in members] == [
        (lr, act_fn, k) for lr in (1e-4, 3e-4) for act_fn in ("topk", "batchtopk") for k in (None, 8)
    ]  # fmt: skip
    assert [Path(member.trainer.exp_result_path).parent for member in members] == [Path("runs/x")] * 8
    assert {member.sae_series for member in members} == {"mine"}
    assert {member.data_seed for member in members} == {5}


def test_types_are_those_of_the_fields():
    members = swept("trainer.total_training_tokens=1e6,2e6", "trainer.betas=[0.9,0.99],[0.8,0.9]", "sae.use_decoder_bias=true,false").members()
    assert members[0].trainer.total_training_tokens == 1_000_000
    assert isinstance(members[0].trainer.total_training_tokens, int)
    assert members[2].trainer.betas == (0.8, 0.9)
    assert [member.sae.use_decoder_bias for member in members[:2]] == [True, False]
    assert members[0].sae_name == "total_training_tokens=1e+06,betas=0.9-0.99,use_decoder_bias=true"


@given(st.lists(st.floats(1e-8, 1, exclude_min=True), min_size=2, max_size=5, unique=True))
def test_different_values_have_different_names(rates):
    settings = SweepSAESettings.from_grid(base(), {"trainer.lr": rates})
    assert len({item.sae_name for item in settings.items}) == len(rates)
    assert [member.trainer.lr for member in settings.members()] == rates


def test_values_become_names_that_are_folders():
    (first, second) = swept("trainer.from_pretrained_path=runs/a b,runs/c?*").members()
    assert [Path(member.trainer.exp_result_path).name for member in (first, second)] == ["runs-a-b", "runs-c-"]
    assert first.trainer.from_pretrained_path == "runs/a b"


def test_hook_points_are_united_and_an_sae_stays_one():
    settings = swept("sae.hook_point_in=blocks.1.hook_resid_post,blocks.3.hook_resid_post")
    for member in settings.members():
        assert member.activation_factory.hook_points == ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"], "its own is not needed"
        assert not member.sae.is_transcoder
    assert [member.sae_name for member in settings.members()] == ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
    both = swept("sae.hook_point_out=blocks.3.hook_resid_post," + HOOK)
    assert [member.sae.is_transcoder for member in both.members()] == [True, False]
    assert both.hook_points == [HOOK, "blocks.3.hook_resid_post"]


def test_items_add_the_hook_points_that_the_factory_lacks():
    sae = {"d_model": 16, "expansion_factor": 4, "hook_point_in": "blocks.0.hook_mlp_out"}
    table = {"items": [{"sae_name": "a", "sae": sae, "trainer": {}}], "model": {"model_name": "demo"}, "exp_result_path": "runs/s"}
    (member,) = SweepSAESettings.model_validate({**table, "activation_factory": base().activation_factory.as_dict()}).members()
    assert member.activation_factory.hook_points == [HOOK, "blocks.0.hook_mlp_out"]
    assert member.trainer.exp_result_path == str(Path("runs/s/a"))
    assert member.stream_seed == 0


def test_members_keep_defaults_as_defaults_and_settings_survive_their_file():
    settings = swept("trainer.seed=0,1")
    first = settings.members()[0]
    assert "lr_warm_up_steps" not in first.trainer.model_fields_set
    assert first.data_seed == 5
    assert first.trainer.seed == 0
    assert SweepSAESettings.model_validate(json.loads(json.dumps(settings.model_dump(mode="json", exclude_unset=True)))) == settings


def test_tracking_services_get_a_name_for_each_run():
    settings = swept("trainer.lr=1e-3,1e-4", wandb={"exp_name": "x"}, tensorboard={"log_dir": "logs"})
    assert [item.wandb.exp_name for item in settings.items] == ["x-lr=0.001", "x-lr=0.0001"]
    assert [Path(item.tensorboard.log_dir) for item in settings.items] == [Path("logs/lr=0.001"), Path("logs/lr=0.0001")]
    with pytest.raises(ConfigError, match="wandb_run_id names one run"):
        swept("trainer.lr=1e-3,1e-4", wandb={"wandb_run_id": "abc"})
    with pytest.raises(ConfigError, match="trackio takes one run at a time"):
        swept("trainer.lr=1e-3,1e-4", trackio={})


# ---------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.lrr=1", "did you mean 'lr'"),
        ("traner.lr=1", "did you mean 'trainer'"),
        ("trainer=1", "single fields, such as trainer.lr"),
        ("trainer.lr=1e-3,fast", "the run fast: trainer.lr"),
        ("trainer.lr=1,-1", "greater than 0"),
        ("trainer.lr=true,1", "needs a number"),
        ("trainer.lr=1,1", "the value 1 of trainer.lr twice"),
        ("sae.act_fn=topk,batchtop", "'batchtopk'"),
        ("sae.top_k=4,65", "at most d_sae = 64"),
        ("model.dtype=float32,bfloat16", "make one sweep for each value"),
        ("activation_factory.context_size=32,64", "all its runs read one stream"),
        ("datasets.demo.split=a,b", "one stream"),
        ("stream_seed=1,2", "one stream"),
        ("eval_config.total_eval_tokens=1,2", "evaluated alike"),
        ("trainer.exp_result_path=a,b", "named after the values"),
        ("sae_name=a,b", "fields of sae, initializer, trainer"),
        ("initializer.n_batches=4,8", "initialised from 4 batches"),
    ],
)
def test_a_grid_that_is_none(word, message):
    with pytest.raises(ConfigError, match=message) as raised:
        swept(word)
    assert "\n" not in str(raised.value)


def test_a_grid_in_python_needs_lists():
    for values in ("topk", []):
        with pytest.raises(ConfigError, match="needs a list of values"):
            SweepSAESettings.from_grid(base(), {"sae.act_fn": values})


def test_runs_need_names_and_folders_of_their_own():
    table = swept("trainer.lr=1e-3,1e-4").model_dump(mode="json", exclude_unset=True)
    with pytest.raises(ConfigError, match="different names"):
        validated(SweepSAESettings, {**table, "items": [table["items"][0]] * 2})
    for folders in (("runs/y", "runs/y"), ("runs/x", "runs/z"), ("runs/y", "runs/x/lr=0.001/../../y")):
        items = [{**item, "trainer": {**item["trainer"], "exp_result_path": folder}} for item, folder in zip(table["items"], folders, strict=True)]
        with pytest.raises(ConfigError, match="folders of their own"):
            validated(SweepSAESettings, {**table, "items": items})
    with pytest.raises(ConfigError, match="at least 1 item"):
        validated(SweepSAESettings, {**table, "items": []})


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_names_tell_floats_apart(one, other):
    from lm_saes.config.sweep import _word

    assume(one != other)
    assert _word(one) != _word(other)
    assert math.isclose(float(_word(one)), one, rel_tol=0)
