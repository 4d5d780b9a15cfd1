"""Baselines: what is frozen stays bit for bit while the rest learns, an untrained model is another one, and both stand beside the run that they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lm_saes import cli, ops
from lm_saes.config import LanguageModelConfig, TrainerConfig, TrainSAESettings
from lm_saes.config.baselines import baseline_of, baseline_settings
from lm_saes.config.synthetic import SyntheticBenchmarkConfig
from lm_saes.errors import ConfigError
from lm_saes.lm.language_model import load_model
from lm_saes.models.sae import SparseAutoEncoder
from lm_saes.records import settings_of_run
from lm_saes.training.trainer import Trainer
from tests.evaluation.test_synthetic_benchmark import tiny
from tests.lm.tiny_models import save_tiny
from tests.training.synthetic import SyntheticStream, make_dictionary

RESID = "blocks.0.hook_resid_post"


def fit(sae: SparseAutoEncoder, folder: Path, steps: int, **fields) -> Trainer:
    trainer = Trainer(TrainerConfig(exp_result_path=str(folder), total_training_tokens=64 * steps, lr_warm_up_steps=0, n_checkpoints=1, **fields))
    trainer.fit(sae, SyntheticStream())
    return trainer


@pytest.mark.parametrize("implementation", ["reference", "sparse"])
@pytest.mark.parametrize(
    ("act_fn", "shape", "trainer"),
    [
        ("topk", {"use_glu_encoder": True}, {"auxk_coefficient": 1 / 32, "dead_threshold": 64}),
        ("batchtopk", {}, {"clip_grad_norm": 0.5}),
        ("jumprelu", {}, {"sparsity_loss_type": "tanh", "lp_coefficient": 1e-3}),
        ("relu", {}, {"sparsity_loss_type": "power", "optimizer_class": "sparseadam"}),
    ],
)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_frozen_part_stays_and_all_else_learns(part, act_fn, shape, trainer, implementation, tmp_path, monkeypatch):
    monkeypatch.setenv("LM_SAES_OPS", implementation)
    ops.explain()
    sae = make_dictionary(act_fn, **shape)
    before = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    fit(sae, tmp_path / "run", 6, frozen=part, **trainer)
    encoder = {"W_E", "b_E", "W_E_glu", "b_E_glu"} & set(before)
    same = {name for name, parameter in sae.named_parameters() if torch.equal(parameter, before[name])}
    assert same == (encoder if part == "encoder" else {"W_D"})
    state = {name.split("/")[2] for name in _checkpoint(tmp_path / "run") if name.startswith("step/optimizer/")}
    assert state == set(before) - same
    assert all(parameter.requires_grad for parameter in sae.parameters())


def _checkpoint(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (path for path in (run / "checkpoints").rglob("*.safetensors") if "optimizer" in path.name)
    return load_file(path)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_first_step_of_what_is_trained_is_that_of_a_run_without_frozen_parts(part, tmp_path):
    free, frozen = make_dictionary("topk"), make_dictionary("topk")
    fit(free, tmp_path / "free", 1)
    fit(frozen, tmp_path / "frozen", 1, frozen=part)
    kept = {"encoder": {"W_E", "b_E"}, "decoder": {"W_D"}}[part]
    for (name, one), (_, other) in zip(free.named_parameters(), frozen.named_parameters(), strict=True):
        assert torch.equal(one, other) == (name not in kept), name


def test_an_untrained_model_depends_on_its_seed_alone_and_says_so(tmp_path):
    folder = str(save_tiny("llama", tmp_path / "model"))
    state = torch.get_rng_state()

    def weights(seed: int | None) -> torch.Tensor:
        model = load_model(LanguageModelConfig(model_name=folder, device="cpu", random_weights=seed))
        assert model.provenance().get("random_weights") == seed
        return model.capture(torch.tensor([[1, 2, 3]]), None, [RESID])[RESID]

    trained, first, again, other = weights(None), weights(0), weights(0), weights(1)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a.shape == b.shape and not torch.allclose(a, b, atol=1e-3) for a, b in [(trained, first), (first, other)])


# ------------------------------------------------------------------------------------------------------------ settings


def settings(tmp_path: Path, **changes) -> TrainSAESettings:
    table = {
        "sae_name": "small",
        "device_type": "cpu",
        "sae": {"hook_point_in": RESID, "d_model": 32, "expansion_factor": 2, "act_fn": "topk", "top_k": 4},
        "trainer": {"total_training_tokens": 1024, "exp_result_path": str(tmp_path / "run"), "n_checkpoints": 0, "lr": 1e-3},
        "model": {"model_name": str(tmp_path / "model")},
        "datasets": {"text": {"dataset_name_or_path": str(tmp_path / "text.jsonl")}},
        "activation_factory": {"sources": [{"name": "text"}], "hook_points": [RESID], "batch_size": 128, "context_size": 32, "model_batch_size": 4},
        "eval_config": {"total_eval_tokens": 200},
    }
    return TrainSAESettings.model_validate({**table, **changes})


@pytest.mark.parametrize("name", ["frozen-decoder", "frozen-encoder", "untrained-lm"])
def test_a_baseline_is_the_run_with_one_thing_changed(name, tmp_path):
    run = settings(tmp_path)
    baseline = baseline_settings(run, name)
    assert baseline_of(run) is None
    assert baseline_of(baseline) == name
    assert Path(baseline.trainer.exp_result_path) == tmp_path / "run/baselines" / name
    given, changed = run.model_dump(exclude_unset=True), baseline.model_dump(exclude_unset=True)
    differing = {
        (part, field)
        for part in ("sae", "trainer", "model", "activation_factory")
        for field in changed[part]
        if changed[part][field] != given[part].get(field)
    }
    assert (
        differing
        == {("trainer", "exp_result_path")}
        | {
            "frozen-decoder": {("trainer", "frozen")},
            "frozen-encoder": {("trainer", "frozen"), ("sae", "sparsity_include_decoder_norm")},
            "untrained-lm": {("model", "random_weights")},
        }[name]
    )


def test_metrics_of_a_baseline_go_beside_those_of_its_run(tmp_path):
    run = settings(tmp_path, wandb={"wandb_run_id": "abc", "wandb_resume": "allow"}, tensorboard={"log_dir": "events"}, trackio={"name": "mine"})
    of_it = baseline_settings(run, "frozen-decoder")
    assert of_it.wandb is not None
    assert (of_it.wandb.wandb_run_id, of_it.wandb.exp_name) == ("abc-frozen-decoder", f"{run.sae_name}-frozen-decoder")
    assert of_it.tensorboard is not None
    assert of_it.tensorboard.log_dir == str(Path("events") / "frozen-decoder")
    assert of_it.trackio is not None
    assert of_it.trackio.name == "mine-frozen-decoder"


def test_baselines_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'frozen-encoder'"):
        baseline_settings(settings(tmp_path), "frozen-encoders")
    with pytest.raises(ConfigError, match=r"no baseline 'pca' here; lm-saes evaluate RUN --baseline pca fits it\. Baselines: frozen-decoder"):
        baseline_settings(settings(tmp_path), "pca")
    with pytest.raises(ConfigError, match="starts from trained weights"):
        baseline_settings(settings(tmp_path, sae={"pretrained_name_or_path": "there"}), "frozen-decoder")
    stored = {"sources": [{"name": "text", "path": "there"}], "hook_points": [RESID], "batch_size": 128}
    with pytest.raises(ConfigError, match="come from disk"):
        baseline_settings(settings(tmp_path, activation_factory=stored), "untrained-lm")


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `lm-saes WORDS`."""
    monkeypatch.setattr("sys.argv", ["lm-saes", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_baselines_stand_beside_their_run(tmp_path, monkeypatch, capsys):
    save_tiny("gpt_neox", tmp_path / "model")
    lines = (json.dumps({"text": f"number {i} of a few documents, with some words in it. " * 10}) for i in range(40))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    path, run = tmp_path / "settings.json", tmp_path / "run"
    path.write_text(json.dumps(settings(tmp_path).model_dump(mode="json", exclude_unset=True)))

    assert command(monkeypatch, "train", str(path)) == 0
    assert command(monkeypatch, "evaluate", str(run), "--baseline", "untrained-lm") == 2
    assert "--baseline untrained-lm" in capsys.readouterr().err
    for name in ("frozen-decoder", "untrained-lm"):
        assert command(monkeypatch, "train", str(path), "--baseline", name) == 0
        assert json.loads((run / "baselines" / name / "config.json").read_text())["provenance"]["baseline"] == name
    assert command(monkeypatch, "evaluate", str(run), "--baseline", "pca", "--baseline", "frozen-decoder", "--baseline", "untrained-lm") == 0
    results = json.loads((run / "evaluation.json").read_text())
    assert list(results) == ["sae", "pca-4", "frozen-decoder", "untrained-lm"]
    assert results["frozen-decoder"]["metrics/delta_ce"] is not None
    assert "metrics/delta_ce" not in results["untrained-lm"]
    assert results["untrained-lm"]["metrics/explained_variance"] != results["sae"]["metrics/explained_variance"]
    assert command(monkeypatch, "show", str(run / "baselines/untrained-lm"), "--n", "1") == 0
    assert "weights drawn with seed 0" in capsys.readouterr().out
    assert settings_of_run(run / "baselines/frozen-decoder").trainer.frozen == "decoder"
    assert command(monkeypatch, "evaluate", str(path), "--baseline", "frozen-decoder") == 2


def test_a_benchmark_has_them_as_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SyntheticBenchmarkConfig, "preset", classmethod(lambda _cls, _name: tiny()))
    words = ["--kinds", "batchtopk", "--baseline", "frozen-decoder", "--baseline", "frozen-encoder", "--out", str(tmp_path), "--device", "cpu"]
    assert command(monkeypatch, "bench", "synthetic", *words) == 0
    rows = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in rows for name in ("batchtopk", "frozen-decoder", "frozen-encoder"))
    for part in ("decoder", "encoder"):
        assert json.loads((tmp_path / f"seed_0/frozen-{part}/config.json").read_text())["provenance"] == {"baseline": f"frozen-{part}"}
    assert command(monkeypatch, "bench", "synthetic", "--baseline", "untrained-lm", "--out", str(tmp_path)) == 2
    assert "no baseline 'untrained-lm' here. Baselines: frozen-decoder" in capsys.readouterr().err
