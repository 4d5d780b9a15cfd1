"""The jobs from settings to a run's folder, over activation functions, normalisations, fine-tuning and resumption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lm_saes import SparseDictionary, TrainSAESettings, evaluate_sae, train_sae
from lm_saes.config import EvaluateSAESettings, SAEConfig, load_settings
from lm_saes.errors import ConfigError, HookPointError, RunFolderError
from lm_saes.records import settings_of_run
from lm_saes.runners import load_run
from lm_saes.training.loggers import Logger
from tests.lm.tiny_models import save_tiny

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model in `model`, text in `text.jsonl`, other text in `held_out.jsonl`."""
    folder = tmp_path_factory.mktemp("material")
    save_tiny("gpt_neox", folder / "model")
    for name, n in (("text", 40), ("held_out", 10)):
        lines = (json.dumps({"text": f"{name} number {i} of a few documents, with some words in it. " * 10}) for i in range(n))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def table(material, tmp_path) -> dict:
    """Settings of a run of eight steps, as JSON values."""
    return {
        "sae_name": "small",
        "device_type": "cpu",
        "sae": {"hook_point_in": HOOK, "d_model": 32, "expansion_factor": 2, "act_fn": "topk", "top_k": 4},
        "trainer": {"total_training_tokens": 1024, "exp_result_path": str(tmp_path / "run"), "log_frequency": 2, "n_checkpoints": 1, "lr": 1e-3},
        "model": {"model_name": str(material / "model")},
        "datasets": {"text": {"dataset_name_or_path": str(material / "text.jsonl")}},
        "activation_factory": {"sources": [{"name": "text"}], "hook_points": [HOOK], "batch_size": 128, "context_size": 32, "model_batch_size": 4},
        "eval_config": {"total_eval_tokens": 200},
    }


def train(table: dict, **changes) -> SparseDictionary:
    options = {name: changes.pop(name) for name in ("resume", "loggers") if name in changes}
    merged = {name: {**table.get(name, {}), **value} if isinstance(value, dict) else value for name, value in changes.items()}
    return train_sae(TrainSAESettings.model_validate({**table, **merged}), **options)


@pytest.mark.parametrize(
    ("sae", "trainer"),
    [
        ({"act_fn": "relu"}, {"sparsity_loss_type": "power", "target_l0": 8}),
        ({"act_fn": "jumprelu"}, {"sparsity_loss_type": "tanh-quad", "lp_coefficient": 1e-3}),
        ({"act_fn": "batchtopk"}, {"auxk_coefficient": 1 / 32}),
        ({"act_fn": "topk", "use_glu_encoder": True}, {"initial_k": 8}),
        ({"act_fn": "topk", "norm_activation": "token-wise"}, {}),
        ({"act_fn": "batchtopk", "norm_activation": "batch-wise"}, {}),
    ],
    ids=["relu-target", "jumprelu", "batchtopk", "glu", "token-wise", "batch-wise"],
)
def test_a_run_leaves_a_dictionary_that_loads_and_is_evaluated(table, sae, trainer):
    trained = train(table, sae=sae, trainer=trainer)
    folder = Path(table["trainer"]["exp_result_path"])
    loaded, settings, model = load_run(folder, device="cpu")
    assert model is not None
    token_wise = sae.get("norm_activation") == "token-wise"
    assert loaded.cfg.norm_activation == ("token-wise" if token_wise else "inference")
    batch = model.to_activations({"text": ["Some words."]}, [HOOK])
    assert torch.equal(loaded.features(batch), trained.features(batch))
    reference = {"pretrained_name_or_path": str(folder)}
    kept = {name: table[name] for name in ("sae_name", "model", "datasets", "activation_factory", "device_type")}
    results = evaluate_sae(EvaluateSAESettings.model_validate({**kept, "sae": reference, "eval": {"total_eval_tokens": 100}}), baseline=True)
    rank = max(1, round(results["sae"]["metrics/l0"]))
    assert set(results) == {"sae", f"pca-{min(rank, 32)}"}
    assert settings.sae_name == "small"


def test_settings_are_kept_as_given_and_as_resolved(table):
    """Defaults stay defaults when the file is read again: those of the device and of the run's length depend on where and how long."""
    train(table)
    folder = Path(table["trainer"]["exp_result_path"])
    assert settings_of_run(folder) == load_settings(TrainSAESettings, folder / "settings.json") == TrainSAESettings.model_validate(table)
    assert "lr_warm_up_steps" not in settings_of_run(folder).trainer.model_fields_set
    assert "device" not in settings_of_run(folder).sae.model_fields_set
    record = json.loads((folder / "settings.json").read_text())
    assert record["versions"].keys() >= {"lm_saes", "torch", "python"}
    assert record["resolved"]["trainer"]["betas"] == [0.9, 0.999]


def test_fine_tuning_starts_from_a_finished_run(table, tmp_path):
    start = train(table)
    other = {"exp_result_path": str(tmp_path / "tuned"), "lr": 1e-9}
    tuned = train({**table, "sae": {"pretrained_name_or_path": table["trainer"]["exp_result_path"]}}, trainer=other)
    torch.testing.assert_close(tuned.W_D, start.W_D, atol=1e-6, rtol=0)
    assert (tmp_path / "tuned/config.json").is_file()
    assert not (tmp_path / "tuned/initialization.json").exists()
    again = train(
        {**table, "sae": {"pretrained_name_or_path": table["trainer"]["exp_result_path"], "dtype": "float64"}},
        trainer={**other, "exp_result_path": str(tmp_path / "wide")},
    )
    assert again.W_D.dtype is torch.float64


def test_fine_tuning_is_refused_before_anything_is_written_where_its_hook_point_is_not_captured(table, tmp_path):
    train(table)
    factory = {"hook_points": ["blocks.1.hook_resid_post"]}
    with pytest.raises(ConfigError, match="lacks"):
        train(
            {**table, "sae": {"pretrained_name_or_path": table["trainer"]["exp_result_path"]}},
            trainer={"exp_result_path": str(tmp_path / "tuned")}, activation_factory=factory,
        )  # fmt: skip
    assert not (tmp_path / "tuned").exists()


def test_a_new_run_from_a_checkpoint(table, tmp_path):
    train(table)
    before = SparseDictionary.from_pretrained(Path(table["trainer"]["exp_result_path"]) / "checkpoints/step_8", fold_activation_scale=False)
    trainer = {"exp_result_path": str(tmp_path / "second"), "from_pretrained_path": table["trainer"]["exp_result_path"], "lr": 1e-9}
    after = train(table, trainer=trainer, fold_activation_scale=False)
    torch.testing.assert_close(after.W_D, before.W_D, atol=1e-6, rtol=0)


def test_evaluation_reads_its_own_text(table, material, monkeypatch):
    read = []
    from lm_saes import assembly

    original = assembly.ActivationFactory.process
    monkeypatch.setattr(
        assembly.ActivationFactory, "process",
        lambda self, **options: (read.append(options["datasets"]["text"].dataset_name_or_path), original(self, **options))[1],
    )  # fmt: skip
    train(table, eval=True, eval_datasets={"text": {"dataset_name_or_path": str(material / "held_out.jsonl")}})
    assert [Path(path).name for path in read] == ["text.jsonl", "held_out.jsonl"]


def test_resuming_a_finished_run_changes_nothing_and_a_used_folder_needs_it(table):
    train(table)
    weights = Path(table["trainer"]["exp_result_path"]) / "sae_weights.safetensors"
    before = weights.read_bytes()
    with pytest.raises(RunFolderError, match="resume"):
        train(table)
    train(table, resume=True)
    assert weights.read_bytes() == before


class Stop(Logger):
    """Interrupts a run at its third step, as Ctrl-C does."""

    def progress(self, step: int) -> None:
        import signal

        if step == 2:
            signal.raise_signal(signal.SIGINT)


def test_a_run_stopped_in_its_middle_ends_as_if_it_had_not_been(table, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(table, loggers=[Stop()])
    folder = Path(table["trainer"]["exp_result_path"])
    with pytest.raises(RunFolderError, match="not finished"):
        load_run(folder)
    train(table, resume=True)
    train(table, trainer={"exp_result_path": str(tmp_path / "whole")})
    assert (folder / "sae_weights.safetensors").read_bytes() == (tmp_path / "whole/sae_weights.safetensors").read_bytes()


def test_a_run_goes_on_with_what_it_began_with(table):
    with pytest.raises(KeyboardInterrupt):
        train(table, loggers=[Stop()])
    with pytest.raises(ConfigError, match=r"sae.top_k = 4, got 5"):
        train(table, sae={"top_k": 5}, resume=True)


def test_widths_and_hook_points_are_checked_before_the_folder_is_made(table):
    with pytest.raises(HookPointError, match="32 wide"):
        train(table, sae={"d_model": 16})
    assert not Path(table["trainer"]["exp_result_path"]).exists()


def test_a_transcoder(table):
    hooks = ["blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"]
    trained = train(table, sae={"hook_point_in": hooks[0], "hook_point_out": hooks[1]}, activation_factory={"hook_points": hooks}, eval=True)
    assert isinstance(trained.cfg, SAEConfig)
    assert trained.cfg.is_transcoder
    results = json.loads((Path(table["trainer"]["exp_result_path"]) / "evaluation.json").read_text())
    assert results["sae"]["metrics/n_tokens"] >= 200
