"""Schedules against their closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.config import SAEConfig, TrainerConfig
from lm_saes.errors import ConfigError
from lm_saes.training.schedules import annealed_k, check_joints, checkpoint_steps, knobs, lr_factor, resolve, total_steps, warm_up_ends, warnings_of

SCHEDULES = ["constant", "constantwithwarmup", "linearwarmupdecay", "cosineannealing", "cosineannealingwarmup", "exponentialwarmup"]


def resolved(steps: int, **options) -> TrainerConfig:
    return resolve(TrainerConfig(**options), steps, 64)


def dictionary(act_fn: str = "topk", **options) -> SAEConfig:
    return SAEConfig.model_validate({"hook_point_in": "h", "act_fn": act_fn, "d_model": 16, "expansion_factor": 4, "top_k": 4, **options})


def test_steps_are_whole_batches_and_at_least_one():
    assert total_steps(TrainerConfig(total_training_tokens=1000), 300) == 3
    assert total_steps(TrainerConfig(total_training_tokens=10), 300) == 1


def test_defaults_that_exceed_the_run_are_clamped_with_one_line_each():
    lines: list[str] = []
    cfg = resolve(TrainerConfig(), 1000, 64, lines.append)
    assert (cfg.lr_warm_up_steps, cfg.dead_threshold, cfg.log_frequency) == (200, 16_000, 50)
    assert len(lines) == 3
    assert all("default" in line for line in lines)
    assert (cfg.lr_cool_down_steps, cfg.l1_coefficient_warmup_steps, cfg.k_warmup_steps) == (200, 100, 100)
    assert lines[1].startswith("dead_threshold: the default of 10,000,000 tokens exceeds a quarter of the run; 16,000 is used")


def test_defaults_that_fit_and_values_that_were_set_are_obeyed():
    lines: list[str] = []
    cfg = resolve(TrainerConfig(), 1_000_000, 4096, lines.append)
    assert (cfg.lr_warm_up_steps, cfg.dead_threshold, cfg.log_frequency, lines) == (5000, 10_000_000, 1000, [])
    cfg = resolve(TrainerConfig(lr_warm_up_steps=5000, dead_threshold=10_000_000, log_frequency=1000), 10, 64, lines.append)
    assert (cfg.lr_warm_up_steps, cfg.dead_threshold, cfg.log_frequency, lines) == (5000, 10_000_000, 1000, [])


def test_an_int_counts_steps_and_a_float_is_a_fraction():
    assert resolved(50, lr_warm_up_steps=1).lr_warm_up_steps == 1
    assert resolved(50, lr_warm_up_steps=1.0).lr_warm_up_steps == 50


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warm_up", [0, 10])
@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_learning_rate_at_both_ends(schedule, warm_up, ratio):
    cfg = resolved(100, lr_scheduler_name=schedule, lr_warm_up_steps=warm_up, lr_cool_down_steps=20, lr_end_ratio=ratio)
    factors = [lr_factor(cfg, step, 100) for step in range(100)]
    warms_up = warm_up > 0 and schedule not in {"constant", "cosineannealing"}
    assert factors[0] == pytest.approx(0.1 if warms_up else 1.0)
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else ratio)
    if warms_up:
        assert factors[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])


def test_learning_rate_in_the_middle():
    def factor(schedule, step, **options):
        return lr_factor(resolved(101, lr_scheduler_name=schedule, lr_end_ratio=0.25, **{"lr_warm_up_steps": 0, **options}), step, 101)

    assert factor("linearwarmupdecay", 50) == pytest.approx(1 - 0.75 * 0.5)
    assert factor("cosineannealing", 25) == pytest.approx(0.25 + 0.75 * (1 + math.cos(math.pi / 4)) / 2)
    assert factor("cosineannealingwarmup", 60, lr_warm_up_steps=20) == pytest.approx(0.25 + 0.75 * 0.5)
    assert factor("exponentialwarmup", 50) == pytest.approx(0.25**0.5)
    assert factor("constantwithwarmup", 80, lr_cool_down_steps=20) == pytest.approx(1.0)
    assert factor("constantwithwarmup", 90, lr_cool_down_steps=20) == pytest.approx(1 - 0.75 * 10 / 20)
    assert factor("constantwithwarmup", 100, lr_cool_down_steps=0) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_have_a_positive_rate(schedule, steps):
    cfg = resolved(steps, lr_scheduler_name=schedule)
    assert all(0 < lr_factor(cfg, step, steps) <= 1 for step in range(steps))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.integers(1, 60),
    booting=st.floats(0, 0.5),
    warm_up=st.floats(0, 0.5),
    start=st.integers(1, 64),
    shape=st.sampled_from(["linear", "exponential"]),
)
def test_k_starts_at_initial_k_is_monotone_and_ends_at_top_k(steps, booting, warm_up, start, shape):
    cfg = resolved(
        steps, initial_k=start, k_cold_booting_steps=math.floor(booting * steps), k_warmup_steps=math.floor(warm_up * steps), k_schedule_type=shape
    )
    values = [annealed_k(cfg, step, 8, 64) for step in range(steps)]
    up = start <= 8
    assert all((a <= b) if up else (a >= b) for a, b in itertools.pairwise(values))
    assert values[: int(cfg.k_cold_booting_steps)] == [start] * int(cfg.k_cold_booting_steps)
    assert values[-1] == 8


def test_k_follows_its_formulas():
    linear = resolved(100, initial_k=0.5, k_warmup_steps=50, k_cold_booting_steps=10)
    assert [annealed_k(linear, step, 8, 64) for step in (0, 9, 34, 59, 60)] == [32, 32, 20, 8, 8]
    bent = resolved(100, initial_k=0.5, k_warmup_steps=50, k_schedule_type="exponential", k_exponential_factor=3.0)
    share = (math.exp(-1.5) - math.exp(-3)) / (1 - math.exp(-3))
    assert annealed_k(bent, 24, 8, 64) == 8 + round(24 * share)
    assert annealed_k(resolved(100), 0, 8, 64) == 8


def test_the_coefficient_rises_linearly_from_zero():
    cfg = resolved(100, sparsity_loss_type="tanh", l1_coefficient=2.0, l1_coefficient_warmup_steps=0.1)
    assert [knobs(cfg, dictionary("relu"), step, 100).sparsity for step in (0, 5, 10, 99)] == [0.0, 1.0, 2.0, 2.0]
    at_once = resolved(100, sparsity_loss_type="tanh", l1_coefficient=None, l1_coefficient_warmup_steps=0)
    assert knobs(at_once, dictionary("relu"), 0, 100).sparsity == 1.0
    assert knobs(resolved(100), dictionary("relu"), 50, 100).sparsity == 0.0


def test_the_controller_waits_for_both_warm_ups():
    assert warm_up_ends(resolved(100, lr_warm_up_steps=30, l1_coefficient_warmup_steps=10)) == 30
    assert warm_up_ends(resolved(100, lr_warm_up_steps=30, l1_coefficient_warmup_steps=10, lr_scheduler_name="constant")) == 10


@pytest.mark.parametrize(
    ("options", "act_fn", "message"),
    [
        ({"target_l0": 8.0, "sparsity_loss_type": "tanh"}, "topk", "fixes L0 by top_k"),
        ({"target_l0": 8.0, "sparsity_loss_type": "tanh"}, "batchtopk", "fixes L0 by top_k"),
        ({"target_l0": 64.0, "sparsity_loss_type": "tanh"}, "relu", "below d_sae"),
        ({"target_l0": 8.0, "sparsity_loss_type": "tanh", "l1_coefficient": 0.0}, "relu", "positive l1_coefficient"),
        ({"lp_coefficient": 3e-6}, "relu", "lp_coefficient"),
        ({"initial_k": 65}, "topk", "at most d_sae"),
        ({"initial_k": 8, "k_warmup_steps": 0.6, "k_cold_booting_steps": 0.6}, "topk", "never reach"),
        ({"lr_scheduler_name": "exponentialwarmup", "lr_end_ratio": 0.0}, "topk", "lr_end_ratio"),
        ({"gradient_accumulation_steps": 2}, "batchtopk", "batchtopk"),
        ({"gradient_accumulation_steps": 2, "sparsity_loss_type": "tanh-quad"}, "relu", "tanh-quad"),
        ({"gradient_accumulation_steps": 2, "auxk_coefficient": 0.03}, "topk", "auxk_coefficient"),
    ],
)
def test_contradictions_are_refused(options, act_fn, message):
    with pytest.raises(ConfigError, match=message):
        check_joints(resolved(10, **options), dictionary(act_fn), 10)


def test_combinations_that_work_are_not_refused():
    check_joints(resolved(10, gradient_accumulation_steps=2, sparsity_loss_type="tanh", target_l0=8.0), dictionary("jumprelu"), 10)
    check_joints(resolved(10, initial_k=1.0, k_warmup_steps=0.5, k_cold_booting_steps=0.5), dictionary("topk"), 10)


def test_what_was_set_without_effect_is_said_once_each():
    cfg = TrainerConfig(optimizer_foreach=True, initial_k=8, lr_scheduler_name="constant", lr_warm_up_steps=10, jumprelu_lr_factor=2.0)
    lines = warnings_of(cfg, dictionary("relu"))
    assert [line.split()[0] for line in lines] == ["act_fn", "optimizer_foreach", "initial_k", "jumprelu_lr_factor", "lr_warm_up_steps"]
    assert warnings_of(TrainerConfig(), dictionary("topk")) == []
    assert warnings_of(TrainerConfig(sparsity_loss_type="tanh"), dictionary("jumprelu")) == []


def test_checkpoints_end_with_the_run_and_may_outnumber_its_steps():
    linear = TrainerConfig(n_checkpoints=4, check_point_save_mode="linear")
    assert checkpoint_steps(linear, 100) == {25, 50, 75, 100}
    assert checkpoint_steps(linear, 2) == {1, 2}
    log = TrainerConfig(n_checkpoints=3, check_point_save_mode="log")
    assert checkpoint_steps(log, 1000) == {10, 100, 1000}
    assert checkpoint_steps(TrainerConfig(n_checkpoints=50), 3) == {1, 2, 3}
    assert checkpoint_steps(TrainerConfig(n_checkpoints=0), 100) == frozenset()
