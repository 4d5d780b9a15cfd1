"""Which latents fire: counts per batch, and the tokens since each one fired last."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lm_saes.ops import Codes, latent_sums, map_codes


def firing_counts(codes: Codes, mask: Bool[Tensor, " N"]) -> Int[Tensor, " F"]:
    """How many tokens (of those in `mask`) each latent fires on. No transfer to the host. Exact below 2^24 tokens."""
    fires = map_codes(codes, lambda values: (values > 0).float())
    return latent_sums(fires, mask.float()).long()


class DeadLatents:
    """Tokens since each latent fired last; a latent is dead at `threshold` tokens or more."""

    def __init__(self, n_latents: int, threshold: float, device: torch.device | str) -> None:
        self.threshold = threshold
        self.tokens_since_fired: Int[Tensor, " F"] = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def update(self, counts: Int[Tensor, " F"], tokens: Int[Tensor, ""]) -> None:
        """Take note of a batch of `tokens` tokens, on which the latents fired `counts` times."""
        self.tokens_since_fired.add_(tokens).masked_fill_(counts > 0, 0)

    def dead(self) -> Bool[Tensor, " F"]:
        """Which latents are dead."""
        return self.tokens_since_fired >= self.threshold

    def state_dict(self) -> dict[str, Tensor]:
        return {"tokens_since_fired": self.tokens_since_fired}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
