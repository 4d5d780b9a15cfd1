"""The operations that dictionaries are made of: one function each, and one place that chooses how it is computed.

`reference.py` is the definition. `sparse.py`, which never builds dense codes, has to agree with it, outputs and gradients
(tests/ops); it stands on kernels, in C++ where they are compiled and apply, else in torch. It runs on CPUs, the reference elsewhere;
the environment variable `LM_SAES_OPS` (auto, reference, sparse, native, screened) forces one of them everywhere, and `explain()` says what runs
and why.

Letters: N tokens, D model width, F latents; h pre-activations, q gate values (h, times the norm of the decoder row where the gate
includes it). All comparisons are made in float32 or wider, also under autocast.
"""

from __future__ import annotations

import os
from typing import Any

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lm_saes.errors import ConfigError
from lm_saes.ops import native, reference, torch_kernels
from lm_saes.ops.reference import Encoder
from lm_saes.ops.screened import ScreenedOps
from lm_saes.ops.sparse import SparseOps
from lm_saes.ops.sparse_codes import (
    Codes,
    SparseCodes,
    at_least_float32,
    counts,
    entries,
    latent_range,
    latent_sums,
    map_codes,
    row_sums,
    scale_latents,
    to_dense,
)

ENVIRONMENT_VARIABLE = "LM_SAES_OPS"
_IMPLEMENTATIONS = {
    "reference": reference,
    "sparse": SparseOps((torch_kernels,), largest_density=0.1),
    "native": SparseOps((native, torch_kernels), largest_density=0.2),
    "screened": ScreenedOps((native, torch_kernels), largest_density=0.2),
}


def _implementation(tensor: Tensor) -> Any:
    return _IMPLEMENTATIONS[_chosen(tensor.device.type)]


def _chosen(device: str) -> str:
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name == "auto":
        # Measured (benchmarks/README.md) on CPUs only. Sparse codes ask the device how many entries there are, but for TopK.
        if device != "cpu":
            return "reference"
        if not native.available():
            return "sparse"
        return "screened" if native.screening_pays() else "native"
    if name not in _IMPLEMENTATIONS:
        raise ConfigError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(('auto', *_IMPLEMENTATIONS))}, got '{name}'")
    if name in ("native", "screened") and not native.available():
        raise ConfigError(f"{ENVIRONMENT_VARIABLE}={name}: {native.describe()}; unset it to run in plain torch")
    return name


def explain() -> str:
    """Which implementation runs, and why, in one line."""
    asked, chosen = os.environ.get(ENVIRONMENT_VARIABLE, "auto"), _chosen("cpu")
    how = {
        "reference": "reference, the definition in plain torch",
        "sparse": "sparse, without dense codes, in torch",
        "native": f"native, without dense codes: {native.describe()}",
        "screened": f"screened, without dense codes, selection from a product in low precision with certain bounds: {native.describe()}",
    }[chosen]
    if asked != "auto":
        return f"ops: {how} ({ENVIRONMENT_VARIABLE}={asked})"
    why = "" if chosen in ("native", "screened") else f" ({native.describe()})"
    return f"ops: on CPUs {how}{why}; on other devices reference; {ENVIRONMENT_VARIABLE} is " + (
        "auto" if ENVIRONMENT_VARIABLE in os.environ else "not set"
    )


def pre_activations(x: Float[Tensor, "N D"], encoder: Encoder, latents: Int64[Tensor, " M"] | None = None) -> Float[Tensor, "N _"]:
    """h = x W + b, times sigmoid(x W_glu + b_glu) for a gated linear unit; of all latents, or of `latents` only."""
    return _implementation(x).pre_activations(x, encoder, latents)


def gate_values(h: Float[Tensor, "N _"], encoder: Encoder, latents: Int64[Tensor, " M"] | None = None) -> Float[Tensor, "N _"]:
    """q = h * ||W_D row|| where the gate includes the norm, else h; in float32 or wider."""
    return _implementation(h).gate_values(h, encoder, latents)


def topk_codes(x: Float[Tensor, "N D"], encoder: Encoder, k: int) -> SparseCodes:
    """TopK (Gao et al. 2024, arXiv 2406.04093): for each token the k latents of largest relu(q), with values h.

    Always min(k, F) entries per row; those with q <= 0 are zeros without gradient.
    """
    return _implementation(x).topk_codes(x, encoder, k)


def batch_topk_codes(x: Float[Tensor, "N D"], encoder: Encoder, k: int, mask: Bool[Tensor, " N"] | None = None) -> SparseCodes:
    """BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the k * (rows in the mask) largest relu(q) of the whole batch, with values h.

    Rows outside the mask get no code. Entries with q <= 0 are zeros without gradient.
    """
    return _implementation(x).batch_topk_codes(x, encoder, k, mask)


def threshold_codes(x: Float[Tensor, "N D"], encoder: Encoder, threshold: Tensor | float) -> Codes:
    """h where q > threshold (a number, or one for each latent) and h > 0, else 0; threshold 0 is ReLU.

    Gradient to h is that mask; none flows to q or the threshold.
    """
    return _implementation(x).threshold_codes(x, encoder, threshold)


def jumprelu_codes(x: Float[Tensor, "N D"], encoder: Encoder, threshold: Float[Tensor, " F"], window: float) -> Codes:
    """JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): `threshold_codes` with a straight-through gradient to the threshold.

    With c the code, theta the threshold and eps the full width of the window:
    dc/dh = 1[q > theta and h > 0];  dc/dtheta = -(theta / eps) 1[|q - theta| < eps / 2] 1[h > 0];  dc/dq = 0.
    """
    return _implementation(x).jumprelu_codes(x, encoder, threshold, window)


def decode(codes: Codes, W_D: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    """codes @ W_D, for codes of either form."""
    return _implementation(W_D).decode(codes, W_D)


def reconstruct(
    codes: Codes, W_D: Float[Tensor, "F D"], b_D: Float[Tensor, " D"] | None, target: Float[Tensor, "N D"]
) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
    """x^ = codes @ W_D + b_D, and the squared error |x^ - target|^2 of each token in float32 or wider; both differentiable."""
    return _implementation(W_D).reconstruct(codes, W_D, b_D, target)


__all__ = [
    "ENVIRONMENT_VARIABLE", "Codes", "Encoder", "SparseCodes", "at_least_float32", "batch_topk_codes", "counts", "decode", "entries", "explain",
    "gate_values", "jumprelu_codes", "latent_range", "latent_sums", "map_codes", "pre_activations", "reconstruct", "row_sums", "scale_latents", "threshold_codes", "to_dense",
    "topk_codes",
]  # fmt: skip
