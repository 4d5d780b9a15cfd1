"""A logistic probe of the true features: how well they could be told from the activations by a linear reading at best.

It is trained on the labels that a dictionary never sees, on activations of the same model, so its F1 is what a linear encoder with a
threshold can hope for: the ceiling that dictionaries are measured against. (Not a bound: an encoder may look twice at an activation.)
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lm_saes.evaluation.synthetic.generator import SYNTHETIC_HOOK
from lm_saes.evaluation.synthetic.metrics import Detection, DetectionCounts
from lm_saes.ops import SparseCodes

Batches = Iterable[dict[str, Any]]


class LogisticProbe:
    """P(feature i fires | x) = sigmoid(<w_i, x> + b_i) for the first `n` features, which are the most frequent ones; at 1/2 the probe fires."""

    def __init__(self, d_model: int, n: int, device: torch.device) -> None:
        self.weight: Float[Tensor, "D n"] = torch.zeros(d_model, n, device=device)
        self.bias: Float[Tensor, " n"] = torch.zeros(n, device=device)

    def fit(self, batches: Batches, n_batches: int, lr: float = 0.03) -> LogisticProbe:
        """Minimise the summed cross-entropies by one step of Adam per batch, the learning rate falling linearly to zero."""
        n = len(self.bias)
        parameters = [self.weight.requires_grad_(), self.bias.requires_grad_()]
        optimizer = torch.optim.Adam(parameters, lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_batches)
        for batch in islice(batches, n_batches):
            labels = _labels(batch["features"], n)
            logits = torch.addmm(self.bias, batch[SYNTHETIC_HOOK], self.weight)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.weight, self.bias = (parameter.detach() for parameter in parameters)
        return self

    def score(self, batches: Batches, n_batches: int) -> Detection:
        """How well it tells the features."""
        counts = DetectionCounts(torch.arange(len(self.bias), device=self.bias.device))
        for batch in islice(batches, n_batches):
            counts.update_firings(torch.addmm(self.bias, batch[SYNTHETIC_HOOK], self.weight) > 0, batch["features"])
        return counts.result()


def _labels(features: SparseCodes, n: int) -> Float[Tensor, "N n"]:
    """1 where one of the first n features fires."""
    labels = torch.zeros(features.n_rows, n, device=features.values.device)
    among = features.indices < n
    labels[features.rows[among], features.indices[among]] = 1.0
    return labels
