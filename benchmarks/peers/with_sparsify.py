"""sparsify (`eai-sparsify` on PyPI): `Trainer.fit` around a "language model" whose one module hands out the feed's batches.

Its step happens in a forward hook of that module and after it: decoder normalisation, forward, loss, backward, gradient projection,
optimizer, firing statistics. The option `optimizer` is "adam" or "signum" (the default there, with its own learning rate).
"""

from __future__ import annotations

import os
from importlib.metadata import version

import torch
from feed import Feed, Task
from torch import nn

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its Triton decoder is for GPUs

from sparsify import SparseCoderConfig, TrainConfig, Trainer

ROWS = 8


class _Source(nn.Module):
    def __init__(self, task: Task, feed: Feed) -> None:
        super().__init__()
        self.task, self.feed = task, feed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if torch.is_inference_mode_enabled():  # the trainer looks how wide the module is
            return torch.zeros(*ids.shape, self.task.d_model)
        return next(self.feed).view(*ids.shape, self.task.d_model)


class _Model(nn.Module):
    """What the trainer asks of a language model."""

    device = torch.device("cpu")
    dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}  # noqa: RUF012

    def __init__(self, task: Task, feed: Feed) -> None:
        super().__init__()
        self.source = _Source(task, feed)

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.source(input_ids)


class _Tokens(torch.utils.data.Dataset):
    """Rows of token ids without end; what they are does not matter."""

    def __init__(self, length: int) -> None:
        self.row = {"input_ids": torch.zeros(length, dtype=torch.int64)}

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.row


def train(task: Task, feed: Feed) -> None:
    optimizer = task.options["optimizer"]
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=task.d_sae, k=task.k),
        batch_size=ROWS,
        optimizer=optimizer,
        lr=task.lr if optimizer == "adam" else None,
        lr_warmup_steps=0,
        hookpoints=["source"],
        log_to_wandb=False,
        save_every=10**9,
    )
    trainer = Trainer(cfg, _Tokens(task.tokens // ROWS), _Model(task, feed))
    coder = trainer.saes["source"]

    def probe(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = coder(x)
        return (out.latent_acts > 0).sum(-1), out.sae_out

    feed.ready(coder.parameters(), probe, version("eai-sparsify"))
    trainer.fit()
