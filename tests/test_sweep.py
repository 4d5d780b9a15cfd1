"""Sweeps from settings to folders: what a member leaves, what the language model computes, how they go on, and what is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_saes import assembly
from lm_saes.comparison import compare
from lm_saes.config import SweepSAESettings, TrainSAESettings
from lm_saes.errors import ConfigError, LmSaesError, NonFiniteError, RunFolderError
from lm_saes.runners import train_sae
from lm_saes.sweep import settings_of_sweep, sweep_sae
from lm_saes.training.loggers import Logger
from lm_saes.training.run_folder import failure_of
from tests.lm.tiny_models import save_tiny

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="session")
def sweep_material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep_material")
    save_tiny("gpt_neox", folder / "model")
    lines = (json.dumps({"text": f"Number {i} of a few documents, with some words in it. " * 10}) for i in range(120))
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def base(sweep_material, tmp_path) -> dict[str, Any]:
    """The settings of one run of eight steps, as JSON values."""
    return {
        "sae_name": "small",
        "device_type": "cpu",
        "sae": {"hook_point_in": HOOKS[0], "d_model": 32, "expansion_factor": 2, "act_fn": "topk", "top_k": 4},
        "initializer": {"grid_search_init_norm": True, "n_batches": 3},
        "trainer": {"total_training_tokens": 1024, "exp_result_path": str(tmp_path / "sweep"), "log_frequency": 2, "n_checkpoints": 2, "lr": 1e-3},
        "model": {"model_name": str(sweep_material / "model")},
        "datasets": {"text": {"dataset_name_or_path": str(sweep_material / "text.jsonl")}},
        "activation_factory": {
            "sources": [{"name": "text"}], "hook_points": [HOOKS[0]], "batch_size": 128, "buffer_size": 512, "context_size": 32, "model_batch_size": 4,
        },
        "eval_config": {"total_eval_tokens": 200, "baseline_pca": 3},
    }  # fmt: skip


def swept(table: dict[str, Any], grid: dict[str, list[Any]], **changes: Any) -> SweepSAESettings:
    merged = {name: {**table.get(name, {}), **value} if isinstance(value, dict) else value for name, value in changes.items()}
    return SweepSAESettings.from_grid(TrainSAESettings.model_validate({**table, **merged}), grid)


GRID = {"sae.hook_point_in": HOOKS, "sae.act_fn": ["topk", "batchtopk"]}


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """How many sequences the language model reads in each forward."""
    from lm_saes.lm.huggingface import HuggingFaceLanguageModel

    seen: list[int] = []
    original = HuggingFaceLanguageModel.capture

    def counted(self, ids, *arguments, **options):
        seen.append(len(ids))
        return original(self, ids, *arguments, **options)

    monkeypatch.setattr(HuggingFaceLanguageModel, "capture", counted)
    return seen


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_same_folders(one: Path, other: Path) -> None:
    """The same files with the same content, but for times and for the folder's own name."""
    assert files(one) == files(other)
    for name in sorted(files(one)):
        if name.endswith((".safetensors", "config.json", "evaluation.json")) and not name.endswith("optimizer.safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("metrics.jsonl", "initialization.json"):
        rows = [
            [json.loads(line) for line in (folder / name).read_text().replace("\n ", " ").replace("\n}", "}").splitlines()] for folder in (one, other)
        ]
        timed = [[{k: v for k, v in row.items() if not k.startswith("time/") and k != "seconds"} for row in table] for table in rows]
        assert timed[0] == timed[1], name
    settings = [json.loads((folder / "settings.json").read_text()) for folder in (one, other)]
    for table in settings:
        del table["trainer"]["exp_result_path"], table["resolved"]["trainer"]["exp_result_path"]
    assert settings[0] == settings[1]


# ---------------------------------------------------------------------------------------------------------- what it leaves


def test_a_member_is_the_run_that_it_would_have_been_alone(base, tmp_path, forwards):
    """Two hook points and two activation functions with their own seeds: folders alike, file by file; the text read once."""
    settings = swept(base, GRID, eval=True)
    items = [item.replace(trainer=item.trainer.replace(seed=seed)) for seed, item in enumerate(settings.items)]
    settings = settings.replace(items=items)
    outcomes = sweep_sae(settings)
    together = list(forwards)
    for outcome, member in zip(outcomes, settings.members(), strict=True):
        assert outcome.sae is not None
        assert outcome.settings == member
        folder = Path(member.trainer.exp_result_path)
        trained = train_sae(member.replace(trainer=member.trainer.replace(exp_result_path=str(tmp_path / "alone" / member.sae_name))))
        assert_same_folders(folder, tmp_path / "alone" / member.sae_name)
        assert all(torch.equal(value, outcome.sae.state_dict()[name]) for name, value in trained.state_dict().items())
    starts = [outcome.sae.W_D[0] for outcome in outcomes]
    assert not torch.equal(starts[0], starts[1])
    assert len(together) > 0


def test_the_language_model_reads_the_text_once(base, tmp_path, forwards):
    settings = swept(base, GRID)
    sweep_sae(settings)
    together, one = list(forwards), settings.members()[0]
    forwards.clear()
    train_sae(one.replace(trainer=one.trainer.replace(exp_result_path=str(tmp_path / "alone"))))
    assert together == forwards
    assert sum(forwards) >= (8 + 3) * 128 / 32


def test_pca_is_fitted_once_for_each_hook_point(base, monkeypatch):
    fitted = []
    from lm_saes.evaluation.pca import PCABaseline

    original = PCABaseline.fit
    monkeypatch.setattr(
        PCABaseline, "fit", lambda self, *args, **options: (fitted.append(self.cfg.hooks_out[0]), original(self, *args, **options))[1]
    )
    settings = swept(base, GRID, eval=True)
    sweep_sae(settings)
    assert sorted(fitted) == HOOKS
    results = [json.loads((Path(member.trainer.exp_result_path) / "evaluation.json").read_text()) for member in settings.members()]
    assert results[0]["pca-3"] == results[1]["pca-3"] != results[2]["pca-3"]


def test_a_shorter_member_stops_costing(base, forwards):
    settings = swept(base, {"trainer.total_training_tokens": [512, 1024]})
    steps: dict[str, list[int]] = {}

    class Steps(Logger):
        def __init__(self, name: str) -> None:
            self.own = steps.setdefault(name, [])

        def progress(self, step: int) -> None:
            self.own.append(step)

    sweep_sae(settings, loggers=lambda member: [Steps(member.sae_name)])
    assert {name: max(own) for name, own in steps.items()} == {"total_training_tokens=512": 4, "total_training_tokens=1024": 8}
    for member in settings.members():
        assert (Path(member.trainer.exp_result_path) / "config.json").is_file()


def test_a_sweep_may_fine_tune_and_its_folder_holds_what_it_is(base, tmp_path):
    settings = swept(base, {"trainer.lr": [1e-3, 1e-4]})
    sweep_sae(settings)
    assert settings_of_sweep(tmp_path / "sweep") == settings
    start = settings.members()[0].trainer.exp_result_path
    tuned = swept(
        {**base, "sae": {"pretrained_name_or_path": start}}, {"trainer.lr": [1e-9, 1e-3]}, trainer={"exp_result_path": str(tmp_path / "tuned")}
    )
    first, second = sweep_sae(tuned)
    assert first.sae is not None
    assert second.sae is not None
    assert (first.sae.W_D - second.sae.W_D).abs().max() > 1e-4
    assert not (tmp_path / "tuned/lr=1e-09/initialization.json").exists()


def test_saved_weights_and_fresh_ones_begin_at_different_batches(base):
    settings = swept(base, {"trainer.lr": [1e-3, 1e-4]})
    tuned = settings.items[1].as_dict() | {"sae": {"pretrained_name_or_path": "runs/x"}}
    with pytest.raises(ValueError, match=r"is initialised from 3 batches and 'lr=0.0001' from 0"):
        settings.replace(items=[settings.items[0], tuned])


# -------------------------------------------------------------------------------------------------------------- comparison


def test_the_comparison_is_read_from_the_folders(base, tmp_path):
    settings = swept(base, GRID, eval=True)
    sweep_sae(settings)
    rows = compare(settings.members())
    assert [row.hook_point for row in rows] == [HOOKS[0]] * 2 + [HOOKS[1]] * 2
    for pair in (rows[:2], rows[2:]):
        assert pair[0].metrics["delta_ce"] <= pair[1].metrics["delta_ce"]
    saved = json.loads((tmp_path / "sweep/comparison.json").read_text())["runs"]
    assert saved == [row.as_dict() for row in rows]
    first = json.loads((Path(rows[0].folder) / "evaluation.json").read_text())["sae"]
    assert rows[0].metrics["l0"] == first["metrics/l0"]
    assert rows[0].differs.keys() == {"sae.hook_point_in", "sae.hook_point_out", "sae.act_fn"}
    assert rows[0].tokens == 1024
    assert rows[0].metrics["tokens_per_second"] > 0
    page = (tmp_path / "sweep/comparison.md").read_text()
    assert page.count("\n| blocks.") == 4
    assert "Measured on text it was trained on;" in page  # there are no eval_datasets


# ----------------------------------------------------------------------------------------------------- stopped and resumed


class Stop(Logger):
    """Interrupts a sweep in its third step, as Ctrl-C does: once, however many runs it is the logger of."""

    sent = False

    def progress(self, step: int) -> None:
        if step == 3 and not self.sent:
            self.sent = True
            signal.raise_signal(signal.SIGINT)


def test_interrupted_and_resumed_equals_uninterrupted(base, tmp_path):
    whole = swept(base, GRID, trainer={"exp_result_path": str(tmp_path / "whole")})
    sweep_sae(whole)
    settings = swept(base, GRID)
    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        sweep_sae(settings, loggers=lambda _: [stop])
    assert not (tmp_path / "sweep/comparison.json").exists()
    with pytest.raises(RunFolderError, match="go on with it with --resume"):
        sweep_sae(settings)
    messages: list[str] = []

    class Keep(Logger):
        def message(self, text: str) -> None:
            messages.append(text)

    sweep_sae(settings, resume=True, loggers=lambda _: [Keep()])
    assert sum("resumed after step 3 of 8" in text for text in messages) == 4
    for one, other in zip(whole.members(), settings.members(), strict=True):
        folders = [Path(member.trainer.exp_result_path) for member in (one, other)]
        assert (folders[0] / "sae_weights.safetensors").read_bytes() == (folders[1] / "sae_weights.safetensors").read_bytes()
        assert json.loads((folders[0] / "metrics.jsonl").read_text().splitlines()[-1])["metrics/l0"] > 0
    again = (tmp_path / "sweep/comparison.json").read_text()
    sweep_sae(settings, resume=True)
    assert (tmp_path / "sweep/comparison.json").read_text() == again, "a finished sweep is not changed"


def test_a_sweep_goes_on_as_it_was_begun(base, tmp_path):
    settings = swept(base, {"trainer.lr": [1e-3, 1e-4]})
    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        sweep_sae(settings, loggers=lambda _: [stop])
    with pytest.raises(ConfigError, match=r"has the run 'lr=0.0001'"):
        sweep_sae(swept(base, {"trainer.lr": [1e-3]}), resume=True)
    with pytest.raises(ConfigError, match=r"lacks the run 'lr=0.1'"):
        sweep_sae(swept(base, {"trainer.lr": [1e-3, 1e-4, 0.1]}), resume=True)
    with pytest.raises(ConfigError, match=r"begun with sae.top_k = 4, got 5"):
        sweep_sae(swept(base, {"trainer.lr": [1e-3, 1e-4]}, sae={"top_k": 5}), resume=True)
    with pytest.raises(ConfigError, match="seed"):
        sweep_sae(settings.replace(stream_seed=3), resume=True)


def test_a_sweep_does_not_move_into_a_run_nor_a_run_into_a_sweep(base, tmp_path):
    train_sae(TrainSAESettings.model_validate(base))
    with pytest.raises(RunFolderError, match="holds a run"):
        sweep_sae(swept(base, {"trainer.lr": [1e-3, 1e-4]}))
    assert not (tmp_path / "sweep/sweep.json").exists()


def test_settings_that_cannot_work_leave_no_folder(base, tmp_path):
    with pytest.raises(LmSaesError, match="32 wide"):
        sweep_sae(swept(base, {"sae.d_model": [32, 16]}))
    assert not (tmp_path / "sweep").exists()


def test_a_member_that_meets_nan_is_marked_and_stays_stopped(base, tmp_path):
    settings = swept(base, {"trainer.lr": [1e-3, 1e30]}, eval=True)
    good, bad = sweep_sae(settings)
    assert good.sae is not None
    assert bad.sae is None
    assert isinstance(bad.error, NonFiniteError)
    rows = compare(settings.members())
    assert [(row.name, row.error is None) for row in rows] == [("lr=0.001", True), ("lr=1e+30", False)]
    assert "lr=1e+30 (stopped)" in (tmp_path / "sweep/comparison.md").read_text()
    assert not (tmp_path / "sweep/lr=1e+30/config.json").exists()
    failed_at = json.loads((tmp_path / "sweep/lr=1e+30/failure.json").read_text())
    assert failed_at["error"] == str(bad.error)
    before = (tmp_path / "sweep/lr=0.001/sae_weights.safetensors").read_bytes()
    good, bad = sweep_sae(settings, resume=True)
    assert str(bad.error) == failed_at["error"]
    assert (tmp_path / "sweep/lr=0.001/sae_weights.safetensors").read_bytes() == before
    alone = swept(base, {"trainer.lr": [1e-3]}, eval=True, trainer={"exp_result_path": str(tmp_path / "alone")})
    sweep_sae(alone)
    assert (tmp_path / "alone/lr=0.001/sae_weights.safetensors").read_bytes() == before


def test_activations_that_are_not_finite_stop_only_those_who_read_them(base, tmp_path, monkeypatch):
    original = assembly.open_stream

    class Broken:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

        def __iter__(self) -> Broken:
            return self

        def __next__(self) -> dict[str, Any]:
            batch = next(self._stream)
            return {**batch, HOOKS[1]: batch[HOOKS[1]] * float("nan")}

    monkeypatch.setattr("lm_saes.runners.open_stream", lambda *arguments: Broken(original(*arguments)))
    first, second = sweep_sae(swept(base, {"sae.hook_point_in": HOOKS}))
    assert first.error is None
    assert second.sae is None
    assert HOOKS[1] in str(second.error)
    assert failure_of(tmp_path / "sweep" / HOOKS[1]) == str(second.error)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_without_warning_a_real_process_goes_on_as_if_nothing_had_been(base, tmp_path):
    """kill -9 in the middle of a sweep, at whatever instant; twice."""
    base["trainer"] |= {"total_training_tokens": 60_000, "n_checkpoints": 30, "check_point_save_mode": "linear", "log_frequency": 1}
    base["activation_factory"] |= {"model_batch_size": 1}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(base))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [
        sys.executable,
        "-m",
        "lm_saes.cli",
        "sweep",
        str(path),
        "--grid",
        f"sae.hook_point_in={','.join(HOOKS)}",
        "--grid",
        "trainer.lr=1e-3,1e-4",
    ]
    for lines in (40, 200):
        running = subprocess.Popen([*words, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
        metrics = tmp_path / f"sweep/{HOOKS[0]},lr=0.001/metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.is_file() and metrics.read_text().count("\n") >= lines):
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        running.kill()
        running.communicate()
    for folder in ("sweep", "whole"):
        result = subprocess.run([*words, "--resume", "--out", str(tmp_path / folder)], capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
        assert ("resumed after step" in result.stdout) == (folder == "sweep")
    for hook in HOOKS:
        for rate in ("0.001", "0.0001"):
            one, other = (tmp_path / folder / f"{hook},lr={rate}" for folder in ("sweep", "whole"))
            assert (one / "sae_weights.safetensors").read_bytes() == (other / "sae_weights.safetensors").read_bytes()
            tables = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)]
            timeless = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in table] for table in tables]
            assert timeless[0] == timeless[1]
