"""SAELens: `SAETrainer.fit`, which clips at 1 and counts which latents fire. Defaults, without Weights & Biases.

With the option `sparse` the codes are COO tensors (`use_sparse_activations`); that needs `rescale_acts_by_decoder_norm` off, since its
backward pass raises otherwise.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from feed import Feed, Task, set_density
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

CLASSES = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
}


def train(task: Task, feed: Feed) -> None:
    sae_class, config_class = CLASSES[task.kind]
    options = {"k": task.k} if task.kind in ("topk", "batchtopk") else {}
    if task.options.get("sparse"):
        options |= {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    sae = sae_class(config_class(d_in=task.d_model, d_sae=task.d_sae, device="cpu", dtype="float32", **options))
    if task.kind in ("relu", "jumprelu"):
        threshold = getattr(sae, "threshold", torch.zeros(())).detach()
        set_density(sae.b_enc.data, lambda x: sae.encode_with_hidden_pre(x)[1] - threshold, feed.batches, task.density)

    def probe(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, _ = sae.encode_with_hidden_pre(x)
        dense = codes.to_dense() if codes.is_sparse else codes
        return (dense != 0).sum(-1), sae.decode(codes)

    feed.ready(sae.parameters(), probe, version("sae-lens"))
    cfg = SAETrainerConfig(
        total_training_samples=10**12, train_batch_size_samples=task.tokens, lr=task.lr, lr_end=task.lr, logger=LoggingConfig(log_to_wandb=False)
    )
    SAETrainer(cfg=cfg, sae=sae, data_provider=feed).fit()
