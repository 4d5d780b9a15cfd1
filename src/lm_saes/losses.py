"""The terms of the training loss: each a function of the dictionary, what went in and what came out.

Every term is per token, then averaged over the mask (an empty mask gives zero), and is summed in at least float32. f is the code,
n = ||W_D row||, V the total variance of the labels. Pre-activations are not stored: a term that needs some has `ops` compute them
again for the latents that it looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lm_saes import ops
from lm_saes.config import SparseDictionaryConfig
from lm_saes.errors import ConfigError
from lm_saes.ops import Codes, Encoder, at_least_float32


@dataclass(frozen=True)
class Forward:
    """What a dictionary makes of N tokens, in its own space."""

    codes: Codes
    """The gated h: dense [N, F], or sparse for the TopK family."""
    reconstruction: Float[Tensor, "N D"]
    squared_error: Float[Tensor, " N"] | None = None
    """|x^ - target|^2 of each token, where the dictionary was run with a target."""


@runtime_checkable
class HasLosses(Protocol):
    """What the terms ask of a dictionary; see `SparseDictionary`."""

    cfg: SparseDictionaryConfig

    def encoder(self) -> Encoder: ...
    def decoder_norm(self, keepdim: bool = False) -> Float[Tensor, "*shape"]: ...
    def prefix_errors(
        self, codes: Codes, target: Float[Tensor, "N D"], widths: Sequence[int], detach: bool = False, x: Float[Tensor, "N D"] | None = None
    ) -> list[Float[Tensor, " N"]]: ...
    def decode_latents(self, codes: Codes, latents: Int64[Tensor, " M"]) -> Float[Tensor, "N D"]: ...
    def learned_threshold(self) -> Float[Tensor, " F"] | None: ...


@dataclass(frozen=True)
class LossInputs:
    """What the terms look at, all in the dictionary's own space."""

    x: Float[Tensor, "N D"]
    target: Float[Tensor, "N D"]
    forward: Forward
    mask: Bool[Tensor, " N"] | None = None
    """Tokens that count; None: all."""
    dead: Bool[Tensor, " F"] | None = None
    """Latents that have not fired for long; None: none is known to be dead."""


@dataclass(frozen=True)
class LossWeights:
    """Which terms there are, and how much each weighs. A term whose weight is None is left out."""

    sparsity_loss_type: Literal["power", "tanh", "tanh-quad"] | None = None
    sparsity: float | Tensor = 1.0
    """lambda."""
    tanh_stretch_coefficient: float = 4.0
    """c."""
    frequency_scale: float = 0.01
    """s."""
    p: float = 1.0
    lp: float | None = None
    """lambda_P."""
    auxk: float | None = None
    """alpha."""
    k_aux: int = 512


def total_loss(dictionary: HasLosses, inputs: LossInputs, weights: LossWeights) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The loss, and its weighted terms by name: `mse_loss`, `prefix_loss`, `sparsity_loss`, `lp_loss`, `aux_loss`, those that there are.

    Raises:
        ConfigError: the pre-activation loss is asked for where no threshold is learned, or the sparsity loss has no such type.
    """
    terms = {"mse_loss": reconstruction_loss(dictionary, inputs)}
    if dictionary.cfg.matryoshka is not None:
        terms["prefix_loss"] = prefix_loss(dictionary, inputs)
    if weights.sparsity_loss_type is not None:
        terms["sparsity_loss"] = weights.sparsity * sparsity_loss(dictionary, inputs, weights)
    if weights.lp is not None:
        terms["lp_loss"] = weights.lp * preactivation_loss(dictionary, inputs)
    if weights.auxk is not None:
        terms["aux_loss"] = weights.auxk * auxk_loss(dictionary, inputs, weights.k_aux)
    return torch.stack(list(terms.values())).sum(), terms


def reconstruction_loss(dictionary: HasLosses, inputs: LossInputs) -> Float[Tensor, ""]:  # noqa: ARG001  every term has this head
    """sum_d (x^ - y)^2."""
    error = inputs.forward.squared_error
    return masked_mean(_squared_error(inputs.forward.reconstruction, inputs.target) if error is None else error, inputs.mask)


def prefix_loss(dictionary: HasLosses, inputs: LossInputs) -> Float[Tensor, ""]:
    """sum_m w_m sum_d (x^_m - y)^2, x^_m the reconstruction by b_D and the first `widths[m]` latents alone: the inner levels of a
    Matryoshka dictionary (Bussmann et al. 2025, arXiv 2503.17547). Zero where the dictionary has none."""
    matryoshka = dictionary.cfg.matryoshka
    if matryoshka is None:
        return inputs.target.new_zeros(())
    weights = matryoshka.weights or (1.0,) * len(matryoshka.widths)
    errors = dictionary.prefix_errors(inputs.forward.codes, inputs.target, matryoshka.widths, matryoshka.detach, inputs.x)
    return torch.stack([weight * masked_mean(error, inputs.mask) for weight, error in zip(weights, errors, strict=True)]).sum()


def sparsity_loss(dictionary: HasLosses, inputs: LossInputs, weights: LossWeights) -> Float[Tensor, ""]:
    """The penalty that `weights.sparsity_loss_type` names, not yet multiplied by lambda."""
    match weights.sparsity_loss_type:
        case "power":
            return power_loss(dictionary, inputs, weights.p)
        case "tanh":
            return tanh_loss(dictionary, inputs, weights.tanh_stretch_coefficient)
        case "tanh-quad":
            return tanh_quad_loss(dictionary, inputs, weights.tanh_stretch_coefficient, weights.frequency_scale)
        case other:
            raise ConfigError(f"sparsity_loss_type must be power, tanh or tanh-quad, got {other!r}")


def power_loss(dictionary: HasLosses, inputs: LossInputs, p: float = 1.0) -> Float[Tensor, ""]:
    """|| f n ||_p for p > 0; p = 1 is the L1 penalty of Anthropic's April 2024 update. Latents that are off get no gradient."""
    magnitudes = ops.scale_latents(inputs.forward.codes, dictionary.decoder_norm())
    if p == 1:
        return masked_mean(ops.row_sums(magnitudes), inputs.mask)
    sums = ops.row_sums(ops.map_codes(magnitudes, lambda v: _power(v, p)))
    return masked_mean(_power(sums, 1 / p), inputs.mask)


def tanh_loss(dictionary: HasLosses, inputs: LossInputs, stretch: float = 4.0) -> Float[Tensor, ""]:
    """sum_i tanh(c f_i n_i) (Anthropic, January 2025 update)."""
    return masked_mean(ops.row_sums(_stretched_tanh(dictionary, inputs, stretch)), inputs.mask)


def tanh_quad_loss(dictionary: HasLosses, inputs: LossInputs, stretch: float = 4.0, frequency_scale: float = 0.01) -> Float[Tensor, ""]:
    """sum_i p_i (1 + p_i / s), p_i the masked mean of tanh(c f_i n_i) over the batch: frequent latents cost more."""
    codes = _stretched_tanh(dictionary, inputs, stretch)
    mask = _row_mask(inputs)
    frequency = ops.latent_sums(codes, mask / mask.sum().clamp(min=1))
    return (frequency * (1 + frequency / frequency_scale)).sum()


def preactivation_loss(dictionary: HasLosses, inputs: LossInputs) -> Float[Tensor, ""]:
    """sum_i relu(theta_i - q_i) where the gate includes the decoder norm, else sum_i relu(theta_i - h_i) n_i: pulls silent latents of
    JumpReLU towards firing (Anthropic, January 2025 update).

    Raises:
        ConfigError: the activation function learns no threshold.
    """
    threshold = dictionary.learned_threshold()
    if threshold is None:
        raise ConfigError(
            f"lp_coefficient is the weight of JumpReLU's pre-activation loss; got act_fn '{dictionary.cfg.act_fn}', set lp_coefficient to none"
        )
    encoder = dictionary.encoder()
    missing = (threshold - ops.gate_values(ops.pre_activations(inputs.x, encoder), encoder)).relu()
    if encoder.gate_norm is None:
        missing = missing * dictionary.decoder_norm()
    return masked_mean(missing.sum(-1), inputs.mask)


def auxk_loss(dictionary: HasLosses, inputs: LossInputs, k_aux: int = 512) -> Float[Tensor, ""]:
    """AuxK: V * mean ||e - e^||^2 / mean ||e||^2 (Gao et al. 2024, arXiv 2406.04093, appendix A.2).

    e = y - x^ is the error, detached; e^ the reconstruction of it by the k_aux dead latents of largest relu(q), without b_D. The
    quotient is one of means over the mask, as in the paper's code, so that a token without error does no harm. (There the
    denominator is the variance of e in the batch, mean ||e - mean e||^2: the same where b_D leaves no mean error.) V (detached)
    gives it the weight that it has there, where the reconstruction loss is divided by V. Only dead latents get gradient. Zero if
    none is dead.
    """
    target = at_least_float32(inputs.target)
    dead = None if inputs.dead is None else inputs.dead.nonzero().flatten()
    if dead is None or dead.numel() == 0:
        return target.new_zeros(())
    error = (target - at_least_float32(inputs.forward.reconstruction)).detach()
    codes = ops.topk_codes(inputs.x, dictionary.encoder().select(dead), k_aux)
    unexplained = masked_mean(_squared_error(dictionary.decode_latents(codes, dead), error), inputs.mask)
    scale = masked_mean(error.square().sum(-1), inputs.mask)
    return torch.where(scale > 0, label_variance(target.detach(), inputs.mask) / torch.where(scale > 0, scale, 1.0), 0.0) * unexplained


def label_variance(target: Float[Tensor, "N D"], mask: Bool[Tensor, " N"] | None = None) -> Float[Tensor, ""]:
    """V: the variance of the labels in the mask, summed over dimensions."""
    target = at_least_float32(target)
    n_rows = max(len(target), 1) if mask is None else mask.sum().clamp(min=1)
    mean = (target if mask is None else torch.where(mask[:, None], target, 0.0)).sum(0) / n_rows
    return masked_mean((target - mean).square().sum(-1), mask)


def masked_mean(per_token: Float[Tensor, " N"], mask: Bool[Tensor, " N"] | None = None) -> Float[Tensor, ""]:
    """The mean over the tokens in the mask; zero if there is none."""
    if mask is None:
        return per_token.sum() / max(per_token.numel(), 1)
    return torch.where(mask, per_token, 0.0).sum() / mask.sum().clamp(min=1)


def _squared_error(estimate: Tensor, target: Tensor) -> Float[Tensor, " N"]:
    return (at_least_float32(estimate) - at_least_float32(target)).square().sum(-1)


def _stretched_tanh(dictionary: HasLosses, inputs: LossInputs, stretch: float) -> Codes:
    return ops.map_codes(ops.scale_latents(inputs.forward.codes, dictionary.decoder_norm()), lambda v: (stretch * v).tanh())


def _row_mask(inputs: LossInputs) -> Float[Tensor, " N"]:
    ones = torch.ones_like(inputs.target[:, 0], dtype=torch.promote_types(inputs.target.dtype, torch.float32))
    return ones if inputs.mask is None else ones * inputs.mask


def _power(v: Tensor, p: float) -> Tensor:
    """v ** p for v >= 0, with value and gradient zero at v = 0, where the true derivative may be infinite."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0) ** p, 0.0)
