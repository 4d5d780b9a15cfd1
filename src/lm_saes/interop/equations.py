"""From the equations of other libraries to ours, exactly.

Most libraries compute variants of

    z  = (s x - [b_dec]) W_enc + b_enc            the bracket: some subtract the decoder's bias from the input
    f  = act(z)                                   or act(z n) with n = ||W_dec row|| / s
    x^ = (f W_dec + b_dec) / s [+ x W_skip]       or ((f / n) W_dec + b_dec) / s [+ x W_skip]

and ours is h = x W_E + b_E, f = act(h), x^ = f W_D + b_D [+ x W_skip]. Both are affine maps around the same activation function, so there are W_E, b_E, W_D
and b_D with which ours gives the same codes and the same reconstructions. They are computed in float64 and stored in the data type of the decoder, in float32 where
that is narrower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lm_saes.errors import WeightsError

LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
BATCH_THRESHOLD = "activation_function.threshold"


class Native(NamedTuple):
    """A dictionary as this library saves it."""

    fields: dict[str, Any]
    """Of its configuration (`SAEConfig`)."""
    tensors: dict[str, Tensor]
    """By the names of `SparseAutoEncoder.state_dict()`."""
    provenance: dict[str, Any]
    """Where it comes from."""


@dataclass
class ForeignEquations:
    """A dictionary with the equations above; every field in the orientation given, whatever the file's was."""

    W_enc: Float[Tensor, "D F"]
    b_enc: Float[Tensor, " F"]
    W_dec: Float[Tensor, "F D"]
    b_dec: Float[Tensor, " D"]
    act_fn: str
    """Ours that the library's corresponds to."""
    threshold: Float[Tensor, "*F"] | None = None
    """In units of what `act` gets (z, or z n s); one number for BatchTopK, one for each latent for JumpReLU."""
    W_skip: Float[Tensor, "D D"] | None = None
    top_k: int | None = None
    subtracts_b_dec: bool = False
    codes_include_decoder_norm: bool = False
    """act gets z n."""
    input_scale: float = 1.0
    """s."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the configuration, such as hook points."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def native(self, origin: str) -> Native:
        """The same dictionary in our equations.

        Raises:
            WeightsError: shapes that do not fit together, or an input and an output of different width.
        """
        self._check(origin)
        dtype = torch.promote_types(self.W_dec.dtype, torch.float32)
        W_E, b_E, W_D, b_D = (tensor.double() for tensor in (self.W_enc, self.b_enc, self.W_dec, self.b_dec))
        if self.subtracts_b_dec:
            b_E = b_E - b_D @ W_E
        W_E, W_D, b_D = W_E * self.input_scale, W_D / self.input_scale, b_D / self.input_scale
        threshold = self.threshold
        if self.codes_include_decoder_norm:  # a row of norm zero has the code 0 in both
            norm = torch.linalg.vector_norm(W_D, dim=1)
            W_E, b_E, W_D = W_E * norm, b_E * norm, W_D / torch.where(norm > 0, norm, 1.0)[:, None]
            threshold = None if threshold is None else threshold.double() / self.input_scale
        tensors = {"W_E": W_E, "b_E": b_E, "W_D": W_D, "b_D": b_D, **({} if self.W_skip is None else {"W_skip": self.W_skip})}
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        if threshold is not None and self.act_fn == "jumprelu":
            tensors[LOG_THRESHOLD] = log_threshold(threshold, dtype)
        if threshold is not None and self.act_fn == "batchtopk":
            tensors[BATCH_THRESHOLD] = threshold.double().clone()
        fields = {
            "sae_type": "sae",
            "d_model": W_E.shape[0],
            "expansion_factor": expansion_factor(*W_E.shape),
            "act_fn": self.act_fn,
            "norm_activation": "inference",
            "sparsity_include_decoder_norm": False,  # what the gate looked at is in the weights now
            **({} if self.top_k is None else {"top_k": self.top_k}),
            **({} if self.W_skip is None else {"use_skip_connection": True}),
            **self.fields,
        }
        return Native(fields, tensors, dict(self.provenance))

    def _check(self, origin: str) -> None:
        if self.W_enc.dim() != 2 or self.W_dec.dim() != 2:
            raise WeightsError(f"{origin}: wanted matrices for encoder and decoder, got {list(self.W_enc.shape)} and {list(self.W_dec.shape)}")
        D, F = self.W_enc.shape
        if self.W_dec.shape[0] == F and self.W_dec.shape[1] != D:
            raise WeightsError(
                f"{origin}: reads width {D} and writes width {self.W_dec.shape[1]}; a transcoder between different widths cannot be represented here"
            )
        wanted = {"b_enc": (self.b_enc, [F]), "W_dec": (self.W_dec, [F, D]), "b_dec": (self.b_dec, [D])}
        if self.W_skip is not None:
            wanted["W_skip"] = (self.W_skip, [D, D])
        if self.threshold is not None:
            wanted["threshold"] = (self.threshold, [F] if self.act_fn == "jumprelu" else [])
        faults = [f"{name} has shape {list(tensor.shape)}, wanted {shape}" for name, (tensor, shape) in wanted.items() if list(tensor.shape) != shape]
        if faults:
            raise WeightsError(f"{origin}: {', '.join(faults)}, beside an encoder of shape {[D, F]}")


def gated(
    W_enc: Float[Tensor, "D F"], b_gate: Float[Tensor, " F"], b_mag: Float[Tensor, " F"], r_mag: Float[Tensor, " F"],
    W_dec: Float[Tensor, "F D"], b_dec: Float[Tensor, " D"],
) -> ForeignEquations:  # fmt: skip
    """A gated dictionary as the JumpReLU that it is: with u the product with W_enc it fires where u + b_gate > 0 and gives relu(exp(r_mag) u + b_mag),
    so its weights are exp(r_mag) W_enc and its threshold b_mag - exp(r_mag) b_gate."""
    gain, W_enc, b_gate, b_mag = r_mag.double().exp(), W_enc.double(), b_gate.double(), b_mag.double()
    return ForeignEquations(W_enc * gain, b_mag, W_dec, b_dec, "jumprelu", b_mag - gain * b_gate)


def log_threshold(threshold: Float[Tensor, " F"], dtype: torch.dtype) -> Float[Tensor, " F"]:
    """log theta. A threshold of zero or less (the gate is then that of ReLU) becomes the smallest normal number of the type."""
    return threshold.double().clamp_min(torch.finfo(dtype).tiny).log().to(dtype)


def expansion_factor(d_model: int, d_sae: int) -> float:
    """The factor with which int(d_model * factor) is d_sae, rounding included."""
    factor = d_sae / d_model
    return factor if int(d_model * factor) == d_sae else math.nextafter(factor, math.inf)
