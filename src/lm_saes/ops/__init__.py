"""The operations that dictionaries are made of: one function each, and one place that chooses how it is computed.

`reference.py` is the definition. A faster implementation stands beside it and has to agree with it, outputs and gradients
(tests/ops). The environment variable `LM_SAES_OPS=reference` forces the reference; `explain()` says what runs and why.

Letters: N tokens, D model width, F latents; h pre-activations, q gate values (h, times the norm of the decoder row where the gate
includes it). All comparisons are made in float32 or wider, also under autocast.
"""

from __future__ import annotations

import os
from types import ModuleType

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lm_saes.errors import ConfigError
from lm_saes.ops import reference
from lm_saes.ops.reference import Encoder
from lm_saes.ops.sparse_codes import Codes, SparseCodes, at_least_float32, counts, entries, latent_sums, map_codes, row_sums, scale_latents, to_dense

ENVIRONMENT_VARIABLE = "LM_SAES_OPS"
_IMPLEMENTATIONS = {"auto": reference, "reference": reference}


def _implementation() -> ModuleType:
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name not in _IMPLEMENTATIONS:
        raise ConfigError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(_IMPLEMENTATIONS)}, got '{name}'")
    return _IMPLEMENTATIONS[name]


def explain() -> str:
    """Which implementation runs, and why, in one line."""
    chosen = _implementation().__name__.rpartition(".")[2]
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    why = f"{ENVIRONMENT_VARIABLE}={asked}" if asked else f"{ENVIRONMENT_VARIABLE} is not set"
    return f"ops: {chosen} (plain torch, the only implementation in this version; {why})"


def pre_activations(x: Float[Tensor, "N D"], encoder: Encoder, latents: Int64[Tensor, " M"] | None = None) -> Float[Tensor, "N _"]:
    """h = x W + b, times sigmoid(x W_glu + b_glu) for a gated linear unit; of all latents, or of `latents` only."""
    return _implementation().pre_activations(x, encoder, latents)


def gate_values(h: Float[Tensor, "N _"], encoder: Encoder, latents: Int64[Tensor, " M"] | None = None) -> Float[Tensor, "N _"]:
    """q = h * ||W_D row|| where the gate includes the norm, else h; in float32 or wider."""
    return _implementation().gate_values(h, encoder, latents)


def topk_codes(x: Float[Tensor, "N D"], encoder: Encoder, k: int) -> SparseCodes:
    """TopK (Gao et al. 2024, arXiv 2406.04093): for each token the k latents of largest relu(q), with values h.

    Always min(k, F) entries per row; those with q <= 0 are zeros without gradient.
    """
    return _implementation().topk_codes(x, encoder, k)


def batch_topk_codes(x: Float[Tensor, "N D"], encoder: Encoder, k: int, mask: Bool[Tensor, " N"] | None = None) -> SparseCodes:
    """BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the k * (rows in the mask) largest relu(q) of the whole batch, with values h.

    Rows outside the mask get no code. Entries with q <= 0 are zeros without gradient.
    """
    return _implementation().batch_topk_codes(x, encoder, k, mask)


def threshold_codes(h: Float[Tensor, "N F"], q: Float[Tensor, "N F"], threshold: Tensor | float) -> Float[Tensor, "N F"]:
    """h where q > threshold and h > 0, else 0. Gradient to h is that mask; none flows to q or the threshold."""
    return _implementation().threshold_codes(h, q, threshold)


def jumprelu(h: Float[Tensor, "N F"], q: Float[Tensor, "N F"], threshold: Float[Tensor, " F"], window: float) -> Float[Tensor, "N F"]:
    """JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): `threshold_codes` with a straight-through gradient to the threshold.

    With c the code, theta the threshold and eps the full width of the window:
    dc/dh = 1[q > theta and h > 0];  dc/dtheta = -(theta / eps) 1[|q - theta| < eps / 2] 1[h > 0];  dc/dq = 0.
    """
    return _implementation().jumprelu(h, q, threshold, window)


def decode(codes: Codes, W_D: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    """codes @ W_D, for codes of either form."""
    return _implementation().decode(codes, W_D)


__all__ = [
    "ENVIRONMENT_VARIABLE", "Codes", "Encoder", "SparseCodes", "at_least_float32", "batch_topk_codes", "counts", "decode", "entries", "explain",
    "gate_values", "jumprelu", "latent_sums", "map_codes", "pre_activations", "row_sums", "scale_latents", "threshold_codes", "to_dense",
    "topk_codes",
]  # fmt: skip
