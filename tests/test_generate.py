"""From settings to a cache, and from a cache to a dictionary without a language model; the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_saes import GenerateActivationsSettings, SparseDictionary, TrainSAESettings, evaluate_sae, generate_activations, train_sae
from lm_saes import generate as generate_module
from lm_saes.activations.cache import ActivationCache
from lm_saes.cli import main
from lm_saes.config import EvaluateSAESettings, LanguageModelConfig
from lm_saes.config.base import validated
from lm_saes.errors import CacheError, ConfigError, HookPointError
from lm_saes.generate import estimate_generation
from lm_saes.training.loggers import Logger
from tests.lm.tiny_models import save_tiny

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]


@pytest.fixture(autouse=True)
def _short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module.estimate_generation, "__defaults__", (None, 0.05))


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model and some text."""
    folder = tmp_path_factory.mktemp("generate")
    save_tiny("gpt_neox", folder / "model")
    lines = (json.dumps({"text": f"number {i} of a few documents, with some words in it that repeat. " * 10}) for i in range(30))
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def table(material: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a small cache, as JSON values."""
    return {
        "model": {"model_name": str(material / "model")}, "dataset_name": "text", "dataset": {"dataset_name_or_path": str(material / "text.jsonl")},
        "hook_points": HOOKS, "output_dir": str(tmp_path / "cache"), "target": "activations-1d", "model_batch_size": 4, "context_size": 32,
        "n_samples_per_chunk": 500, "total_tokens": 2000, "device_type": "cpu",
    }  # fmt: skip


def generate(table: dict[str, Any], **changes: Any) -> Any:
    return generate_activations(GenerateActivationsSettings.model_validate({**table, **changes}))


def training(folder: Path, cache: str, **changes: Any) -> TrainSAESettings:
    table = {
        "sae_name": "small", "device_type": "cpu", "sae": {"hook_point_in": HOOKS[0], "d_model": 32, "expansion_factor": 2, "act_fn": "topk", "top_k": 4},
        "trainer": {"total_training_tokens": 1024, "exp_result_path": str(folder), "log_frequency": 2, "n_checkpoints": 1, "lr": 1e-3},
        "activation_factory": {"sources": [{"type": "activations", "name": "text", "path": cache}], "hook_points": HOOKS[:1], "batch_size": 128,
                               "buffer_size": 600},
        "eval_config": {"total_eval_tokens": 200}, "initializer": {"grid_search_init_norm": True},
    }  # fmt: skip
    return TrainSAESettings.model_validate({**table, **changes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("target", ["activations-1d", "activations-2d"])
def test_a_dictionary_is_trained_from_a_cache_without_a_language_model(table, tmp_path: Path, dtype: str, target: str, monkeypatch) -> None:
    manifest = generate(table, override_dtype=dtype, target=target, n_samples_per_chunk=500 if target == "activations-1d" else 20)
    assert manifest.hook_points == dict.fromkeys(HOOKS, 32)
    identity = manifest.provenance["model_identity"]
    assert identity["tokenizer_hash"]
    monkeypatch.setattr("lm_saes.assembly.load_model", None)
    settings = training(tmp_path / "run", table["output_dir"], eval=True)
    sae = train_sae(settings)
    loaded = SparseDictionary.from_pretrained(tmp_path / "run")
    assert torch.equal(loaded.W_E, sae.W_E)
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sae"]
    assert results["metrics/explained_variance"] > 0
    assert "metrics/delta_ce" not in results
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert json.dumps(identity["tokenizer_hash"]) in json.dumps(record)
    assert LanguageModelConfig.from_pretrained_sae(tmp_path / "run").model_name == table["model"]["model_name"]


def test_with_a_model_and_text_the_evaluation_is_spliced(table, tmp_path: Path, material: Path) -> None:
    generate(table)
    text = {"text": {"dataset_name_or_path": str(material / "text.jsonl")}}
    train_sae(training(tmp_path / "run", table["output_dir"], eval=True, model=table["model"], eval_datasets=text))
    assert "metrics/delta_ce" in json.loads((tmp_path / "run" / "evaluation.json").read_text())["sae"]


def test_a_saved_dictionary_is_evaluated_on_a_cache(table, tmp_path: Path) -> None:
    generate(table)
    train_sae(training(tmp_path / "run", table["output_dir"]))
    kept = training(tmp_path, table["output_dir"]).model_dump(
        mode="json", include={"sae_name", "activation_factory", "device_type"}, exclude_unset=True
    )
    results = evaluate_sae(
        EvaluateSAESettings.model_validate({**kept, "sae": {"pretrained_name_or_path": str(tmp_path / "run")}, "eval": {"total_eval_tokens": 300}})
    )
    assert results["sae"]["metrics/n_tokens"] >= 300


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_interrupted_training_from_a_cache_ends_with_the_same_weights(table, tmp_path: Path, prefetch: int, monkeypatch) -> None:
    generate(table, override_dtype="float16")
    factory = {"sources": [{"type": "activations", "name": "text", "path": table["output_dir"]}], "hook_points": HOOKS[:1], "batch_size": 64,
               "buffer_size": 300, "prefetch": prefetch}  # fmt: skip

    def settings(name: str) -> TrainSAESettings:
        run = training(tmp_path / name, table["output_dir"], activation_factory=factory)
        return run.replace(trainer=run.trainer.replace(n_checkpoints=4, check_point_save_mode="linear"))

    whole = train_sae(settings("whole"))

    class StoppedError(Exception):
        pass

    class Stop(Logger):
        def log(self, step: int, metrics: dict[str, float], console: bool = True) -> None:
            if step >= 10:
                raise StoppedError

    with pytest.raises(StoppedError):
        train_sae(settings("killed"), loggers=[Stop()])
    resumed = train_sae(settings("killed"), resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_width_on_disk_is_checked_before_anything_is_done(table, tmp_path: Path) -> None:
    generate(table)
    sae = {"hook_point_in": HOOKS[0], "d_model": 16, "expansion_factor": 2}
    with pytest.raises(HookPointError, match=r"d_model is 16, but .* is 32 wide on disk; set"):
        train_sae(training(tmp_path / "run", table["output_dir"], sae=sae))
    with pytest.raises(CacheError, match="have no hook point blocks"):
        train_sae(
            training(
                tmp_path / "run", table["output_dir"], sae={**sae, "hook_point_in": "blocks.1.hook_resid_post"},
                activation_factory={"sources": [{"type": "activations", "name": "t", "path": table["output_dir"]}],
                                    "hook_points": ["blocks.1.hook_resid_post"], "batch_size": 4},
            )
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_the_estimate_is_near_what_is_written(table) -> None:
    for target in ("activations-1d", "activations-2d"):
        for dtype in ("float32", "int8"):
            changes = {"output_dir": f"{table['output_dir']}-{target}-{dtype}", "target": target, "override_dtype": dtype}
            settings = GenerateActivationsSettings.model_validate({**table, **changes, "n_samples_per_chunk": 5000, "total_tokens": None})
            needed = estimate_generation(settings, seconds=0.5)
            manifest = generate_activations(settings)
            assert manifest is not None
            assert needed.tokens == pytest.approx(manifest.tokens, rel=0.35)  # from the first documents
            assert needed.disk is not None
            assert needed.disk / needed.tokens == pytest.approx(manifest.bytes / manifest.tokens, rel=0.1)


def test_what_does_not_fit_is_refused_before_the_first_byte(table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000})())
    with pytest.raises(CacheError, match=r"needs .* KiB, 9\.8 KiB are free: free some, lower total_tokens, or set override_dtype"):
        generate(table)
    assert not Path(table["output_dir"]).exists()


def test_settings_that_cannot_be(table) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            validated(GenerateActivationsSettings, {**table, **changes})

    refused('format must be "safetensors", got "pt": pickled files are not written', format="pt")
    refused("a cache holds float32, bfloat16, float16, int8, got float64", override_dtype="float64")
    refused(r"start_shard must lie in \[0, n_shards\) = \[0, 2\), got 2", n_shards=2, start_shard=2)
    refused("dataset is missing", dataset=None)
    refused("a cache holds activations", target="tokens")
    refused("has no field 'dtype'", dtype="int8")
    with pytest.warns(UserWarning, match="without effect in generate: batch_size"):
        generate(table, batch_size=4, total_tokens=100)


def test_processes_share_the_documents(table) -> None:
    assert generate(table, n_shards=2, start_shard=1, total_tokens=None) is None
    manifest = generate(table, n_shards=2, start_shard=0, total_tokens=None)
    cache = ActivationCache(table["output_dir"])
    names = {name for shard in range(len(manifest.shards)) for meta in cache.contexts(shard).meta for name, _, _ in meta["spans"]}
    assert len(names) == 30
    assert manifest.parts == 2


# --------------------------------------------------------------------------------------------------------- commands


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    former, sys.argv = sys.argv, ["lm-saes", *words]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = former
    out, err = capsys.readouterr()
    return code, out, err


def test_the_commands(table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = tmp_path / "cache.json", Path(table["output_dir"])
    config.write_text(json.dumps(table))
    code, out, _ = run(capsys, "generate", str(config), "--dry-run")
    assert (code, folder.exists()) == (0, False)
    assert "it fits" in out
    assert "bytes per token" in out
    code, out, _ = run(capsys, "generate", str(config), "--override_dtype", "int8")
    assert code == 0
    assert "finished: " in out
    assert "2,000 tokens as activations-1d in int8" in out
    code, out, _ = run(capsys, "cache", "verify", str(folder))
    assert code == 0
    assert "4 shards" in out
    assert "all as they were written" in out
    code, out, _ = run(capsys, "cache", "show", str(folder), "--buffer-size", "1000", "--batch-size", "100")
    assert code == 0
    for label in ("rank correlation", "distances of neighbours", "pairs of one context in a batch"):
        assert label in out
    victim = sorted(folder.glob("shard-*"))[1]
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    code, out, err = run(capsys, "cache", "verify", str(folder))
    assert code == 2
    assert victim.name in out
    assert err.count("\n") == 1
    assert "1 of 4 shards" in err
    code, _, err = run(capsys, "cache", "finish", str(folder))
    assert (code, err) == (2, f"error: {folder} is finished\n")
    code, _, err = run(capsys, "generate", str(config))
    assert code == 2
    assert "holds a finished cache with dtype = 'int8', got None" in err
