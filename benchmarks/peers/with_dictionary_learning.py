"""dictionary_learning: `trainSAE` with the trainer of each activation function, in their defaults (AuxK loss for dead latents, clipping, gradient
projection and unit decoder norms where the trainer has them).

The moving average of the threshold begins at once instead of after 1000 steps, so that the step is that of the rest of a run.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from feed import Feed, Task, set_density

TRAINERS: dict[str, tuple[type, dict[str, Any]]] = {
    "topk": (TopKTrainer, {"threshold_start_step": 0}),
    "batchtopk": (BatchTopKTrainer, {"threshold_start_step": 0}),
    "relu": (StandardTrainer, {"sparsity_warmup_steps": None}),
    "jumprelu": (JumpReluTrainer, {"sparsity_warmup_steps": None}),
}


def train(task: Task, feed: Feed) -> None:
    trainer_class, options = TRAINERS[task.kind]
    sized = {"k": task.k} if "topk" in task.kind else {}
    if task.kind == "jumprelu":
        sized = {"target_l0": task.density * task.d_sae}

    def start(**arguments: Any) -> Any:
        """The trainer, with the density set and the feed told of it: `trainSAE` builds it where nobody else gets at it."""
        trainer = trainer_class(**arguments)
        prepare(trainer.ae, task, feed)
        return trainer

    config = {
        "trainer": start, "steps": 10**9, "activation_dim": task.d_model, "dict_size": task.d_sae, "layer": 0, "lm_name": "none", "lr": task.lr,
        "warmup_steps": 0, "device": "cpu", **options, **sized,
    }  # fmt: skip
    trainSAE(feed, [config], steps=10**9, device="cpu")


def prepare(ae: Any, task: Task, feed: Feed) -> None:
    if task.kind == "relu":
        set_density(ae.encoder.bias.data, lambda x: ae.encoder(x - ae.bias), feed.batches, task.density)
    elif task.kind == "jumprelu":
        set_density(ae.b_enc.data, lambda x: x @ ae.W_enc + ae.b_enc - ae.threshold, feed.batches, task.density)

    def probe(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = ae.encode(x, use_threshold=False) if task.kind == "batchtopk" else ae.encode(x)
        return (codes != 0).sum(-1), ae.decode(codes)

    feed.ready(ae.parameters(), probe, version("dictionary-learning"))
