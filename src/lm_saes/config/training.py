"""Configurations of training: the trainer and the places where its metrics go."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lm_saes.config.base import BaseConfig, DType, PathString, Steps, _DType, dtype_name


def _amp_name(value: Any) -> str | None:
    if value is None or value == "auto":
        return value
    name = dtype_name(value)
    if name not in {"bfloat16", "float16"}:
        if name == "float32":
            return None
        raise ValueError(f"amp_dtype must be bfloat16, float16, none or auto, got {value!r}")
    return name


class TrainerConfig(BaseConfig):
    """One training run. `TrainerConfig()` trains with every activation function.

    A number of steps given as an int counts steps; a float in [0, 1] is a fraction of the run.
    """

    # Loss
    l1_coefficient: float | None = 0.00008
    """Weight of the sparsity loss (`None` is 1). With `target_l0`, where the controller starts."""
    l1_coefficient_warmup_steps: Steps = 0.1
    """Steps over which that weight rises linearly from 0."""
    lp_coefficient: float | None = None
    """Weight of JumpReLU's pre-activation loss (3e-6 recommended); `None` is off."""
    auxk_coefficient: float | None = None
    """Weight of AuxK (1/32 typical); `None` is off."""
    sparsity_loss_type: Literal["power", "tanh", "tanh-quad"] | None = None
    """The sparsity loss; `None` means no penalty."""
    tanh_stretch_coefficient: float = Field(default=4.0, gt=0)
    """c in tanh(c f ||W_D||)."""
    frequency_scale: float = Field(default=0.01, gt=0)
    """s in tanh-quad's p (1 + p / s)."""
    p: float = Field(default=1, gt=0)
    """Order of the norm of the power loss."""
    target_l0: float | None = Field(default=None, gt=0)
    """Closed-loop control of the sparsity coefficient towards this L0 (ReLU and JumpReLU with a sparsity loss)."""
    k_aux: int = Field(default=512, ge=1)
    """Latents that AuxK uses."""
    dead_threshold: float = Field(default=10_000_000, gt=0)
    """Tokens without firing after which a latent counts as dead. The default is clamped to a quarter of the run."""

    # k
    initial_k: int | float | None = None
    """k at the start; an int counts latents, a float in (0, 1] is a fraction of d_sae. `None`: no annealing."""
    k_warmup_steps: Steps = 0.1
    """Steps over which k goes from `initial_k` to `top_k`."""
    k_cold_booting_steps: Steps = 0
    """Steps at `initial_k` before that."""
    k_schedule_type: Literal["linear", "exponential"] = "linear"
    """Shape of the annealing."""
    k_exponential_factor: float = Field(default=3.0, gt=0)
    """Curvature of the exponential annealing."""

    # Optimizer
    lr: float = Field(default=0.0004, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's betas."""
    optimizer_class: Literal["adam", "sparseadam"] = "adam"
    """Adam, or Adam that applies updates only where the gradient is not zero."""
    frozen: Literal["encoder", "decoder"] | None = None
    """A part that stays as it starts, for comparison (`--baseline`): W_E and b_E (with their GLU), or W_D. All else is trained."""
    optimizer_foreach: bool = True
    """Without effect (the fused implementation is used). Setting it warns."""
    lr_scheduler_name: Literal[
        "constant", "constantwithwarmup", "linearwarmupdecay", "cosineannealing", "cosineannealingwarmup", "exponentialwarmup"
    ] = "constantwithwarmup"
    """Shape of the learning rate over the run."""
    lr_end_ratio: float = Field(default=1 / 32, ge=0, le=1)
    """Final learning rate over the peak."""
    lr_warm_up_steps: Steps = 5000
    """Linear warm-up. The default is clamped to a fifth of the run."""
    lr_cool_down_steps: Steps = 0.2
    """Decay at the end."""
    jumprelu_lr_factor: float = Field(default=1.0, gt=0)
    """Multiplier of the learning rate of JumpReLU's log-thresholds."""
    clip_grad_norm: float = Field(default=0.0, ge=0)
    """Largest global norm of the gradient; 0 switches clipping off."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches that each batch is cut into; gradients and metrics are those of the whole batch."""
    amp_dtype: Annotated[str | None, BeforeValidator(_amp_name), _DType()] = "auto"
    """Compute data type; weights stay float32. "auto": bfloat16 on CUDA, off elsewhere."""

    # Run
    total_training_tokens: int = Field(default=300_000_000, ge=1)
    """Tokens to train on; steps = tokens // tokens per batch."""
    seed: int = 0
    """Seeds the initialisation, shuffling, mixing and the order of the data; the last three have the `stream_seed` of the settings where one is set."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a batch does whose loss or gradients are NaN or infinite: stop the run, or be skipped, which is said and counted. It is saved either way (the first few)."""
    skip_metrics_calculation: bool = False
    """Log only the losses, the schedules and what costs nothing."""
    feature_sampling_window: int = Field(default=1000, ge=1)
    """Steps over which the density metrics (`sparsity/...`) are counted."""
    log_frequency: int = Field(default=1000, ge=1)
    """Steps between log lines. The default is clamped to a twentieth of the run."""
    eval_frequency: int = Field(default=1000, ge=1)
    """Steps between calls of `eval_fn`."""
    n_checkpoints: int = Field(default=10, ge=0)
    """Checkpoints over the run."""
    check_point_save_mode: Literal["log", "linear"] = "log"
    """Their spacing."""
    checkpoint_minutes: float | None = Field(default=30.0, gt=0)
    """Minutes after which there is a checkpoint beside those (not with `n_checkpoints` = 0): no more is lost. `None`: only those."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Newest checkpoints that stay. Of the older ones of the plan the dictionary alone stays; the others are removed."""
    from_pretrained_path: PathString | None = None
    """A checkpoint whose weights a new run starts from."""
    exp_result_path: PathString = "results"
    """The run's folder."""

    @model_validator(mode="after")
    def _joints(self) -> Self:
        if self.initial_k is not None and (self.initial_k <= 0 or (isinstance(self.initial_k, float) and self.initial_k > 1)):
            raise ValueError(f"initial_k must be a positive int or a fraction of d_sae in (0, 1], got {self.initial_k}")
        for name in ("l1_coefficient_warmup_steps", "k_warmup_steps", "k_cold_booting_steps", "lr_warm_up_steps", "lr_cool_down_steps"):
            value = getattr(self, name)
            if isinstance(value, float) and value > 1:
                raise ValueError(f"{name} is a number of steps (int) or a fraction of the run in [0, 1], got {value}")
        for name in ("l1_coefficient", "lp_coefficient", "auxk_coefficient"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.target_l0 is not None and self.sparsity_loss_type is None:
            raise ValueError('target_l0 controls the sparsity coefficient and needs a sparsity_loss_type ("power", "tanh" or "tanh-quad")')
        return self


class WandbConfig(BaseConfig):
    """Where a run reports to in Weights & Biases. The mode comes from the environment variable WANDB_MODE."""

    wandb_project: str = "gpt2-sae-training"
    exp_name: str | None = None
    wandb_entity: str | None = None
    wandb_run_id: str | None = None
    wandb_resume: Literal["allow", "must", "never", "auto"] = "never"


class TensorBoardConfig(BaseConfig):
    """Write TensorBoard event files."""

    log_dir: PathString | None = None
    """The folder; `None` is `tensorboard/` in the run's folder."""


class TrackioConfig(BaseConfig):
    """Report to trackio."""

    project: str = "lm-saes"
    name: str | None = None


__all__ = ["DType", "TensorBoardConfig", "TrackioConfig", "TrainerConfig", "WandbConfig"]
