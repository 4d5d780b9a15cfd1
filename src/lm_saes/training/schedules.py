"""What changes over a run: the learning rate, k and the coefficients, as plain functions of the step.

Steps are counted from 0; a run has T of them. `resolve` turns fractions into steps and clamps the defaults that do not fit the
run; `knobs` then gives the values of one step. Nothing here is remembered between steps, so that resuming needs only the step.

Learning rate, as a factor of `lr`, with r = `lr_end_ratio`, W = `lr_warm_up_steps`, C = `lr_cool_down_steps`:

    up(t)   = min(1, (t + 1) / W)                        1 without warm-up; reaches 1 at t = W - 1
    down(t) = 1 - (1 - r) * (t + 1 - (T - C)) / C        over the last C steps, 1 before; reaches r at t = T - 1
    u(t)    = (t - W) / (T - 1 - W)                      progress after the warm-up, from 0 to 1

    constant               1
    constantwithwarmup     up(t) * down(t)
    linearwarmupdecay      up(t), then 1 - (1 - r) * u
    cosineannealing        r + (1 - r) * (1 + cos(pi * u)) / 2, with W = 0
    cosineannealingwarmup  up(t), then the same
    exponentialwarmup      up(t), then r ** u
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lm_saes.config import SparseDictionaryConfig, TrainerConfig
from lm_saes.errors import ConfigError

_WARMS_UP = frozenset({"constantwithwarmup", "linearwarmupdecay", "cosineannealingwarmup", "exponentialwarmup"})
_SELECTS_K = frozenset({"topk", "batchtopk"})
CLAMPED = ("lr_warm_up_steps", "dead_threshold", "log_frequency")
"""Fields whose default is clamped to the run (see `resolve`)."""


class Knobs(NamedTuple):
    """The scheduled values of one step."""

    lr: float
    """Learning rate of the group "others"."""
    k: int
    """Active latents per token (the TopK family)."""
    sparsity: float
    """Weight of the sparsity loss; with `target_l0` the controller multiplies it."""
    lp: float
    """Weight of the pre-activation loss; 0 is off."""
    auxk: float
    """Weight of AuxK; 0 is off."""


def total_steps(cfg: TrainerConfig, tokens_per_batch: int) -> int:
    """Steps of a run: whole batches in `total_training_tokens`, at least one."""
    return max(1, cfg.total_training_tokens // tokens_per_batch)


def resolve(cfg: TrainerConfig, total_steps: int, tokens_per_batch: int, say: Callable[[str], None] = lambda _: None) -> TrainerConfig:
    """`cfg` with every number of steps as an int, and with the defaults that exceed the run clamped.

    A default `lr_warm_up_steps` becomes at most a fifth of the run, a default `dead_threshold` at most a quarter of its tokens, a
    default `log_frequency` at most a twentieth of its steps. Values that were set are obeyed. `say` gets one line per clamping.
    """
    changes: dict[str, Any] = {}
    for name in ("l1_coefficient_warmup_steps", "k_warmup_steps", "k_cold_booting_steps", "lr_warm_up_steps", "lr_cool_down_steps"):
        changes[name] = _steps(getattr(cfg, name), total_steps)
    limits = {
        "lr_warm_up_steps": (total_steps // 5, "a fifth of the run", "steps"),
        "dead_threshold": (total_steps * tokens_per_batch / 4, "a quarter of the run", "tokens"),
        "log_frequency": (max(1, total_steps // 20), "a twentieth of the run", "steps"),
    }
    for name, (limit, share, unit) in limits.items():
        default = changes.get(name, getattr(cfg, name))
        if name not in cfg.model_fields_set and default > limit:
            changes[name] = limit
            say(f"{name}: the default of {default:,.10g} {unit} exceeds {share}; {limit:,.10g} is used (set it to override)")
    return cfg.replace(**changes)


def _steps(value: int | float, total_steps: int) -> int:
    return round(value * total_steps) if isinstance(value, float) else value


def check_joints(cfg: TrainerConfig, dictionary: SparseDictionaryConfig, total_steps: int) -> None:
    """Refuse combinations of a resolved `cfg` with a dictionary that cannot be trained as asked.

    Raises:
        ConfigError: naming the fields and the way out.
    """
    act_fn = dictionary.act_fn
    if cfg.target_l0 is not None:
        if act_fn in _SELECTS_K:
            raise ConfigError(f'target_l0 steers a sparsity loss, but act_fn "{act_fn}" fixes L0 by top_k; remove target_l0 and set top_k')
        if cfg.target_l0 >= dictionary.d_sae:
            raise ConfigError(f"target_l0 must be below d_sae = {dictionary.d_sae}, got {cfg.target_l0:g}")
        if cfg.l1_coefficient == 0:
            raise ConfigError("target_l0 scales l1_coefficient, which is 0; set a positive l1_coefficient to start from")
    if cfg.lp_coefficient and act_fn != "jumprelu":
        raise ConfigError(f'lp_coefficient is the weight of JumpReLU\'s pre-activation loss; got act_fn "{act_fn}", remove lp_coefficient')
    if cfg.initial_k is not None and act_fn in _SELECTS_K:
        start, annealing = _initial_k(cfg, dictionary.d_sae), int(cfg.k_cold_booting_steps + cfg.k_warmup_steps)
        if start > dictionary.d_sae:
            raise ConfigError(f"initial_k must be at most d_sae = {dictionary.d_sae}, got {start}")
        if annealing > total_steps:
            raise ConfigError(
                f"k_cold_booting_steps + k_warmup_steps = {annealing} exceeds the run of {total_steps} steps, so k would never reach top_k; shorten them"
            )
    if cfg.lr_scheduler_name == "exponentialwarmup" and cfg.lr_end_ratio == 0:
        raise ConfigError('lr_end_ratio must be positive with lr_scheduler_name "exponentialwarmup", which decays as lr_end_ratio ** progress; got 0')
    clash = accumulation_clash(cfg, dictionary)
    if cfg.gradient_accumulation_steps > 1 and clash:
        raise ConfigError(
            f"gradient_accumulation_steps = {cfg.gradient_accumulation_steps} cuts the batch, but {clash} is a statistic of the whole batch; set it to 1"
        )


def accumulation_clash(cfg: TrainerConfig, dictionary: SparseDictionaryConfig) -> str | None:
    """What stands against cutting batches into micro-batches: the option that looks at a whole batch, if there is one."""
    whole_batch = {
        'act_fn "batchtopk"': dictionary.act_fn == "batchtopk",
        'sparsity_loss_type "tanh-quad"': cfg.sparsity_loss_type == "tanh-quad",
        "auxk_coefficient": bool(cfg.auxk_coefficient),
    }
    return next((name for name, is_set in whole_batch.items() if is_set), None)


def warnings_of(cfg: TrainerConfig, dictionary: SparseDictionaryConfig) -> list[str]:
    """One line per option that was set without an effect here, and per combination that trains but is hardly meant."""
    act_fn, schedule = dictionary.act_fn, cfg.lr_scheduler_name
    lines = []
    if act_fn not in _SELECTS_K and (cfg.sparsity_loss_type is None or cfg.l1_coefficient == 0):
        lines.append(
            f'act_fn "{act_fn}" without a sparsity loss trains a dense autoencoder; set sparsity_loss_type ("power", "tanh" or "tanh-quad") and l1_coefficient'
        )
    without_effect = {
        "optimizer_foreach": "the fused optimizer is used",
        **{name: 'act_fn is not "topk" or "batchtopk"' for name in _K_FIELDS if act_fn not in _SELECTS_K},
        **({} if act_fn == "jumprelu" else {"jumprelu_lr_factor": 'act_fn is not "jumprelu"'}),
        **({} if schedule in _WARMS_UP else {"lr_warm_up_steps": f'lr_scheduler_name "{schedule}" has no warm-up'}),
        **({} if schedule == "constantwithwarmup" else {"lr_cool_down_steps": f'lr_scheduler_name "{schedule}" has no cool-down of its own'}),
        **({"lr_end_ratio": 'lr_scheduler_name "constant" does not decay'} if schedule == "constant" else {}),
        **({} if cfg.sparsity_loss_type else {"l1_coefficient": "there is no sparsity_loss_type"}),
    }
    lines += [f"{name} has no effect: {why}" for name, why in without_effect.items() if _was_set(cfg, name)]
    return lines


_K_FIELDS = ("initial_k", "k_warmup_steps", "k_cold_booting_steps", "k_schedule_type", "k_exponential_factor")


def _was_set(cfg: TrainerConfig, name: str) -> bool:
    return name in cfg.model_fields_set and getattr(cfg, name) is not None


def knobs(cfg: TrainerConfig, dictionary: SparseDictionaryConfig, step: int, total_steps: int) -> Knobs:
    """The scheduled values of `step` in [0, total_steps); `cfg` must be resolved.

    The sparsity coefficient rises linearly from 0 at step 0 to its value at step `l1_coefficient_warmup_steps`.
    """
    warm_up = int(cfg.l1_coefficient_warmup_steps)
    coefficient = 1.0 if cfg.l1_coefficient is None else cfg.l1_coefficient
    return Knobs(
        lr=cfg.lr * lr_factor(cfg, step, total_steps),
        k=annealed_k(cfg, step, dictionary.top_k, dictionary.d_sae),
        sparsity=(coefficient * min(1.0, step / warm_up) if warm_up else coefficient) if cfg.sparsity_loss_type else 0.0,
        lp=cfg.lp_coefficient or 0.0,
        auxk=cfg.auxk_coefficient or 0.0,
    )


def lr_factor(cfg: TrainerConfig, step: int, total_steps: int) -> float:
    """The learning rate of `step` over `lr`; the formulas stand at the top of this file."""
    ratio, schedule = cfg.lr_end_ratio, cfg.lr_scheduler_name
    warm_up = int(cfg.lr_warm_up_steps) if schedule in _WARMS_UP else 0
    rise = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    if schedule == "constant":
        return 1.0
    if schedule == "constantwithwarmup":
        cool_down = int(cfg.lr_cool_down_steps)
        into_cool_down = step + 1 - (total_steps - cool_down)
        return rise * (1.0 - (1.0 - ratio) * into_cool_down / cool_down if cool_down and into_cool_down > 0 else 1.0)
    if step < warm_up:
        return rise
    after = total_steps - 1 - warm_up
    progress = (step - warm_up) / after if after > 0 else 0.0
    if schedule == "linearwarmupdecay":
        return 1.0 - (1.0 - ratio) * progress
    if schedule == "exponentialwarmup":
        return ratio**progress
    return ratio + (1.0 - ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _initial_k(cfg: TrainerConfig, d_sae: int) -> int:
    return max(1, round(cfg.initial_k * d_sae)) if isinstance(cfg.initial_k, float) else int(cfg.initial_k or 0)


def annealed_k(cfg: TrainerConfig, step: int, top_k: int, d_sae: int) -> int:
    """k at `step`: `initial_k` for `k_cold_booting_steps`, then to `top_k` within `k_warmup_steps`, exactly.

    With u in (0, 1] the progress of the annealing and f = `k_exponential_factor`, the share of the way still to go is 1 - u
    (linear) or (exp(-f u) - exp(-f)) / (1 - exp(-f)) (exponential).
    """
    if cfg.initial_k is None:
        return top_k
    start, booting, warm_up = _initial_k(cfg, d_sae), int(cfg.k_cold_booting_steps), int(cfg.k_warmup_steps)
    if step < booting:
        return start
    progress = min(1.0, (step - booting + 1) / warm_up) if warm_up else 1.0
    remaining = 1.0 - progress
    if cfg.k_schedule_type == "exponential":
        end = math.exp(-cfg.k_exponential_factor)
        remaining = (math.exp(-cfg.k_exponential_factor * progress) - end) / (1.0 - end)
    return top_k + round((start - top_k) * remaining)


def warm_up_ends(cfg: TrainerConfig) -> int:
    """The first step at which neither the learning rate nor the sparsity coefficient warms up any more; `cfg` must be resolved."""
    rising_lr = int(cfg.lr_warm_up_steps) if cfg.lr_scheduler_name in _WARMS_UP else 0
    return max(int(cfg.l1_coefficient_warmup_steps), rising_lr)


def checkpoint_steps(cfg: TrainerConfig, total_steps: int) -> frozenset[int]:
    """After how many steps a checkpoint is written: `n_checkpoints` numbers in [1, T] that end at T, equally spaced or with equal
    ratios. Fewer where they coincide. With 0 there are none, and only an interrupted run leaves one."""
    count = cfg.n_checkpoints
    if cfg.check_point_save_mode == "linear":
        return frozenset(max(1, round(total_steps * i / count)) for i in range(1, count + 1))
    return frozenset(max(1, round(total_steps ** (i / count))) for i in range(1, count + 1))
