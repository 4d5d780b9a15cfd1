"""The sparsifiers: one small module each, all gating on q = h * ||W_D row|| (or h) and giving the gated h.

A code is never scaled by the norm. TopK, and BatchTopK in training, give sparse codes; the others what `ops` finds faster.
"""

# ruff: noqa: ARG002  every sparsifier is called alike, with k and mask that some have no use for
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lm_saes import ops
from lm_saes.config import SparseDictionaryConfig
from lm_saes.devices import no_narrower_than, widest_float
from lm_saes.errors import FoldingError
from lm_saes.ops import Codes, Encoder

INITIAL_JUMPRELU_THRESHOLD = 0.1
THRESHOLD_RATE = 0.01
"""Rate of the moving average of BatchTopK's threshold."""


class ActivationFunction(nn.Module, ABC):
    """From the input of the encoder to codes."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "N D"], encoder: Encoder, k: int, mask: Bool[Tensor, " N"] | None = None) -> Codes:
        """Codes of x. `k` counts for the TopK family, `mask` for what looks at a whole batch."""

    def learned_threshold(self) -> Float[Tensor, " F"] | None:
        """theta in gate space where it is a parameter, differentiable; else None."""
        return None

    def rescale_gate_(self, factor: float | Float[Tensor, " F"]) -> None:
        """Follow gate values that were multiplied by `factor` (one number, or one for each latent), so that the same latents fire.

        Raises:
            FoldingError: a factor for each latent changes what is selected.
        """

    def update_statistics(self, codes: Codes, encoder: Callable[[], Encoder]) -> None:
        """Learn from the codes of one training step, without gradient. `encoder` makes the encoder of the step, norms and all, where one is wanted."""

    def calibrate(self, inputs: Iterable[tuple[Tensor, Tensor | None]], encoder: Encoder, k: int) -> None:
        """Set what `update_statistics` tracks from (x [N, D], mask [N] or None) pairs."""

    def log_statistics(self) -> dict[str, Tensor]:
        """Thresholds worth logging, by metric name."""
        return {}


class ReLU(ActivationFunction):
    """h where q > 0."""

    def forward(self, x: Tensor, encoder: Encoder, k: int, mask: Tensor | None = None) -> Codes:
        return ops.threshold_codes(x, encoder, 0.0)


class JumpReLU(ActivationFunction):
    """h where q > theta, theta = exp(log_jumprelu_threshold) for each latent, learned by a straight-through gradient (`ops.jumprelu_codes`).

    The logarithm stays in float32 (or float64) whatever the dictionary's data type.
    """

    def __init__(self, cfg: SparseDictionaryConfig, device: torch.device) -> None:
        super().__init__()
        self.window = cfg.jumprelu_threshold_window
        dtype = torch.promote_types(cfg.dtype, torch.float32)  # pyright: ignore[reportArgumentType]
        start = torch.full((cfg.d_sae,), math.log(INITIAL_JUMPRELU_THRESHOLD), device=device, dtype=dtype)
        self.log_jumprelu_threshold = nn.Parameter(start)

    def learned_threshold(self) -> Tensor:
        return self.log_jumprelu_threshold.exp()

    def log_statistics(self) -> dict[str, Tensor]:
        return {"metrics/mean_jumprelu_threshold": self.learned_threshold().mean()}

    def forward(self, x: Tensor, encoder: Encoder, k: int, mask: Tensor | None = None) -> Codes:
        return ops.jumprelu_codes(x, encoder, self.learned_threshold(), self.window)

    @torch.no_grad()
    def rescale_gate_(self, factor: float | Tensor) -> None:
        self.log_jumprelu_threshold += factor.log() if isinstance(factor, Tensor) else math.log(factor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> JumpReLU:
        return super()._apply(lambda tensor: no_narrower_than(tensor, fn(tensor), torch.float32), recurse)


class TopK(ActivationFunction):
    """The k largest relu(q) of each token (Gao et al. 2024, arXiv 2406.04093)."""

    def forward(self, x: Tensor, encoder: Encoder, k: int, mask: Tensor | None = None) -> Codes:
        return ops.topk_codes(x, encoder, k)

    def rescale_gate_(self, factor: float | Tensor) -> None:
        _refuse_per_latent(factor, "topk")


class BatchTopK(ActivationFunction):
    """The k * N largest relu(q) of a batch in training; h where q > threshold in eval mode (Bussmann et al. 2024, arXiv 2412.06410).

    `threshold` lives in gate space: calibrated on the initialisation batches, then a moving average of the smallest selected gate
    value of each step. Zero means that it was never set.
    """

    threshold: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros((), device=device, dtype=widest_float(device)))

    def log_statistics(self) -> dict[str, Tensor]:
        return {"metrics/batchtopk_threshold": self.threshold}

    def forward(self, x: Tensor, encoder: Encoder, k: int, mask: Tensor | None = None) -> Codes:
        if self.training:
            return ops.batch_topk_codes(x, encoder, k, mask)
        return ops.threshold_codes(x, encoder, self.threshold)

    @torch.no_grad()
    def update_statistics(self, codes: Codes, encoder: Callable[[], Encoder]) -> None:
        smallest = _smallest_gate_value(codes, encoder())
        moved = torch.where(self.threshold == 0, smallest, torch.lerp(self.threshold, smallest, THRESHOLD_RATE))
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))

    @torch.no_grad()
    def calibrate(self, inputs: Iterable[tuple[Tensor, Tensor | None]], encoder: Encoder, k: int) -> None:
        smallest = torch.stack([_smallest_gate_value(ops.batch_topk_codes(x, encoder, k, mask), encoder) for x, mask in inputs])
        found = smallest[smallest.isfinite()]
        self.threshold.copy_(found.mean() if found.numel() else torch.zeros_like(self.threshold))

    @torch.no_grad()
    def rescale_gate_(self, factor: float | Tensor) -> None:
        _refuse_per_latent(factor, "batchtopk")
        self.threshold *= factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchTopK:
        return super()._apply(lambda tensor: no_narrower_than(tensor, moved := fn(tensor), widest_float(moved.device)), recurse)


def _smallest_gate_value(codes: Codes, encoder: Encoder) -> Float[Tensor, ""]:
    """The smallest positive gate value among the codes; infinity if none is positive."""
    if encoder.gate_norm is not None:
        codes = ops.scale_latents(codes, encoder.gate_norm)
    entries = ops.entries(codes).flatten()
    wide = entries.to(widest_float(entries.device))
    return torch.cat([torch.where(wide > 0, wide, math.inf), wide.new_full((1,), math.inf)]).min()


def _refuse_per_latent(factor: float | Tensor, act_fn: str) -> None:
    if isinstance(factor, Tensor):
        raise FoldingError(
            f"rescaling each latent changes what {act_fn} selects, unless the gate includes the decoder norm; set sparsity_include_decoder_norm=True"
        )


def make_activation_function(cfg: SparseDictionaryConfig, device: torch.device) -> ActivationFunction:
    """The sparsifier that the configuration names."""
    table: dict[str, Callable[[], ActivationFunction]] = {
        "relu": ReLU,
        "jumprelu": lambda: JumpReLU(cfg, device),
        "topk": TopK,
        "batchtopk": lambda: BatchTopK(device),
    }
    return table[cfg.act_fn]()
