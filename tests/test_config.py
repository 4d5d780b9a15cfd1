"""Configurations: the page's snippets, strictness, data types by name, files, overrides and one-line errors."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lm_saes.config import (
    ActivationFactoryConfig,
    ActivationFactoryTarget,
    BaseSAEConfig,
    InitializerConfig,
    LanguageModelConfig,
    PretrainedSAE,
    SAEConfig,
    SparseDictionaryConfig,
    TrainerConfig,
    TrainSAESettings,
    load_settings,
)
from lm_saes.config.base import dtype_name, merge, parse_overrides, read_config_file, validated
from lm_saes.errors import ConfigError, WeightsError


def test_the_page_verbatim():
    sae_config = SAEConfig(
        # SAE-specific parameters
        hook_point_in="blocks.6.hook_resid_post",
        hook_point_out="blocks.6.hook_resid_post",  # Same as hook_point_in for SAE
        use_glu_encoder=False,
        # Common parameters (documented in Sparse Dictionaries overview)
        d_model=768,
        expansion_factor=8,
        act_fn="topk",
        top_k=64,
        dtype=torch.float32,
        device="cuda",
    )
    assert (sae_config.d_sae, sae_config.dtype, sae_config.device, sae_config.is_transcoder) == (6144, torch.float32, "cuda", False)
    InitializerConfig(bias_init_method="geometric_median", grid_search_init_norm=True, init_encoder_bias_with_mean_hidden_pre=True)
    initializer = InitializerConfig(
        bias_init_method="geometric_median",
        grid_search_init_norm=True,
        init_encoder_bias_with_mean_hidden_pre=True,
        initialize_W_D_with_active_subspace=True,
        d_active_subspace=384,  # Adjust based on effective rank (e.g., 0.5 * d_model)
    )
    assert initializer.d_active_subspace == 384


def sae(**changes):
    return SAEConfig(**{"hook_point_in": "blocks.0.hook_resid_post", "d_model": 16, "expansion_factor": 4, **changes})


def test_hook_point_out_defaults_to_in_and_another_makes_a_transcoder():
    assert sae().hook_point_out == "blocks.0.hook_resid_post"
    assert sae(hook_point_out="blocks.0.hook_mlp_out").is_transcoder
    assert sae(hook_point_out="b").associated_hook_points == ["blocks.0.hook_resid_post", "b"]


def test_base_alias_and_abstractness():
    assert BaseSAEConfig is SparseDictionaryConfig
    with pytest.raises(TypeError, match="abstract"):
        SparseDictionaryConfig(sae_type="sae", d_model=4, expansion_factor=1)  # pyright: ignore[reportAbstractUsage]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expansion_facter": 3}, "did you mean 'expansion_factor'"),
        ({"top_k": 65, "act_fn": "topk"}, "at most d_sae = 64, got 65"),
        ({"expansion_factor": 0.01}, "leaves no latent"),
        ({"device": "gpu"}, "device must be cpu, cuda"),
        ({"dtype": "float31"}, "did you mean 'float32'"),
        ({"act_fn": "layertopk"}, "'relu', 'jumprelu', 'topk' or 'batchtopk'"),
        ({"dataset_average_activation_norm": {"elsewhere": 1.0}}, "not hook points of this dictionary"),
        ({"dataset_average_activation_norm": {"blocks.0.hook_resid_post": 0.0}}, "positive numbers"),
    ],
)
def test_wrong_values_say_what_was_wanted(changes, message):
    with pytest.raises(ValidationError, match=message):
        sae(**changes)


def test_configs_are_frozen_and_replace_validates():
    cfg = sae(top_k=3)
    with pytest.raises(ValidationError):
        cfg.top_k = 4
    assert cfg.replace(top_k=5).top_k == 5
    with pytest.raises(ValidationError):
        cfg.replace(top_k=-1)
    assert "expansion_factor" in cfg.replace(top_k=5).model_fields_set
    assert "use_decoder_bias" not in cfg.replace(top_k=5).model_fields_set


@pytest.mark.parametrize("given", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_are_names_inside_and_torch_dtypes_outside(given):
    cfg = sae(dtype=given)
    assert cfg.dtype is torch.bfloat16
    assert cfg.as_dict()["dtype"] == "bfloat16"
    assert sae(**cfg.as_dict()) == cfg


def test_every_documented_dtype_name_is_accepted():
    for name in [
        "float16",
        "float32",
        "float64",
        "fp16",
        "fp32",
        "fp64",
        "bfloat16",
        "bf16",
        "float",
        "int8",
        "int16",
        "int32",
        "int64",
        "int",
        "bool",
    ]:
        assert getattr(torch, dtype_name(name)) is getattr(torch, dtype_name(f"torch.{name}"))


def test_amp_dtype_is_auto_a_half_type_or_none():
    assert TrainerConfig().amp_dtype == "auto"
    assert TrainerConfig(amp_dtype="bf16").amp_dtype is torch.bfloat16
    assert TrainerConfig(amp_dtype=torch.float32).amp_dtype is None
    with pytest.raises(ValidationError):
        TrainerConfig(amp_dtype="int8")


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_warm_up_steps": 1.5},
        {"lr_end_ratio": 1.1},
        {"betas": (0.9, 1.0)},
        {"initial_k": 0},
        {"initial_k": 1.5},
        {"l1_coefficient": -1.0},
        {"target_l0": 10},
    ],
)
def test_trainer_refuses(changes):
    with pytest.raises(ValidationError):
        TrainerConfig(**changes)


def test_steps_keep_ints_and_fractions_apart():
    assert type(TrainerConfig(lr_warm_up_steps=1).lr_warm_up_steps) is int
    assert type(TrainerConfig(lr_warm_up_steps=1.0).lr_warm_up_steps) is float


def test_options_that_are_not_available_are_refused():
    with pytest.raises(ValidationError, match="not available"):
        InitializerConfig(initialize_lorsa_with_mhsa=True)


def test_a_start_from_the_mlp_is_not_overwritten():
    for options in ({"init_encoder_with_decoder_transpose": True}, {"initialize_W_D_with_active_subspace": True, "d_active_subspace": "auto"}):
        with pytest.raises(ValidationError, match="would overwrite what initialize_tc_with_mlp makes"):
            InitializerConfig(initialize_tc_with_mlp=True, **options)
    with pytest.raises(ValidationError, match="model_layer is the layer of initialize_tc_with_mlp"):
        InitializerConfig(model_layer=3)


def test_a_skip_connection_needs_another_hook_point():
    with pytest.raises(ValidationError, match="the identity would reconstruct everything"):
        SAEConfig(hook_point_in="h", d_model=8, expansion_factor=2, use_skip_connection=True)


def training_settings(**changes):
    table = {
        "sae_name": "x",
        "sae": {"hook_point_in": "h", "d_model": 8, "expansion_factor": 2},
        "trainer": {},
        "model": {"model_name": "demo"},
        "activation_factory": {"sources": [{"name": "demo"}], "hook_points": ["h"], "batch_size": 4},
    }
    return merge(table, changes)


def test_settings_choose_between_a_new_dictionary_and_saved_weights():
    assert isinstance(validated(TrainSAESettings, training_settings()).sae, SAEConfig)
    saved = training_settings()
    saved["sae"] = {"pretrained_name_or_path": "runs/x"}
    assert isinstance(validated(TrainSAESettings, saved).sae, PretrainedSAE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": {"hook_point_out": "other"}}, "hook_points lacks"),
        ({"sae": {"topk": 1}}, "^sae: SAEConfig has no field 'topk'; did you mean 'top_k'"),
        ({"activation_factory": {"sources": [{"name": "web"}]}}, "source 'web' has no entry in datasets"),
        ({"activation_factory": {"batch_size": 0}}, "^activation_factory.batch_size: .*(got 0)"),
        ({"model": None}, "needs a language model"),
        ({"mongo": {"mongo_uri": "x"}}, "mongo is not supported"),
        ({"data_parallel_size": 2}, "must be 1"),
    ],
)
def test_errors_in_settings_are_one_line_that_names_the_place(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        validated(TrainSAESettings, training_settings(**changes))
    assert "\n" not in str(error.value)


def test_settings_ignore_the_environment(monkeypatch):
    monkeypatch.setenv("DEVICE_TYPE", "cuda")
    monkeypatch.setenv("SAE_SERIES", "theirs")
    cfg = validated(TrainSAESettings, training_settings())
    assert (cfg.device_type, cfg.sae_series) == ("auto", "default")


def test_settings_survive_json():
    cfg = validated(TrainSAESettings, training_settings(trainer={"amp_dtype": "bf16"}, sae={"dtype": "float64"}))
    again = validated(TrainSAESettings, json.loads(json.dumps(cfg.as_dict())))
    assert again.as_dict() == cfg.as_dict()


def test_files_in_three_formats_say_the_same(tmp_path):
    (tmp_path / "a.toml").write_text('sae_name = "x"\n[trainer]\nlp_coefficient = "none"\n')
    (tmp_path / "a.yaml").write_text("sae_name: x\ntrainer:\n  lp_coefficient: null\n")
    (tmp_path / "a.json").write_text('{"sae_name": "x", "trainer": {"lp_coefficient": null}}')
    tables = [read_config_file(tmp_path / f"a.{suffix}") for suffix in ("toml", "yaml", "json")]
    assert tables[0] == tables[1] == tables[2] == {"sae_name": "x", "trainer": {"lp_coefficient": None}}


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", "x = ["), ("a.yaml", "a: [\n"), ("a.json", "{"), ("a.json", "[1]"), ("a.ini", ""), ("a.yaml", "- 1")]
)
def test_broken_files_are_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config_file(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean 'recipe\.toml'"):
        read_config_file(tmp_path / "recpie.toml")


def test_yaml_runs_no_code(tmp_path):
    (tmp_path / "a.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError):
        read_config_file(tmp_path / "a.yaml")


def test_overrides_are_laid_over_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(training_settings()))
    words = [
        "--trainer.lr",
        "1e-4",
        "--sae.top-k=3",
        "--sae.act_fn",
        "topk",
        "--activation_factory.sources.0.sample_weights",
        "2",
        "--eval",
        "--trainer.betas",
        "[0, 0.9]",
    ]
    cfg = load_settings(TrainSAESettings, path, parse_overrides(words))
    assert isinstance(cfg.sae, SAEConfig)
    assert (cfg.trainer.lr, cfg.sae.top_k, cfg.sae.act_fn, cfg.eval, cfg.trainer.betas) == (1e-4, 3, "topk", True, (0, 0.9))
    assert cfg.activation_factory.sources[0].sample_weights == 2


@pytest.mark.parametrize("words", [["trainer.lr", "1"], ["--"], ["--a", "1", "--a.b", "2"]])
def test_malformed_overrides_are_refused(words):
    with pytest.raises(ConfigError):
        parse_overrides(words)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False, width=32),
        lambda inner: st.lists(inner, max_size=3),
    )
)
def test_overrides_read_back_any_json_value(value):
    text = "none" if value is None else json.dumps(value)
    assert parse_overrides([f"--a.b={text}"]) == {"a": {"b": value}}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from("abc"), st.integers() | st.dictionaries(st.sampled_from("xy"), st.integers())),
    st.dictionaries(st.sampled_from("abc"), st.integers()),
)
def test_merge_keeps_what_is_not_overridden_and_leaves_its_arguments_alone(base, overrides):
    before = json.dumps(base, sort_keys=True)
    merged = merge(base, overrides)
    assert json.dumps(base, sort_keys=True) == before
    assert {**{key: value for key, value in base.items() if key not in overrides}, **overrides} == merged


def test_hyperparameters_round_trip_without_device_and_dtype(tmp_path):
    cfg = sae(device="cuda", dtype="bf16", act_fn="topk", top_k=7, dataset_average_activation_norm={"blocks.0.hook_resid_post": 1 / 3})
    cfg.save_hyperparameters(tmp_path, provenance={"seed": 3})
    table = json.loads((tmp_path / "config.json").read_text())
    assert "device" not in table
    assert "dtype" not in table
    assert table["provenance"] == {"seed": 3}
    assert SAEConfig.from_pretrained(tmp_path, device="cuda", dtype="bf16") == cfg


def test_damaged_hyperparameters_are_one_line(tmp_path):
    with pytest.raises(WeightsError, match=r"no config\.json"):
        SAEConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        SAEConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"schema_version": 99}')
    with pytest.raises(WeightsError, match="schema version 99"):
        SAEConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="create it first"):
        sae().save_hyperparameters(tmp_path / "missing")


def test_factory_and_targets():
    cfg = ActivationFactoryConfig(sources=[{"name": "a"}], hook_points=["h"], batch_size=2, target="activations-2d")  # pyright: ignore[reportArgumentType]
    assert cfg.target is ActivationFactoryTarget.ACTIVATIONS_2D
    assert ActivationFactoryTarget.TOKENS < ActivationFactoryTarget.ACTIVATIONS_2D < ActivationFactoryTarget.ACTIVATIONS_1D
    with pytest.raises(ValidationError, match="different names"):
        ActivationFactoryConfig(sources=[{"name": "a"}, {"name": "a"}], hook_points=["h"], batch_size=2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValidationError, match="at least batch_size"):
        ActivationFactoryConfig(sources=[{"name": "a"}], hook_points=["h"], batch_size=8, buffer_size=4)  # pyright: ignore[reportArgumentType]


def test_language_model_config_of_a_saved_dictionary(tmp_path):
    lm = LanguageModelConfig(model_name="demo", max_length=64)
    sae().save_hyperparameters(tmp_path, provenance={"model": lm.model_dump(mode="json", exclude={"device"})})
    assert LanguageModelConfig.from_pretrained_sae(tmp_path).max_length == 64
    lm.replace(max_length=32).save_lm_config(tmp_path)
    assert LanguageModelConfig.from_pretrained_sae(tmp_path).max_length == 32


def test_remote_code_is_off_by_default():
    assert LanguageModelConfig().trust_remote_code is False


@pytest.mark.parametrize("build", [sae, LanguageModelConfig], ids=["dictionary", "language model"])
def test_weights_are_floating_point_numbers(build):
    """Integers passed before, and ended in a traceback of torch."""
    with pytest.raises(ValidationError, match="floating-point numbers: bfloat16, float16, float32, float64; got 'int8'"):
        build(dtype="int8")


@pytest.mark.parametrize("act_fn", ["topk", "batchtopk"])
def test_a_top_k_that_lets_nothing_fire_is_refused(act_fn):
    with pytest.raises(ValidationError, match="top_k must be at least 1 and at most d_sae = 64, got 0; set how many"):
        sae(d_model=8, expansion_factor=8, act_fn=act_fn, top_k=0)
    assert sae(d_model=8, expansion_factor=8, act_fn="relu", top_k=0).top_k == 0  # no k there


def test_a_source_of_an_unknown_type_is_told_which_there_are():
    with pytest.raises(ConfigError, match=r"^sources.0: no type 'datset'; there are 'dataset', 'activations'$"):
        validated(ActivationFactoryConfig, {"sources": [{"name": "a", "type": "datset"}], "hook_points": ["h"], "batch_size": 1})


def settings_table(**changes):
    return {
        "sae_name": "a",
        "sae": {"hook_point_in": "h", "d_model": 4, "expansion_factor": 2},
        "trainer": {},
        "model": {"model_name": "demo"},
        "activation_factory": {"sources": [{"name": "demo"}], "hook_points": ["h"], "batch_size": 2},
        **changes,
    }


def test_the_size_of_an_evaluation_is_not_where_a_training_says_that_there_is_one():
    with pytest.raises(ConfigError, match=r"eval is true or false in a training; .* stands in eval_config"):
        validated(TrainSAESettings, settings_table(eval={"total_eval_tokens": 5}))


def test_training_in_float16_weights_is_refused_with_what_was_meant():
    table = settings_table()
    with pytest.raises(ConfigError, match=r'cannot be trained in float16.*trainer.amp_dtype = "float16"'):
        validated(TrainSAESettings, {**table, "sae": {**table["sae"], "dtype": "float16"}})
    with pytest.raises(ConfigError, match="cannot be trained in float16"):
        validated(TrainSAESettings, {**table, "sae": {"pretrained_name_or_path": "runs/a", "dtype": "float16"}})
    for dtype in ("bfloat16", "float32", "float64"):
        assert validated(TrainSAESettings, {**table, "sae": {**table["sae"], "dtype": dtype}})
