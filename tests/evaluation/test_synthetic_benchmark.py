"""The benchmark: what is trained, that it is kept and gone on with, and what the command prints."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from lm_saes import cli
from lm_saes.config.synthetic import SyntheticBenchmarkConfig, SyntheticModelConfig
from lm_saes.errors import ConfigError, RunFolderError
from lm_saes.evaluation.synthetic import protocol
from lm_saes.evaluation.synthetic.generator import SyntheticStream
from lm_saes.evaluation.synthetic.protocol import KINDS, SyntheticBenchmark

TINY = {
    "model": {
        "n_features": 48, "d_model": 16, "n_roots": 2, "depth": 1, "min_firing_probability": 0.02, "correlation_rank": 2, "orthogonalization_steps": 5,
    },
    "d_sae": 24, "l0": 3, "batch_size": 64, "n_training_samples": 64 * 24, "n_probe_samples": 64 * 20, "n_evaluation_samples": 64 * 5, "device": "cpu",
}  # fmt: skip


def tiny(**changes: Any) -> SyntheticBenchmarkConfig:
    return SyntheticBenchmarkConfig.model_validate({**TINY, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_and_scored_once(kind, tmp_path, monkeypatch):
    scores = SyntheticBenchmark(tiny(), tmp_path).dictionary(kind, 0)
    for name in ("f1", "precision", "recall", "mcc", "uniqueness"):
        assert 0 < (scores[name] or 0) <= 1, name
    folder = tmp_path / "seed_0" / kind
    assert json.loads((folder / "scores.json").read_text()) == scores
    assert json.loads((folder / "config.json").read_text())["norm_activation"] == "inference"
    assert not (folder / "checkpoints").exists()
    monkeypatch.setattr(protocol, "train", lambda *_: pytest.fail("trained again"))
    assert SyntheticBenchmark(tiny(), tmp_path).dictionary(kind, 0) == scores


def test_seeds_differ_and_repeat(tmp_path):
    first, again = (SyntheticBenchmark(tiny(), tmp_path / name).dictionary("batchtopk", 0) for name in ("a", "b"))
    other = SyntheticBenchmark(tiny(), tmp_path / "a").dictionary("batchtopk", 1)
    assert first == again
    assert first["explained_variance"] != other["explained_variance"]


def test_kinds_trained_together_become_what_they_become_alone(tmp_path, monkeypatch):
    drawn = []
    given = SyntheticStream.__next__
    monkeypatch.setattr(SyntheticStream, "__next__", lambda stream: drawn.append(stream.seed) or given(stream))
    together = SyntheticBenchmark(tiny(), tmp_path / "together").dictionaries(["batchtopk", "relu"], 0)
    assert drawn.count(0) == 8 + 8 + 24, "two starts, one training"
    for kind, scores in together.items():
        assert SyntheticBenchmark(tiny(), tmp_path / "alone").dictionary(kind, 0) == scores


def test_kinds_that_stopped_at_different_steps_go_on_apart(tmp_path, monkeypatch):
    whole = SyntheticBenchmark(tiny(), tmp_path / "whole").dictionaries(["topk", "relu"], 0)
    given = SyntheticStream.__next__

    def stops(stream: SyntheticStream) -> dict[str, Any]:
        if stream.state_dict()["position"] == 24:
            raise RuntimeError("the power went")
        return given(stream)

    monkeypatch.setattr(SyntheticStream, "__next__", stops)
    benchmark = SyntheticBenchmark(tiny(), tmp_path / "halves")
    with pytest.raises(RuntimeError, match="the power went"):
        benchmark.dictionary("topk", 0)
    monkeypatch.undo()
    groups, begun = [], protocol.train
    monkeypatch.setattr(protocol, "train", lambda runs, stream: groups.append([run.cur_step for run in runs]) or begun(runs, stream))
    assert benchmark.dictionaries(["topk", "relu"], 0) == whole
    assert groups == [[12], [0]]


def test_what_was_interrupted_goes_on(tmp_path, monkeypatch):
    whole = SyntheticBenchmark(tiny(), tmp_path / "whole").dictionary("matryoshka", 0)
    given = SyntheticStream.__next__

    def stops(stream: SyntheticStream) -> dict[str, Any]:
        if stream.state_dict()["position"] == 24:  # eight batches to start from, sixteen steps: beyond the second checkpoint
            raise RuntimeError("the power went")
        return given(stream)

    monkeypatch.setattr(SyntheticStream, "__next__", stops)
    with pytest.raises(RuntimeError, match="the power went"):
        SyntheticBenchmark(tiny(), tmp_path / "halves").dictionary("matryoshka", 0)
    monkeypatch.undo()
    assert (tmp_path / "halves/seed_0/matryoshka/checkpoints/step_12").is_dir()
    first_seen = []

    def notes(stream: SyntheticStream) -> dict[str, Any]:
        first_seen.append(stream.state_dict()["position"])
        return given(stream)

    monkeypatch.setattr(SyntheticStream, "__next__", notes)
    assert SyntheticBenchmark(tiny(), tmp_path / "halves").dictionary("matryoshka", 0) == whole
    assert first_seen[0] == 20, "the run goes on after its twelfth step"


def test_the_probe_is_better_than_a_dictionary_and_kept(tmp_path):
    benchmark = SyntheticBenchmark(tiny(n_probe_samples=64 * 300), tmp_path)
    probe = benchmark.probe()
    assert (probe["f1"] or 0) > (benchmark.dictionary("topk", 0)["f1"] or 0)
    assert json.loads((tmp_path / "probe/scores.json").read_text()) == probe == benchmark.probe()


def test_kinds_are_configured_alike():
    assert set(KINDS) == {"batchtopk", "matryoshka", "matryoshka-annealed", "topk", "jumprelu", "relu"}
    cfg = SyntheticBenchmarkConfig.preset("16k")
    benchmark = SyntheticBenchmark.__new__(SyntheticBenchmark)
    benchmark.cfg = cfg
    benchmark.model = type("Model", (), {"device": "cpu"})()
    nested = benchmark.sae_config(KINDS["matryoshka"]).matryoshka
    assert nested is not None
    assert nested.widths == (128, 512, 2048)
    for kind in KINDS.values():
        sae, trainer = benchmark.sae_config(kind), benchmark.trainer_config(kind, 0, "runs/x")
        assert (sae.d_sae, trainer.total_training_tokens) == (4096, 200_000_000)
        assert (trainer.initial_k, sae.top_k, trainer.lr) == ((None, 25, 3e-4) if kind.annealed_k is None else (60, 22, pytest.approx(9e-4)))
        assert trainer.target_l0 == (25 if sae.act_fn in {"relu", "jumprelu"} else None)
        assert trainer.auxk_coefficient == (None if sae.act_fn in {"relu", "jumprelu"} else 1 / 32)


def run(monkeypatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["lm-saes", "bench", "synthetic", *words])
    monkeypatch.setattr(SyntheticBenchmarkConfig, "preset", classmethod(lambda _cls, _name: tiny()))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_prints_a_table_and_keeps_it(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench"
    assert run(monkeypatch, "--seeds", "2", "--kinds", "relu,topk", "--out", str(out), "--device", "cpu") == 0
    printed = capsys.readouterr().out
    for expected in ("relu, seed 1", "topk, seed 0", "logistic probe", "F1", "MCC", "unique", "±"):
        assert expected in printed
    assert max(len(line) for line in printed.splitlines() if "±" in line) <= 80
    table = (out / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]][-1] == "logistic probe"
    scores = [json.loads((out / f"seed_{seed}/topk/scores.json").read_text())["mcc"] for seed in range(2)]
    assert f"{sum(scores) / 2:.3f} ± {abs(scores[0] - scores[1]) / 2:.3f}" in table


def test_any_field_of_the_benchmark_can_be_set(tmp_path, monkeypatch):
    words = ["--model.zipf_exponent", "0.7", "--model.n_roots=0", "--l0", "4", "--samples", "640"]
    assert run(monkeypatch, "--kinds", "topk", "--out", str(tmp_path), *words) == 0
    kept = json.loads((tmp_path / "benchmark.json").read_text())
    expected = {**TINY, "model": {**TINY["model"], "zipf_exponent": 0.7, "n_roots": 0}, "l0": 4, "n_training_samples": 640}
    assert kept == SyntheticBenchmarkConfig.model_validate(expected).model_dump(mode="json", exclude={"device"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--kinds", "batchtop"],
            "no kind of dictionary 'batchtop'; did you mean 'batchtopk'? Kinds: batchtopk, matryoshka, matryoshka-annealed, topk, jumprelu, relu",
        ),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--samples", "0"], "n_training_samples: Input should be greater than or equal to 1 (got 0)"),
        (["--device", "gpu"], "device"),
        (["--model.zipf_exponnt", "1"], "model: SyntheticModelConfig has no field 'zipf_exponnt'; did you mean 'zipf_exponent'?"),
        (["--samples", "640", "--n_training_samples", "1280"], "--samples is n_training_samples; give one of the two"),
        (["--l0", "24"], "l0 must be below d_sae = 24, got 24"),
    ],
)
def test_misuse_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--out", str(tmp_path / "bench"), *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_is_of_one_benchmark(tmp_path):
    SyntheticBenchmark(tiny(), tmp_path)
    with pytest.raises(RunFolderError, match="holds a benchmark with another l0; choose another folder"):
        SyntheticBenchmark(tiny(l0=4), tmp_path)
    with pytest.raises(ConfigError, match="no kind of dictionary 'gated'"):
        SyntheticBenchmark(tiny(), tmp_path).dictionary("gated", 0)


@pytest.mark.slow
def test_the_published_order_holds_on_a_small_model(tmp_path):
    """F1: Matryoshka above BatchTopK, both above ReLU with an L1 penalty; and the probe above all."""
    cfg = tiny(
        model=SyntheticModelConfig(n_features=512, d_model=96, n_roots=6, depth=2).as_dict(), d_sae=160, l0=5, batch_size=512,
        n_training_samples=512 * 1500, n_probe_samples=512 * 1500, n_evaluation_samples=51_200, lr=2e-3,
    )  # fmt: skip
    benchmark = SyntheticBenchmark(cfg, tmp_path)
    f1 = {kind: benchmark.dictionary(kind, 0)["f1"] or 0.0 for kind in ("matryoshka", "batchtopk", "relu")}
    assert f1["matryoshka"] > f1["batchtopk"] > f1["relu"]
    assert (benchmark.probe()["f1"] or 0.0) > f1["matryoshka"]
