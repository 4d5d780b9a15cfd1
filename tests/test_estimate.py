"""What a dry run says: counted sizes against the real ones, and the knob that is named."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm_saes import SAEConfig, SparseAutoEncoder, TrainSAESettings
from lm_saes.config import ActivationFactoryActivationsSource
from lm_saes.errors import ConfigError, NonFiniteError
from lm_saes.estimate import KNOBS, Estimate, duration, estimate, refuse_what_cannot_fit, size
from lm_saes.memory import LIBRARIES, device_of, phases
from lm_saes.runners import train_sae
from lm_saes.training.checkpoint import remove_old
from tests.lm.tiny_models import save_tiny

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def settings(tmp_path) -> TrainSAESettings:
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some words that a tiny model reads. " * 400)
    table = {
        "sae_name": "small", "device_type": "cpu",
        "sae": {"hook_point_in": HOOK, "d_model": 32, "expansion_factor": 2, "act_fn": "topk", "top_k": 4},
        "trainer": {"total_training_tokens": 1280, "exp_result_path": str(tmp_path / "runs/new")},
        "model": {"model_name": str(tmp_path / "model")}, "datasets": {"text": {"dataset_name_or_path": str(tmp_path / "text.txt")}},
        "activation_factory": {"sources": [{"name": "text"}], "hook_points": [HOOK], "batch_size": 128, "context_size": 32, "model_batch_size": 4},
    }  # fmt: skip
    return TrainSAESettings.model_validate(table)


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("options", [{}, {"use_glu_encoder": True}, {"use_decoder_bias": False}], ids=["plain", "glu", "no b_D"])
def test_parameters_are_those_of_the_dictionary(settings, act_fn, options):
    cfg = SAEConfig(hook_point_in=HOOK, d_model=32, expansion_factor=2, act_fn=act_fn, **options)
    result = estimate(settings.replace(sae=cfg), calibrate=False)
    assert result.parameters == sum(parameter.numel() for parameter in SparseAutoEncoder(cfg).parameters())


def test_counts_of_the_run(settings):
    result = estimate(settings, calibrate=False)
    assert (result.tokens, result.steps) == (1280, 10)
    assert result.phases["training"]["dictionary and its optimizer"] == 16 * result.parameters  # weights, gradients and two moments in float32
    assert result.memory["python and libraries"] > 50 * 2**20
    assert result.peak == sum(result.memory.values()) == max(sum(parts.values()) for parts in result.phases.values())
    assert {name for parts in result.phases.values() for name in parts} <= set(KNOBS)


@pytest.mark.parametrize(
    ("field", "part"),
    [
        ({"activation_factory": {"buffer_size": 10**12}}, "shuffle buffer"),
        ({"activation_factory": {"batch_size": 10**9}, "initializer": {"n_batches": 1}}, "one training step"),
        ({"activation_factory": {"batch_size": 10**9}, "initializer": {"n_batches": 100}}, "initialisation"),
        ({"activation_factory": {"model_batch_size": 10**9}}, "one forward of the language model"),
        ({"sae": {"expansion_factor": 10**7}}, "dictionary and its optimizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_names_what_to_change(settings, field, part):
    table = settings.as_dict()
    for name, fields in field.items():
        table[name] = {**(table[name] or {}), **fields}
    if part == "dictionary and its optimizer":
        table["activation_factory"]["batch_size"] = 1
    result = estimate(TrainSAESettings.model_validate(table))
    assert not result.fits
    assert result.tokens_per_second is None
    assert f"the largest part is the {part}" in result.verdict()
    if part == "dictionary and its optimizer":
        assert result.remedy is None
        assert KNOBS[part] in result.verdict()
    else:  # the change that is proposed is enough
        change = re.fullmatch(r"set (\w+)\.(\w+) = (\d+)", result.remedy or "")
        assert change is not None
        assert str(result.remedy) in result.verdict()
        table[change[1]][change[2]] = int(change[3])
        assert estimate(TrainSAESettings.model_validate(table), calibrate=False).peak <= result.available


def test_a_run_that_cannot_fit_is_refused_before_work_starts(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"needs about .* of memory, cpu has .* available; it does not fit in memory: .* set activation_factory"):
        train_sae(settings.replace(activation_factory=settings.activation_factory.replace(model_batch_size=10**9)))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_may_fit_is_not_refused():
    doubtful = Estimate(1, {"shuffle buffer": 114}, 100, "cpu", 100, 10, 5, 5)
    refuse_what_cannot_fit(doubtful)  # within the estimate's error
    with pytest.raises(ConfigError, match="needs about 116 B of memory, cpu has 100 B available"):
        refuse_what_cannot_fit(replace(doubtful, memory={"shuffle buffer": 116}))


@pytest.mark.parametrize(("planned", "kept"), [(1, 3), (4, 3), (8, 2), (5, 9)])
def test_the_disk_is_what_a_run_has_on_it(planned, kept, settings, monkeypatch):
    trainer = settings.trainer.replace(n_checkpoints=planned, keep_checkpoints=kept, checkpoint_minutes=None, check_point_save_mode="linear")
    settings = settings.replace(trainer=trainer, sae=settings.sae.replace(expansion_factor=128), eval=False)
    folder, seen = Path(trainer.exp_result_path), []

    def on_disk() -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def noticed(*arguments):
        seen.append(on_disk())
        remove_old(*arguments)

    monkeypatch.setattr("lm_saes.training.run.remove_old", noticed)
    train_sae(settings)
    small = 0.2e6 + planned * 2.5e5  # settings, metrics, the states of random generators, counters of latents
    wanted = estimate(settings, calibrate=False).disk
    assert 0.8 * wanted < max(*seen, on_disk(), 0) < wanted + small
    by_the_clock = settings.replace(trainer=trainer.replace(checkpoint_minutes=30.0))
    assert estimate(by_the_clock, calibrate=False).disk >= wanted


def test_without_a_language_model_the_device_is_that_of_the_dictionary(settings):
    stored = settings.activation_factory.replace(sources=[ActivationFactoryActivationsSource(name="stored", path="nowhere")])
    alone = settings.replace(model=None, datasets=None, activation_factory=stored, sae=settings.sae.replace(device="cuda:1"))
    assert device_of(alone, None) == torch.device("cuda:1")
    assert LIBRARIES not in phases(alone, None)["training"], "of the host"


def test_verdicts():
    fits = Estimate(1, {"shuffle buffer": 10}, 10, "cpu", 100, 10, 5, 5)
    assert fits.verdict() == "it fits"
    assert "keep_checkpoints" in replace(fits, disk=6).verdict()
    assert "buffer_size" in replace(fits, available=9).verdict()


def test_the_rate_is_measured_and_nothing_is_left_behind(settings, monkeypatch, tmp_path):
    monkeypatch.setattr("lm_saes.estimate.CALIBRATION_SECONDS", 0.3)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    result = estimate(settings)
    assert result.tokens_per_second is not None
    assert result.tokens_per_second > 0
    assert result.seconds is not None
    assert result.seconds > 1280 / result.tokens_per_second
    assert not list((tmp_path / "temporary").iterdir())
    assert not (tmp_path / "runs").exists()
    rows = dict(result.rows())
    assert rows["parameters of the dictionary"] == f"{result.parameters:,}"
    assert rows["steps"] == "10"
    assert "tokens/s" in rows["time"]


def test_an_interrupted_dry_run_saves_nothing(settings, monkeypatch, tmp_path):
    """Not even where it would be thrown away: that could be gigabytes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("lm_saes.training.run.write_checkpoint", lambda *_: pytest.fail("a checkpoint was written"))
    monkeypatch.setattr("lm_saes.training.run.Run.step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        estimate(settings)
    assert not list((tmp_path / "temporary").iterdir())


def test_a_run_that_would_be_stopped_is_not_estimated(settings):
    with pytest.raises(NonFiniteError, match=r"not finite|NaN"):
        estimate(settings.replace(trainer=settings.trainer.replace(lr=1e30)))


def test_a_saved_dictionary_is_counted_from_its_folder(settings, tmp_path):
    sae = SparseAutoEncoder(settings.sae)
    sae.save_pretrained(tmp_path / "saved")
    tuned = TrainSAESettings.model_validate({**settings.as_dict(), "sae": {"pretrained_name_or_path": str(tmp_path / "saved")}})
    result = estimate(tuned, calibrate=False)
    assert result.parameters == sum(parameter.numel() for parameter in sae.parameters())
    assert "initialisation" not in result.phases


def test_words_for_sizes_and_durations():
    assert [size(n) for n in (0, 1023, 1024, 3 * 2**20, 2**40, 2**50)] == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB", "1.0 TiB", "1024.0 TiB"]
    assert [duration(seconds) for seconds in (0, 89, 90, 5399, 7200)] == ["0 s", "89 s", "2 min", "90 min", "2.0 h"]


def test_the_folder_for_the_disk_may_not_exist_yet(settings):
    far = settings.replace(trainer=settings.trainer.replace(exp_result_path=str(Path(settings.trainer.exp_result_path) / "a/b/c")))
    assert estimate(far, calibrate=False).disk_free > 0
