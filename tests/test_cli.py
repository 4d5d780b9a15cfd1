"""The command as people use it: a real process for exit codes and streams, in-process for the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from lm_saes import cli, commands
from lm_saes.config import TrainSAESettings, load_settings
from tests.command import run
from tests.lm.tiny_models import save_tiny

SHORT = [
    "--trainer.total_training_tokens", "8192", "--activation_factory.batch_size", "1024", "--activation_factory.buffer_size", "2048",
    "--eval_config.total_eval_tokens", "2000", "--trainer.dead_threshold", "1000",
]  # fmt: skip


def process(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lm_saes.cli", *words], capture_output=True, text=True, check=False, **options)


def assert_one_line(text: str) -> None:
    assert text.startswith("error: ")
    assert text.count("\n") == 1, text
    assert "Traceback" not in text


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    return small_run(tmp_path)


def small_run(tmp_path: Path) -> dict:
    """Settings of a small run on a random local model and a local file of text."""
    model = save_tiny("gpt_neox", tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"Number {i} of many documents, with some words in it. " * 12}) for i in range(200)))
    hook = "blocks.1.hook_resid_post"
    return {
        "sae_name": "small",
        "sae": {"hook_point_in": hook, "d_model": 32, "expansion_factor": 2, "act_fn": "topk", "top_k": 4},
        "initializer": {"grid_search_init_norm": True},
        "trainer": {"total_training_tokens": 4096, "exp_result_path": str(tmp_path / "run"), "log_frequency": 2},
        "model": {"model_name": str(model)},
        "datasets": {"text": {"dataset_name_or_path": str(text)}},
        "activation_factory": {
            "sources": [{"name": "text"}],
            "hook_points": [hook],
            "batch_size": 256,
            "buffer_size": 1024,
            "context_size": 32,
            "model_batch_size": 4,
        },
    }


def write(tmp_path: Path, table: dict) -> str:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(table))
    return str(path)


# ------------------------------------------------------------------------------------------------------- what goes well


def test_demo_trains_evaluates_shows_and_is_shown_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lm_saes.commands.FEATURE_TOKENS", 4_000)
    folder = tmp_path / "demo"
    assert run("demo", "--out", str(folder), *SHORT, monkeypatch=monkeypatch) == 0
    output = capsys.readouterr().out
    for expected in ("explained variance", "pca-32", "initialisation", "feature "):
        assert expected in output
    assert output.splitlines()[-1].startswith(f"more of one:  lm-saes show feature {folder} ")
    assert {
        "settings.json",
        "initialization.json",
        "config.json",
        "sae_weights.safetensors",
        "metrics.jsonl",
        "evaluation.json",
        "features.json",
    } <= {path.name for path in folder.iterdir()}
    before = (folder / "sae_weights.safetensors").read_bytes()
    assert run("demo", "--out", str(folder), monkeypatch=monkeypatch) == 0
    assert "finished demo" in capsys.readouterr().out
    assert (folder / "sae_weights.safetensors").read_bytes() == before


def test_train_then_evaluate_then_show(tmp_path, settings, monkeypatch, capsys):
    path = write(tmp_path, settings)
    assert run("train", path, "--sae.top_k", "3", monkeypatch=monkeypatch) == 0
    resolved = json.loads((tmp_path / "run/settings.json").read_text())
    assert resolved["sae"]["top_k"] == 3
    assert json.loads((tmp_path / "run/config.json").read_text())["norm_activation"] == "inference"
    capsys.readouterr()
    assert run("evaluate", str(tmp_path / "run"), "--baseline", "pca", "--eval.total_eval_tokens", "500", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "pca-3" in shown
    assert "evaluation on text it was trained on (eval_datasets names other text)" in " ".join(shown.split())
    assert run("show", str(tmp_path / "run"), "--n", "2", monkeypatch=monkeypatch) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("fires on 0.") == 2
    assert "where each fires in text it was trained on:" in shown
    assert run("show", "feature", str(tmp_path / "run"), "5", "--tokens", "1000", monkeypatch=monkeypatch) == 0
    assert "feature 5" in capsys.readouterr().out


def test_train_from_toml_with_a_transcoder_and_eval(tmp_path, settings, monkeypatch):
    settings["sae"] |= {"hook_point_in": "blocks.0.ln2.hook_normalized", "hook_point_out": "blocks.0.hook_mlp_out"}
    settings["activation_factory"]["hook_points"] = ["blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"]
    settings["eval"] = True
    settings["eval_config"] = {"total_eval_tokens": 500}
    assert run("train", write(tmp_path, settings), monkeypatch=monkeypatch) == 0
    results = json.loads((tmp_path / "run/evaluation.json").read_text())["sae"]
    assert results["metrics/n_tokens"] >= 500
    assert results["metrics/delta_ce"] is not None


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma2", "bert"])
def test_the_same_command_line_on_every_family(family, tmp_path, settings, monkeypatch, capsys):
    """Random models of Pythia's, Llama's, Gemma's and BERT's shape."""
    model = save_tiny(family, tmp_path / family)
    words = ["--model.model_name", str(model), "--eval", "true", "--eval_config.total_eval_tokens", "300", "--trainer.total_training_tokens", "2048"]
    assert run("train", write(tmp_path, settings), *words, monkeypatch=monkeypatch) == 0
    results = json.loads((tmp_path / "run/evaluation.json").read_text())["sae"]
    assert results["metrics/n_tokens"] >= 300
    assert results["metrics/l0"] == pytest.approx(4, abs=1e-6)
    assert ("metrics/final_hidden_cosine" in results) == (family == "bert")
    assert ("metrics/delta_ce" in results) == (family != "bert")
    assert capsys.readouterr().out.splitlines()[-1] == f"look at it:  lm-saes show {tmp_path / 'run'}"
    assert run("show", str(tmp_path / "run"), "--n", "1", monkeypatch=monkeypatch) == 0


def test_evaluate_takes_a_settings_file(tmp_path, settings, monkeypatch, capsys):
    assert run("train", write(tmp_path, settings), monkeypatch=monkeypatch) == 0
    table = {
        **{name: settings[name] for name in ("sae_name", "model", "datasets", "activation_factory")},
        "sae": {"pretrained_name_or_path": str(tmp_path / "run")},
        "eval": {"total_eval_tokens": 300},
    }
    capsys.readouterr()
    assert run("evaluate", write(tmp_path, table), monkeypatch=monkeypatch) == 0
    assert "explained variance" in capsys.readouterr().out


def test_dry_run_trains_nothing_and_says_whether_it_fits(tmp_path, settings, monkeypatch, capsys):
    monkeypatch.setattr("lm_saes.estimate.CALIBRATION_SECONDS", 0.5)
    assert run("train", write(tmp_path, settings), "--dry-run", monkeypatch=monkeypatch) == 0
    output = capsys.readouterr().out
    assert "it fits" in output
    assert "tokens/s" in output
    assert f"{32 * 64 * 2 + 64 + 32:,}" in output
    assert not (tmp_path / "run").exists()


def test_dry_run_names_the_knob_when_it_does_not_fit(tmp_path, settings, monkeypatch, capsys):
    settings["activation_factory"]["buffer_size"] = 10**12
    assert run("train", write(tmp_path, settings), "--dry-run", monkeypatch=monkeypatch) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "the largest part is the shuffle buffer" in words
    assert "set activation_factory.buffer_size = " in words


# ---------------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sae": {"hook_point_in": "blocks.1.hook_resid_pots"}, "hooks": ["blocks.1.hook_resid_pots"]}, "blocks.1.hook_resid_post"),
        ({"sae": {"d_model": 48}}, "d_model is 48, but 'blocks.1.hook_resid_post' is 32 wide"),
        ({"sae": {"top_k": 65}}, "at most d_sae = 64"),
        ({"model": {"model_name": "no/such-model"}}, "huggingface.co/no/such-model"),
        ({"datasets": {"text": {"dataset_name_or_path": "missing.jsonl"}}}, "missing.jsonl"),
        ({"trainer": {"target_l0": 5, "sparsity_loss_type": "power"}}, "target_l0"),
        ({"sae": {"device": "cuda:7"}}, "cuda:7"),
    ],
    ids=["hook", "d_model", "k", "model", "dataset", "joint", "device"],
)
def test_bad_settings_are_one_line_exit_2_and_leave_no_folder(tmp_path, settings, change, message, monkeypatch, capsys):
    if "hooks" in change:
        settings["activation_factory"]["hook_points"] = change.pop("hooks")
    for section, fields in change.items():
        settings[section] = {**settings.get(section, {}), **fields}
    assert run("train", write(tmp_path, settings), monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert_one_line(error)
    assert message in error
    assert not (tmp_path / "run/sae_weights.safetensors").exists()
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "x"], 'Did you mean "train"'),
        (["train", "nowhere.toml"], "no config file at nowhere.toml"),
        (["train", "dmeo"], "did you mean 'demo'"),
        (["train", "demo", "--trainer.lrr", "1"], "did you mean 'lr'"),
        (["train", "demo", "stray"], "expected an override"),
        (["train", "demo", "--resum"], "no option or setting --resum; did you mean '--resume'?"),
        (["train", "demo", "--dryrun", "true"], "no option or setting --dryrun; did you mean '--dry-run'?"),
        (["demo", "--agin"], "did you mean '--again'?"),
        (["train", "demo", "--seed", "1"], "did you mean 'trainer.seed'?"),
        (["sweep", "demo", "--lr", "1e-3", "--grid", "sae.top_k=1,2"], "did you mean 'trainer.lr'?"),
        (["train", "demo", "--text_column", "body"], "did you mean 'datasets.NAME.text_column'?"),
        (["inspect", "--text", "", "--text-column", "body"], "dataset_name_or_path"),
        (["inspect", "--text", ""], "dataset_name_or_path"),
        (["inspect", "--model", "a\0b"], "a character that is no text"),
        (["sweep", "demo", "--gird", "a=1", "--grid", "sae.top_k=1,2"], "did you mean '--grid'?"),
        (["train", "demo", "--batch_size", "8"], "no field 'batch_size'; did you mean 'activation_factory.batch_size'?"),
        (["train", "demo", "--sae.lr", "8"], "SAEConfig has no field 'lr'; it is a field of TrainerConfig"),
        (["train", "demo", "--trainer.top_k", "8"], "TrainerConfig has no field 'top_k'; it is a field of SAEConfig"),
        (["inspect", "--text-column", "body"], "--text-column names a column of --text; give both"),
        (["recipe", "dmeo"], "did you mean 'demo'"),
        (["show", "feature", "runs/x", "abc"], "abc"),
        (["show", "nowhere"], "not a run's folder"),
        (["evaluate", "nowhere"], "neither a run's folder nor a settings file at nowhere"),
        (["evaluate", "nowhere", "--baseline", "pcaa"], "did you mean 'pca'"),
        (["train", "demo", "--trainer.lr"], "lr needs a number, got true"),
        (["train", "demo", "--trainer.lr", "-1"], "greater than 0 (got -1)"),
        (["train", "demo", "--trainer", "3"], "trainer"),
        (["train", "."], ". is a folder; give a settings file, such as the settings.json of a run"),
        (["train", "nowhere"], "no config file or recipe 'nowhere'. Recipes: demo"),
        (["train", "demo", "--trainer.exp_result_path", "a.txt/x", "--dry-run"], "the run's folder a.txt/x would be in the file"),
        (["train", "demo", "--trainer.exp_result_path", "a.txt", "--dry-run"], "the run's folder a.txt is a file"),
        (["train", "demo", "--trainer.exp_result_path", "a" * 300], "name too long"),
        (["train", "demo", "--trainer.exp_result_path", ""], "exp_result_path: String should have at least 1 character"),
        (["train", "demo", "--trainer.from_pretrained_path", "nowhere", "--dry-run"], "no whole checkpoint at nowhere"),
        (["train", "demo", "--dry-run", "--allow-change", "trainer.lr"], "give --resume with it"),
        (["train", "demo", "--dry-run", "--resume", "--allow-change", "trainer.seed"], "trainer.seed cannot change when a run goes on; what can"),
        (["sweep", "demo", "--grid", "sae.top_k=8,16", "--out", "a.txt", "--dry-run"], "would be in the file"),
        (["inspect", "--context-size", "0"], "context_size: Input should be greater than or equal to 2 (got 0)"),
        (["bench", "synthetic", "--out", "a.txt"], "cannot write a.txt"),
        (["train"], "lm-saes train needs CONFIG"),
        (["show", "runs/x", "17"], "unexpected 17"),
        (["show", "runs/x", "--n", "0"], "--n must be at least 1"),
        (["show", "feature", "runs/x", "1", "--tokens", "-1"], "--tokens must be at least 1"),
        (["demo", "--trainer.lr", "1", "--out"], "needs a value after --out"),
    ],
)
def test_bad_words_are_one_line_and_exit_2(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    assert run(*words, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert_one_line(error)
    assert message in error


def test_a_used_folder_is_refused_and_resume_is_named(tmp_path, settings, monkeypatch, capsys):
    path = write(tmp_path, settings)
    assert run("train", path, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert run("train", path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert_one_line(error)
    assert "resume" in error


def test_a_runs_settings_are_a_settings_file(tmp_path, settings, monkeypatch):
    assert run("train", write(tmp_path, settings), monkeypatch=monkeypatch) == 0
    words = ["train", str(tmp_path / "run/settings.json"), "--trainer.exp_result_path", str(tmp_path / "again")]
    assert run(*words, monkeypatch=monkeypatch) == 0
    assert (tmp_path / "again/sae_weights.safetensors").read_bytes() == (tmp_path / "run/sae_weights.safetensors").read_bytes()


def test_overrides_of_an_evaluation_that_do_not_exist(short_demo_run, monkeypatch, capsys):
    for words, message in [
        (["--trainer.lr", "1"], "--trainer"),
        (["--eval"], "--eval without a field"),
        (["--eval.total_eval_tokens", "-4"], "total_eval_tokens"),
        (["--eval.total_tokens", "4"], "did you mean 'total_eval_tokens'"),
    ]:
        assert run("evaluate", str(short_demo_run), *words, monkeypatch=monkeypatch) == 2
        error = capsys.readouterr().err
        assert_one_line(error)
        assert message in error


def test_nothing_but_a_run_is_ever_removed(tmp_path, settings, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/settings.json").write_text('{"editor.tabSize": 4}')
    assert run("demo", "--out", str(tmp_path / "work"), "--again", monkeypatch=monkeypatch) == 2
    assert_one_line(capsys.readouterr().err)
    assert (tmp_path / "work/settings.json").read_text() == '{"editor.tabSize": 4}'
    assert run("train", write(tmp_path, settings), monkeypatch=monkeypatch) == 0
    (tmp_path / "run/notes.txt").write_text("mine")
    commands.remove_run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_run_that_is_not_finished_says_how_to_finish_it(tmp_path, settings, monkeypatch, capsys):
    assert run("train", write(tmp_path, settings), monkeypatch=monkeypatch) == 0
    (tmp_path / "run/config.json").unlink()
    for words in (["show"], ["show", "feature"], ["evaluate"]):
        capsys.readouterr()
        assert run(*words, str(tmp_path / "run"), *(["3"] if words[-1] == "feature" else []), monkeypatch=monkeypatch) == 2
        captured = capsys.readouterr()
        assert_one_line(captured.err)
        assert "--resume" in captured.err
        assert not captured.out


def test_a_run_whose_language_model_is_gone(tmp_path, settings, monkeypatch, capsys):
    assert run("train", write(tmp_path, settings), monkeypatch=monkeypatch) == 0
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert run("show", str(tmp_path / "run"), monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert_one_line(error)
    assert str(tmp_path / "model") in error


def test_activations_that_are_not_finite_stop_the_run_in_one_line(tmp_path, settings, monkeypatch, capsys):
    import safetensors.torch

    file = tmp_path / "model/model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = next(name for name in weights if name.endswith("layers.1.mlp.dense_4h_to_h.weight"))
    weights[name][0, 0] = float("nan")
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    assert run("train", write(tmp_path, settings), monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert_one_line(error)
    assert "blocks.1.hook_resid_post" in error
    assert not (tmp_path / "run/sae_weights.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_that_goes_away_does_not_stop_the_work(tmp_path, settings):
    command = f"{sys.executable} -m lm_saes.cli train {write(tmp_path, settings)} | head -n 1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert (result.returncode, result.stdout.count("\n")) == (0, 1), result.stderr
    assert not result.stderr
    assert (tmp_path / "run/sae_weights.safetensors").is_file()


def test_a_feature_that_does_not_exist(short_demo_run, monkeypatch, capsys):
    assert run("show", "feature", str(short_demo_run), "99999", monkeypatch=monkeypatch) == 2
    assert "features 0 to 1535" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_writes_a_checkpoint_exits_130_and_resume_finishes_as_if_nothing_had_been(tmp_path, settings):
    """A real process, a real signal; the resumed run's weights equal those of one that was never interrupted, bit for bit."""
    settings["trainer"] |= {"total_training_tokens": 40_000, "n_checkpoints": 2, "log_frequency": 1}
    settings["activation_factory"] |= {"model_batch_size": 1}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = subprocess.Popen(
        [sys.executable, "-m", "lm_saes.cli", "train", write(tmp_path, settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run/sae_weights.safetensors").exists()
    resumed = process("train", write(tmp_path, settings), "--resume", env=environment)
    assert resumed.returncode == 0, resumed.stderr
    settings["trainer"]["exp_result_path"] = str(tmp_path / "whole")
    whole = process("train", write(tmp_path, settings), env=environment)
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "run/sae_weights.safetensors").read_bytes() == (tmp_path / "whole/sae_weights.safetensors").read_bytes()


def test_a_full_disk_is_one_line(tmp_path, settings, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "run/metrics.jsonl")

    monkeypatch.setattr("lm_saes.runners.write_json", full)
    assert run("train", write(tmp_path, settings), monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert_one_line(error)
    assert "disk is full" in error


def test_a_recipe_is_printed_to_be_changed(capsys, monkeypatch, tmp_path):
    """What is installed from a wheel has no folder of recipes to copy from."""
    assert run("recipe", monkeypatch=monkeypatch) == 0
    names = capsys.readouterr().out.split()
    assert {"demo", "demo-transcoder"} <= set(names)
    assert names == sorted(names)
    for name in names:
        assert run("recipe", name, monkeypatch=monkeypatch) == 0
        (tmp_path / "my.toml").write_text(capsys.readouterr().out, encoding="utf-8")
        assert load_settings(TrainSAESettings, tmp_path / "my.toml") == load_settings(TrainSAESettings, cli.recipe(name))


def test_text_in_a_column_of_another_name_can_be_inspected(tmp_path, settings, capsys, monkeypatch):
    text = tmp_path / "body.jsonl"
    text.write_text("\n".join(json.dumps({"body": f"Number {i} of some documents. " * 9}) for i in range(60)))
    words = ["inspect", "--model", settings["model"]["model_name"], "--text", str(text), "--tokens", "500", "--hook-points", "blocks.0.hook_mlp_out"]
    assert run(*words, monkeypatch=monkeypatch) == 2
    assert "set text_column" in capsys.readouterr().err
    assert run(*words, "--text-column", "body", monkeypatch=monkeypatch) == 0
    assert "blocks.0.hook_mlp_out" in capsys.readouterr().out


def test_warnings_are_one_line_without_a_place_in_the_code(tmp_path, settings):
    settings["sae"] |= {"act_fn": "relu"}
    ended = process("train", write(tmp_path, settings))
    assert ended.returncode == 0
    assert 'warning: act_fn "relu" without a sparsity loss trains a dense autoencoder;' in ended.stderr
    assert ".py" not in ended.stderr


def test_a_run_on_activations_from_disk_is_shown_without_features(tmp_path, settings, capsys, monkeypatch):
    """It ended in an error after the summary."""
    folder = tmp_path / "own"
    folder.mkdir()
    numpy.save(folder / "a.npy", numpy.random.default_rng(0).normal(size=(4096, 8)).astype("float32"))
    del settings["model"], settings["datasets"]
    settings["sae"] = {"hook_point_in": "h", "d_model": 8, "expansion_factor": 2, "act_fn": "topk", "top_k": 2}
    settings["activation_factory"] = {"sources": [{"name": "own", "path": str(folder)}], "hook_points": ["h"], "batch_size": 256}
    assert run("train", write(tmp_path, settings), monkeypatch=monkeypatch) == 0
    assert run("show", tmp_path / "run", monkeypatch=monkeypatch) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "activations own (" in shown
    assert "no features: this run was trained without a language model" in shown
    assert run("show", "feature", tmp_path / "run", "1", monkeypatch=monkeypatch) == 2
    assert_one_line(capsys.readouterr().err)
