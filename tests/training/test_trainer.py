"""The training loop: what it does to the weights, the folder, the loggers; and when it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_saes.config import TrainerConfig
from lm_saes.errors import ConfigError, DataError, NonFiniteError, RunFolderError
from lm_saes.models.sparse_dictionary import SparseDictionary
from lm_saes.training.checkpoint import newest_checkpoint
from lm_saes.training.loggers import Logger
from lm_saes.training.nonfinite import NonFiniteWatch
from lm_saes.training.schedules import resolve
from lm_saes.training.step import TrainingStep, flat_batch
from lm_saes.training.trainer import Trainer
from tests.training.synthetic import HOOK, SyntheticStream, make_dictionary

API_KEYS = {
    "losses/overall_loss", "losses/mse_loss", "losses/sparsity_loss", "losses/lp_loss",
    "metrics/explained_variance", "metrics/explained_variance_legacy", "metrics/l0", "metrics/l2_norm_error", "metrics/l2_norm_error_ratio",
    "metrics/mean_feature_act", "metrics/gradient_norm_per_param", "metrics/gradient_norm_before_clipping", "metrics/encoder_norm",
    "metrics/decoder_norm", "metrics/decoder_bias_norm", "metrics/mean_jumprelu_threshold", "sparsity/above_1e-1", "sparsity/above_1e-2",
    "sparsity/below_1e-5", "sparsity/below_1e-6", "sparsity/below_1e-7", "sparsity/k", "details/current_learning_rate",
    "details/n_training_tokens", "details/l1_coefficient", "details/lp_coefficient", "details/auxk_coefficient",
}  # fmt: skip


class Recorder(Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.messages: list[str] = []
        self.steps: list[int] = []
        self.events: list[str] = []

    def start(self, total_steps: int, total_tokens: int, first_step: int = 0) -> None:
        self.events.append(f"start {total_steps} {total_tokens} {first_step}")

    def progress(self, step: int) -> None:
        self.steps.append(step)

    def log(self, step: int, metrics: dict[str, float], console: bool = True) -> None:
        self.rows.append((step, metrics))

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        self.events.append("close")


def rows(cfg: TrainerConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(cfg.exp_result_path) / "metrics.jsonl").read_text().splitlines()]


def one_step(sae: SparseDictionary, cfg: TrainerConfig, steps: int = 10) -> TrainingStep:
    return TrainingStep(sae.train(), resolve(cfg, steps, 64), steps, NonFiniteWatch(cfg.exp_result_path))


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.filterwarnings("ignore:act_fn .* without a sparsity loss:UserWarning")
def test_the_default_configuration_trains_every_activation_function(act_fn, tmp_path):
    cfg = TrainerConfig(exp_result_path=str(tmp_path / "run"), total_training_tokens=64 * 150)
    sae = make_dictionary(act_fn)
    assert Trainer(cfg).fit(sae, SyntheticStream()) is None
    losses = [row["losses/overall_loss"] for row in rows(cfg)]
    assert losses[-1] < 0.9 * losses[0]
    assert not sae.training


def test_the_log_has_the_keys_of_the_interface_at_its_interval(trainer_config):
    cfg = trainer_config(20, log_frequency=6, sparsity_loss_type="tanh", lp_coefficient=3e-6)
    recorder = Recorder()
    Trainer(cfg, loggers=[recorder]).fit(make_dictionary("jumprelu"), SyntheticStream())
    assert [step for step, _ in recorder.rows] == [1, 6, 12, 18, 20]
    assert recorder.steps == list(range(1, 21))
    assert recorder.events == ["start 20 1280 0", "close"]
    for _, metrics in recorder.rows:
        assert metrics.keys() >= API_KEYS
        assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert recorder.rows[-1][1]["details/n_training_tokens"] == 1280
    assert [row["step"] for row in rows(cfg)] == [1, 6, 12, 18, 20]


def test_skipping_the_metrics_leaves_losses_and_schedules(trainer_config):
    cfg = trainer_config(2, skip_metrics_calculation=True, auxk_coefficient=0.1)
    Trainer(cfg).fit(make_dictionary(), SyntheticStream())
    keys = {key for key in rows(cfg)[-1] if not key.startswith(("time/", "details/"))}
    assert keys == {"step", "losses/overall_loss", "losses/mse_loss", "losses/aux_loss", "sparsity/k"}


def test_evaluation_comes_at_its_interval_in_eval_mode_without_gradients(trainer_config):
    seen = []

    def evaluate(sae: SparseDictionary) -> dict[str, Any]:
        seen.append((sae.training, torch.is_grad_enabled()))
        return {"metrics/downstream": 0.5, "histogram": [1, 2], "name": "x"}

    cfg = trainer_config(9, eval_frequency=4, log_frequency=9)
    sae = make_dictionary()
    Trainer(cfg).fit(sae, SyntheticStream(), evaluate)
    assert seen == [(False, False)] * 2
    with_result = {row["step"]: row for row in rows(cfg) if "metrics/downstream" in row}
    assert with_result.keys() == {4, 8}
    assert with_result[4].keys() == {"step", "metrics/downstream"}


def test_any_object_with_log_is_a_wandb_logger(trainer_config):
    class Run:
        def __init__(self) -> None:
            self.logged: list[tuple[int, dict[str, float]]] = []

        def log(self, metrics, step):
            self.logged.append((step, metrics))

    run = Run()
    Trainer(trainer_config(3, log_frequency=2)).fit(make_dictionary(), SyntheticStream(), wandb_logger=run)
    assert [step for step, _ in run.logged] == [1, 2, 3]
    with pytest.raises(ConfigError, match="wandb_logger"):
        Trainer(trainer_config(3, "other")).fit(make_dictionary(), SyntheticStream(), wandb_logger=object())


def test_a_stream_that_ends_early_is_said_and_leaves_a_checkpoint(trainer_config):
    recorder, cfg = Recorder(), trainer_config(10)
    trainer = Trainer(cfg, loggers=[recorder])
    assert trainer.fit(make_dictionary(), SyntheticStream(n_batches=7)) is True
    assert trainer.cur_step == 7
    assert sum("stream ended after step 7 of 10" in text for text in recorder.messages) == 1
    newest = newest_checkpoint(cfg.exp_result_path)
    assert newest is not None
    assert newest.name == "step_7"


def test_an_empty_stream_and_one_without_the_hook_point_are_errors(trainer_config):
    with pytest.raises(DataError, match="no batch"):
        Trainer(trainer_config(folder="a")).fit(make_dictionary(), [])
    with pytest.raises(DataError, match=r"hook_points"):
        Trainer(trainer_config(folder="b")).fit(make_dictionary(), [{"other": torch.ones(4, 16)}])


def test_weights_in_float16_are_not_trained(trainer_config):
    with pytest.raises(ConfigError, match="cannot be trained in float16"):
        Trainer(trainer_config(4)).fit(make_dictionary().to(torch.float16), SyntheticStream())


def test_a_used_folder_is_refused(trainer_config):
    cfg = trainer_config(2)
    Trainer(cfg).fit(make_dictionary(), SyntheticStream())
    with pytest.raises(RunFolderError, match="earlier run"):
        Trainer(cfg).fit(make_dictionary(), SyntheticStream())


def test_resume_in_an_empty_folder_starts_afresh(trainer_config):
    trainer = Trainer(trainer_config(3), resume=True)
    trainer.fit(make_dictionary(), SyntheticStream())
    assert trainer.cur_step == 3


def test_options_without_effect_and_dense_autoencoders_are_warned_about(trainer_config):
    with pytest.warns(UserWarning, match="optimizer_foreach has no effect"):
        Trainer(trainer_config(1, "a", optimizer_foreach=True)).fit(make_dictionary(), SyntheticStream())
    with pytest.warns(UserWarning, match="dense autoencoder"):
        Trainer(trainer_config(1, "b")).fit(make_dictionary("relu"), SyntheticStream())


def test_saving_before_training_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="call fit first"):
        Trainer(TrainerConfig()).save_checkpoint(make_dictionary(), tmp_path)


# -------------------------------------------------------------------------------------------------------------- batches


def test_a_2d_batch_is_flattened_by_its_mask():
    x, mask = torch.randn(2, 3, 16), torch.tensor([[True, False, True], [False, False, True]])
    flat = flat_batch({HOOK: x, "tokens": torch.arange(6).view(2, 3), "mask": mask, "meta": [{}, {}]}, [HOOK], torch.device("cpu"))
    assert torch.equal(flat[HOOK], x[mask])
    assert flat["tokens"].tolist() == [0, 2, 5]
    assert flat["mask"].tolist() == [True, True, True]


@pytest.mark.parametrize("act_fn", ["relu", "topk", "batchtopk"])
def test_tokens_outside_the_mask_change_nothing(act_fn, trainer_config):
    cfg = trainer_config(10, sparsity_loss_type="tanh-quad", dead_threshold=1, auxk_coefficient=0.1)

    def trained(batch):
        sae = make_dictionary(act_fn)
        step = one_step(sae, cfg)
        metrics = [step(batch, i, measure=True) for i in range(3)]
        return sae, step, metrics[-1]

    x = SyntheticStream().activations(0)
    mask = torch.arange(64) % 3 > 0
    one = trained({HOOK: x, "mask": mask})
    other = trained({HOOK: torch.where(mask[:, None], x, 100.0), "mask": mask})
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):  # float32 sums over other groups of rows
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    for name, value in one[2].items():
        torch.testing.assert_close(value, other[2][name], rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(one[1].dead_latents.tokens_since_fired, other[1].dead_latents.tokens_since_fired)
    assert int(one[1].tokens) == 3 * int(mask.sum())


@pytest.mark.parametrize(
    ("act_fn", "options"), [("relu", {"sparsity_loss_type": "power", "p": 2.0}), ("topk", {}), ("jumprelu", {"lp_coefficient": 0.1})]
)
def test_micro_batches_have_the_gradients_and_metrics_of_the_whole_batch(act_fn, options, trainer_config):
    batch = {HOOK: SyntheticStream().activations(0)[:61].double(), "mask": torch.arange(61) % 4 > 0}
    results = []
    for pieces in (1, 3):
        sae = make_dictionary(act_fn, dtype="float64")
        step = one_step(sae, trainer_config(10, gradient_accumulation_steps=pieces, lr_warm_up_steps=0, l1_coefficient_warmup_steps=0, **options))
        metrics = step(batch, 0, measure=True)
        results.append(([parameter.grad for parameter in sae.parameters()], metrics))
    for one, other in zip(*(gradients for gradients, _ in results), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value.double(), results[1][1][name].double(), rtol=1e-5, atol=1e-7, msg=name)


def test_clipping_is_by_the_global_norm(trainer_config):
    batch = {HOOK: SyntheticStream().activations(0), "mask": torch.ones(64, dtype=torch.bool)}
    sae = make_dictionary()
    metrics = one_step(sae, trainer_config(10, clip_grad_norm=0.01))(batch, 0, measure=True)
    norm = torch.cat([parameter.grad.flatten() for parameter in sae.parameters() if parameter.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    assert metrics["metrics/gradient_norm_before_clipping"].item() > 1


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_float32_masters_and_learns(amp_dtype, trainer_config):
    cfg = trainer_config(60, amp_dtype=amp_dtype, lr=1e-3)
    sae = make_dictionary()
    Trainer(cfg).fit(sae, SyntheticStream())
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32}
    assert rows(cfg)[-1]["losses/mse_loss"] < 0.9 * rows(cfg)[0]["losses/mse_loss"]


# ---------------------------------------------------------------------------------------------------------- non-finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_stops_within_its_step_and_leaves_the_weights(bad, trainer_config):
    class Broken(SyntheticStream):
        def __next__(self):
            batch = super().__next__()
            if self.position == 4:
                batch[HOOK][3, 2] = bad
            return batch

    cfg = trainer_config(10, n_checkpoints=10, check_point_save_mode="linear")
    sae = make_dictionary()
    with pytest.raises(NonFiniteError, match=rf"step 4: .*the activations at {HOOK}.*stream"):
        Trainer(cfg).fit(sae, Broken())
    saved = load_file(Path(cfg.exp_result_path) / "nonfinite_step_4.safetensors")
    assert saved[HOOK].shape == (64, 16)
    assert not torch.isfinite(saved[HOOK]).all()
    before = load_file(Path(cfg.exp_result_path) / "checkpoints" / "step_3" / "sae_weights.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_a_bad_gradient_is_named(trainer_config):
    cfg, sae = trainer_config(10), make_dictionary()
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.W_D.register_hook(lambda gradient: gradient * float("inf"))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    with pytest.raises(NonFiniteError, match=r"the gradient of W_D.*lower lr"):
        Trainer(cfg).fit(sae, SyntheticStream())
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())


def test_a_bad_loss_term_is_named(trainer_config):
    cfg = trainer_config(10, sparsity_loss_type="tanh", l1_coefficient=1e38, l1_coefficient_warmup_steps=0)
    with pytest.raises(NonFiniteError, match="the loss term sparsity_loss"):
        Trainer(cfg).fit(make_dictionary("relu"), SyntheticStream())


# ---------------------------------------------------------------------------------------------------------- host reads


def test_between_log_steps_the_host_reads_only_whether_all_is_finite(trainer_config, monkeypatch):
    monkeypatch.setenv("LM_SAES_OPS", "reference")  # as on a GPU; sparse codes of JumpReLU have as many entries as there happen to be
    options = {"sparsity_loss_type": "tanh", "target_l0": 5.0, "lr_warm_up_steps": 0, "l1_coefficient_warmup_steps": 0, "clip_grad_norm": 1.0}
    step = one_step(make_dictionary("jumprelu"), trainer_config(10, lp_coefficient=1e-3, **options))
    batch = {HOOK: SyntheticStream().activations(0), "mask": torch.ones(64, dtype=torch.bool)}
    reads: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, _name=name, _original=original, **kw: (reads.append(_name), _original(self, *args, **kw))[1]
        )
    for i in range(3):
        step(batch, i, measure=False)
    assert reads == ["__bool__"] * 3
