"""overcomplete: `train_sae` with clipping, without monitoring, and the plain linear encoder with a bias (the default one adds a batch norm).

Its dictionary is normalised in every forward pass. `top_k` of its BatchTopK is the total of a batch.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from feed import Feed, Task, set_density
from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, TopKSAE, train_sae
from overcomplete.sae.losses import mse_l1


def mse(x: torch.Tensor, x_hat: torch.Tensor, *_: Any) -> torch.Tensor:
    return (x - x_hat).square().mean()


def train(task: Task, feed: Feed) -> None:
    if task.kind == "topk":
        sae, criterion = TopKSAE(task.d_model, task.d_sae, top_k=task.k), mse
    elif task.kind == "batchtopk":
        sae, criterion = BatchTopKSAE(task.d_model, task.d_sae, top_k=task.k * task.tokens), mse
    else:
        sae = (SAE if task.kind == "relu" else JumpSAE)(task.d_model, task.d_sae)
        criterion = partial(mse_l1, penalty=0.1 / (task.tokens * task.d_model))  # its penalty is a sum over the batch, its error a mean
    sae.untied(bias=True)
    sae.train()
    if task.kind in ("relu", "jumprelu"):
        threshold = sae.thresholds.exp().detach() if task.kind == "jumprelu" else 0.0
        set_density(sae.encoder.bias.data, lambda x: sae.encoder(x)[0] - threshold, feed.batches, task.density)

    def probe(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, codes, reconstruction = sae(x)
        return (codes != 0).sum(-1), reconstruction

    feed.ready(sae.parameters(), probe, version("overcomplete"))
    optimizer = torch.optim.Adam(sae.parameters(), lr=task.lr)
    train_sae(sae, feed, criterion, optimizer, nb_epochs=1, monitoring=0, device="cpu")
