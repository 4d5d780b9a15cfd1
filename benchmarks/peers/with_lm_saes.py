"""This library: `Trainer.fit` on a stream in memory, with clipping and all statistics, the metrics of log steps as rare as by default."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from feed import Feed, Task, set_density

from lm_saes import __version__, ops
from lm_saes.config import InitializerConfig, SAEConfig, TrainerConfig
from lm_saes.models.initializer import Initializer
from lm_saes.training.trainer import Trainer

HOOK = "activations"
START: dict[str, Any] = {"bias_init_method": "geometric_median", "grid_search_init_norm": True, "init_encoder_bias_with_mean_hidden_pre": True}
LOSSES: dict[str, dict[str, Any]] = {
    "relu": {"sparsity_loss_type": "power", "l1_coefficient_warmup_steps": 0},
    "jumprelu": {"sparsity_loss_type": "tanh", "l1_coefficient_warmup_steps": 0},
}


class _Batches:
    """The feed's batches as `Trainer` reads them."""

    def __init__(self, feed: Any) -> None:
        self.feed = iter(feed)

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        x = next(self.feed)
        return {HOOK: x, "tokens": torch.zeros(len(x), dtype=torch.int64), "mask": torch.ones(len(x), dtype=torch.bool)}


def train(task: Task, feed: Feed) -> None:
    fields = {"act_fn": task.kind, "top_k": task.k, "d_model": task.d_model, "expansion_factor": task.d_sae / task.d_model}
    cfg = SAEConfig.model_validate({"hook_point_in": HOOK, "device": "cpu", **fields})
    initializer = Initializer(InitializerConfig(**START, n_batches=len(feed.batches)))
    sae = initializer.initialize_sae_from_config(cfg, _Batches(feed.batches))
    if task.kind in LOSSES:
        set_density(sae.b_E, lambda x: _over_threshold(sae, x), feed.batches, task.density, sae.decoder_norm())

    def probe(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normalized = sae.normalize_activations({HOOK: x})
        forward = sae.run(sae.prepare_input(normalized))
        scale = sae.compute_norm_factor(x, HOOK)
        return ops.counts(forward.codes), forward.reconstruction / scale

    feed.ready(sae.parameters(), probe, f"{__version__} ({ops.explain()})")
    rare = 10**9
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            TrainerConfig(
                lr=task.lr, lr_scheduler_name="constant", clip_grad_norm=1.0,
                total_training_tokens=10**12, log_frequency=rare, eval_frequency=rare, n_checkpoints=0, exp_result_path=f"{folder}/run",
                **{**LOSSES.get(task.kind, {}), **task.options},
            )
        )  # fmt: skip
        trainer.fit(sae, _Batches(feed))


def _over_threshold(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """Gate values minus thresholds."""
    encoder = sae.encoder()
    q = ops.gate_values(ops.pre_activations(sae.prepare_input(sae.normalize_activations({HOOK: x})), encoder), encoder)
    threshold = sae.activation_function.learned_threshold()
    return q if threshold is None else q - threshold
