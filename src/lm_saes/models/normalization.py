"""The scalings that bring activations to norm sqrt(d_model): x is multiplied by s = sqrt(d_model) / (mean norm).

token-wise: each vector by its own norm. batch-wise: the batch's mean norm in training, its running mean in eval mode.
dataset-wise: one constant per hook point. inference: none, s = 1 (the scale is folded into the weights).

`ActivationSpace` is the part of a dictionary that knows them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lm_saes.config import SparseDictionaryConfig
from lm_saes.devices import no_narrower_than, widest_float
from lm_saes.errors import ConfigError, FoldingError
from lm_saes.ops import at_least_float32

Batch = Mapping[str, Any]
"""Activations by hook point, `mask`, and whatever else the stream says (docs/architecture.md)."""

RUNNING_NORM_RATE = 0.01
"""Rate of the moving average of the batch's mean norm."""


def vector_norms(x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape"]:
    """The norm of each vector, in at least float32."""
    return torch.linalg.vector_norm(at_least_float32(x), dim=-1)


def mean_norm(x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None) -> Float[Tensor, ""]:
    """The mean norm of the vectors in the mask (of all without one); zero if there is none."""
    norms = vector_norms(x)
    if mask is None:
        return norms.sum() / max(norms.numel(), 1)
    return torch.where(mask, norms, 0.0).sum() / mask.sum().clamp(min=1)


def scale_for(norm: Tensor, d_model: int) -> Tensor:
    """s = sqrt(d_model) / norm, elementwise; 1 where the norm is zero, so that zero vectors stay zero."""
    return torch.where(norm > 0, math.sqrt(d_model) / torch.where(norm > 0, norm, 1.0), 1.0)


@torch.no_grad()
def update_running_norms_(running: Float[Tensor, " hooks"], measured: Float[Tensor, " hooks"]) -> None:
    """Move running means towards measured ones; the first measurement (running = 0) is taken whole, an empty one (0) not at all."""
    moved = torch.where(running == 0, measured, torch.lerp(running, measured.to(running.dtype), RUNNING_NORM_RATE))
    running.copy_(torch.where(measured > 0, moved, running))


class ActivationSpace(nn.Module, ABC):
    """The way between raw activations and a dictionary's own space, and the end of it: folding."""

    running_activation_norms: Tensor | None
    """batch-wise only: the running mean norm at each hook point of `cfg.associated_hook_points`; 0 before the first step."""

    def __init__(self, cfg: SparseDictionaryConfig, device: torch.device) -> None:
        super().__init__()
        self.cfg = cfg
        n_hooks = len(cfg.associated_hook_points)
        norms = torch.zeros(n_hooks, device=device, dtype=widest_float(device)) if cfg.norm_activation == "batch-wise" else None
        self.register_buffer("running_activation_norms", norms)
        self._measured_norms: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As every module's, except that running norms keep their width when the weights are cast."""
        before = self.running_activation_norms
        super()._apply(fn, recurse)
        if before is not None and self.running_activation_norms is not None:
            after = self.running_activation_norms
            self.running_activation_norms = no_narrower_than(before, after, widest_float(after.device))
        return self

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""

    @abstractmethod
    def _scale_parameters_(self, scales: Mapping[str, float]) -> None:
        """Fold the scale of each hook point into the parameters, thresholds included."""

    def compute_norm_factor(self, x: Float[Tensor, "*shape D"], hook_point: str, mask: Bool[Tensor, "*shape"] | None = None) -> Tensor:
        """s at a hook point, broadcastable to the raw activations x: [..., 1] for token-wise, else a scalar.

        Raises:
            ConfigError: the mode needs a norm that was not measured yet.
        """
        if self.cfg.norm_activation == "token-wise":
            return scale_for(vector_norms(x), self.cfg.d_model).unsqueeze(-1)
        if self.cfg.norm_activation == "batch-wise" and self.training:
            return scale_for(mean_norm(x, mask), self.cfg.d_model)
        return torch.full((), self._constant_scale(hook_point), dtype=widest_float(x.device), device=x.device)

    def _constant_scale(self, hook_point: str) -> float:
        """s where it is one number for all activations: dataset-wise, batch-wise in eval mode, inference."""
        norm: float | None = None
        match self.cfg.norm_activation:
            case "inference":
                return 1.0
            case "dataset-wise":
                norm = (self.cfg.dataset_average_activation_norm or {}).get(hook_point)
                remedy = "initialise with an activation stream, or call set_dataset_average_activation_norm"
            case _:
                assert self.running_activation_norms is not None
                norm = self.running_activation_norms.tolist()[self.cfg.associated_hook_points.index(hook_point)]
                remedy = "train first; the running mean is that of training"
        if not norm:
            raise ConfigError(f"norm_activation '{self.cfg.norm_activation}' has no mean norm for hook point '{hook_point}'; {remedy}")
        return math.sqrt(self.cfg.d_model) / norm

    def normalize_activations(self, batch: Batch, return_scale_factor: bool = False) -> Any:
        """The batch with the activations of this dictionary's hook points scaled into its own space; hook points that the batch lacks are
        left out. In training, batch-wise norms are noted for the next `update_statistics`.

        Returns:
            the batch, or with `return_scale_factor` (batch, {hook point: factor}).
        """
        factors: dict[str, Tensor] = {}
        scaled = dict(batch)
        for hook_point in self.cfg.associated_hook_points:
            if hook_point in batch:
                x = batch[hook_point]
                factors[hook_point] = self.compute_norm_factor(x, hook_point, batch.get("mask"))
                scaled[hook_point] = x.to(self.dtype) if self.cfg.norm_activation == "inference" else self._scaled(x, factors[hook_point])
        if self.running_activation_norms is not None and self.training:
            norms = [mean_norm(batch[hook], batch.get("mask")) if hook in batch else None for hook in self.cfg.associated_hook_points]
            zero = torch.zeros((), device=self.running_activation_norms.device)
            self._measured_norms = torch.stack([zero if norm is None else norm.detach().to(zero) for norm in norms])
        return (scaled, factors) if return_scale_factor else scaled

    def _scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """x * factor, multiplied in at least float32 and then given the weights' data type."""
        return (at_least_float32(x).to(torch.promote_types(self.dtype, torch.float32)) * factor).to(self.dtype)

    def denormalize_activations(self, batch: Batch, scale_factors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The way back: the activations named in `scale_factors` divided by them."""
        return {**batch, **{hook: (batch[hook] / factor).to(batch[hook].dtype) for hook, factor in scale_factors.items() if hook in batch}}

    def set_dataset_average_activation_norm(self, norms: Mapping[str, float]) -> None:
        """Set the mean norm of raw activations at each hook point.

        Raises:
            ConfigError: the mode is not dataset-wise, or a hook point is missing or unknown, or a norm not positive.
        """
        if self.cfg.norm_activation != "dataset-wise":
            raise ConfigError(f"a dataset's mean norms belong to norm_activation 'dataset-wise', got '{self.cfg.norm_activation}'")
        missing = set(self.cfg.associated_hook_points) - set(norms)
        if missing:
            raise ConfigError(f"mean norms are missing for {sorted(missing)}")
        self.cfg = self.cfg.replace(dataset_average_activation_norm={hook: float(norm) for hook, norm in norms.items()})

    @torch.no_grad()
    def fold_activation_scale(self) -> None:
        """Fold the activation scale into the weights, in place: from here on the dictionary's own space is that of raw activations.

        Codes become codes / s_in; reconstructions of raw activations stay what they were. The configuration becomes "inference".

        Raises:
            FoldingError: there is no constant scale (token-wise), none was measured, or it was folded already.
        """
        mode = self.cfg.norm_activation
        if mode == "inference":
            raise FoldingError("the activation scale was folded already (norm_activation is 'inference')")
        if mode == "token-wise":
            raise FoldingError("norm_activation 'token-wise' has a scale for each vector and cannot be folded; pass fold_activation_scale=False")
        try:
            scales = {hook: self._constant_scale(hook) for hook in self.cfg.associated_hook_points}
        except ConfigError as error:
            raise FoldingError(f"cannot fold: {error} (or pass fold_activation_scale=False)") from None
        self._scale_parameters_(scales)
        self.running_activation_norms = self._measured_norms = None
        self.cfg = self.cfg.replace(norm_activation="inference", dataset_average_activation_norm=None)

    def update_running_norms(self) -> None:
        """Move the running norms of batch-wise by those that `normalize_activations` noted last in training; once per step."""
        if self.running_activation_norms is not None and self._measured_norms is not None:
            update_running_norms_(self.running_activation_norms, self._measured_norms)
            self._measured_norms = None
