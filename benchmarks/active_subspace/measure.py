"""What is measured of a dictionary: latents that are dead, explained variance, and what it costs the model."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from lm_saes.evaluation.downstream import Splicer, final_hidden_cosines, next_token_losses
from lm_saes.evaluation.firing import FiringCounts, dead_fraction
from lm_saes.evaluation.reconstruction import ReconstructionSums, explained_variance
from lm_saes.lm.language_model import LanguageModel
from lm_saes.models.sae import SparseAutoEncoder
from lm_saes.ops import Codes

ROWS = 1024


def window(d_sae: int, k: int) -> int:
    """Tokens on which a latent must stay silent to count as dead: those on which it would fire 20 times, did all fire alike."""
    return math.ceil(20 * d_sae / k)


class Sparse:
    """A dictionary for the evaluation's functions, with sparse codes instead of dense ones."""

    training = False

    def __init__(self, sae: SparseAutoEncoder) -> None:
        self._sae, self.cfg = sae, sae.cfg

    def train(self, mode: bool = True) -> Self:
        del mode
        return self

    def features_and_reconstruction(self, batch: dict[str, Any]) -> tuple[Codes, Tensor]:
        """Codes and the raw reconstruction of raw activations."""
        normalized, factors = self._sae.normalize_activations(batch, return_scale_factor=True)
        forward = self._sae.run(self._sae.prepare_input(normalized))
        return forward.codes, forward.reconstruction / factors[self.cfg.hook_point_out]


@torch.no_grad()
def quality(sae: SparseAutoEncoder, heldout: Tensor) -> dict[str, float]:
    """Share of dead latents, over as many held-out tokens as the definition asks for, and explained variance over all of them."""
    needed = window(sae.cfg.d_sae, sae.cfg.top_k)
    if len(heldout) < needed:
        raise ValueError(
            f"{sae.cfg.d_sae} latents with k = {sae.cfg.top_k} are dead if silent on {needed:,} held-out tokens, there are {len(heldout):,}"
        )
    training, view, counts, sums = sae.training, Sparse(sae.eval()), FiringCounts(), ReconstructionSums()
    for part, counted in ((heldout[:needed], True), (heldout[needed:], False)):
        for rows in part.split(ROWS):
            codes, reconstruction = view.features_and_reconstruction({sae.cfg.hook_point_in: rows})
            if counted:
                counts.update(codes)
            sums.update(rows, reconstruction)
    sae.train(training)
    return {"dead": dead_fraction(counts), "explained_variance": explained_variance(sums) or 0.0}


class Cost:
    """What the reconstruction costs the model on some contexts: ΔCE in nats, or, of an encoder, 1 - cosine of the final hidden states."""

    def __init__(self, model: LanguageModel, batches: list[dict[str, Tensor]]) -> None:
        self.model, self.batches = model, batches
        self._clean = [self._losses(Splicer(model, batch["tokens"], batch["attention_mask"]).clean(), batch) for batch in batches]

    def _losses(self, output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (
            next_token_losses(output, batch["tokens"].to(output.device), batch["attention_mask"].to(output.device))
            if self.model.is_causal
            else output
        )

    def __call__(self, sae: SparseAutoEncoder) -> float:
        total, n = 0.0, 0
        for batch, clean in zip(self.batches, self._clean, strict=True):
            changed = Splicer(self.model, batch["tokens"], batch["attention_mask"]).reconstructed(Sparse(sae.eval()), batch["mask"])
            if self.model.is_causal:
                values = self._losses(changed, batch) - clean
            else:
                values = 1 - final_hidden_cosines(clean, changed, batch["attention_mask"].to(clean.device))
            total, n = total + float(values.double().sum()), n + len(values)
        return total / n
