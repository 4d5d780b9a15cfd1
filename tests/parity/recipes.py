"""What all libraries get: weights, dictionaries and batches, all from NumPy's generators, so that no library's random numbers matter.

`scripts/make_sae_lens_golden.py` and `scripts/make_interop_golden.py` run other libraries on them, the tests of this folder run ours.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lm_saes.models import SparseAutoEncoder

GOLDEN = Path(__file__).parent.parent / "golden" / "sae_lens"

# ------------------------------------------------------------------------------------------------ given weights

D, F, N, K = 8, 24, 16, 5
HOOK, HOOK_OUT = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
MEAN_NORMS = {HOOK: 3.1, HOOK_OUT: 0.8}
THRESHOLD = 0.4


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Biases of the size of the signal and decoder rows of very different norms, so that a convention taken wrongly is seen."""
    rng = np.random.default_rng(seed)
    W_dec = rng.normal(size=(F, D)) * np.exp(0.7 * rng.normal(size=(F, 1))) / np.sqrt(D)
    arrays = {
        "W_enc": rng.normal(size=(D, F)) / np.sqrt(D), "b_enc": 0.3 * rng.normal(size=F), "W_dec": W_dec, "b_dec": rng.normal(size=D),
        "threshold": np.exp(0.5 * rng.normal(size=F)) - 0.7,  # some below zero
        "b_gate": 0.5 * rng.normal(size=F), "b_mag": 0.5 * rng.normal(size=F), "r_mag": 0.5 * rng.normal(size=F),
        "W_skip": rng.normal(size=(D, D)) / np.sqrt(D),
    }  # fmt: skip
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}


BANDWIDTH, TANH = 0.8, 0.3


def positive_thresholds() -> Tensor:
    """[F] in float32, what sae-lens keeps a threshold in that is being trained."""
    return weights()["threshold"].abs() + 0.05


def inputs() -> Tensor:
    """[N, D] in float32."""
    return torch.from_numpy(np.random.default_rng(99).normal(0.3, 1.3, size=(N, D)).astype(np.float32))


EXPORTS: dict[str, dict[str, Any]] = {
    "relu": {},
    "relu_token_wise": {"norm_activation": "token-wise"},
    "relu_without_decoder_bias": {"use_decoder_bias": False, "norm_activation": "dataset-wise"},
    "topk": {"act_fn": "topk", "sparsity_include_decoder_norm": False, "norm_activation": "dataset-wise"},
    "topk_including_norm": {"act_fn": "topk"},
    "jumprelu": {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False},
    "jumprelu_including_norm": {"act_fn": "jumprelu", "norm_activation": "dataset-wise"},
    "batchtopk": {"act_fn": "batchtopk", "norm_activation": "dataset-wise"},
    "transcoder": {"hook_point_out": HOOK_OUT, "norm_activation": "dataset-wise"},
    "jumprelu_transcoder": {"act_fn": "jumprelu", "hook_point_out": HOOK_OUT, "norm_activation": "dataset-wise"},
    "skip_transcoder": {"hook_point_out": HOOK_OUT, "norm_activation": "dataset-wise", "use_skip_connection": True},
    "jumprelu_skip_transcoder": {"act_fn": "jumprelu", "hook_point_out": HOOK_OUT, "use_skip_connection": True},
}
"""Dictionaries of ours that are written for sae-lens."""


def ours(name: str) -> SparseAutoEncoder:
    """One of `EXPORTS`, in eval mode."""
    from lm_saes.config import SAEConfig
    from lm_saes.models import SparseAutoEncoder

    options = {"norm_activation": "inference", **EXPORTS[name]}
    if options["norm_activation"] == "dataset-wise":
        options["dataset_average_activation_norm"] = {hook: MEAN_NORMS[hook] for hook in {HOOK, options.get("hook_point_out", HOOK)}}
    dictionary = SparseAutoEncoder(SAEConfig(hook_point_in=HOOK, d_model=D, expansion_factor=F / D, top_k=K, **options))
    given = weights(seed=1)
    with torch.no_grad():
        for parameter, key in (
            (dictionary.W_E, "W_enc"),
            (dictionary.b_E, "b_enc"),
            (dictionary.W_D, "W_dec"),
            (dictionary.b_D, "b_dec"),
            (dictionary.W_skip, "W_skip"),
        ):
            if parameter is not None:
                parameter.copy_(given[key])
        if dictionary.cfg.act_fn == "jumprelu":
            dictionary.activation_function.log_jumprelu_threshold.copy_(0.4 * given["b_gate"] - 1)
        if dictionary.cfg.act_fn == "batchtopk":
            dictionary.activation_function.threshold.fill_(THRESHOLD)
    return dictionary.eval()


# ------------------------------------------------------------------------------------------------ training

TRAIN_D, TRAIN_F, BATCH, STEPS = 16, 64, 128, 300
PREFIXES = (8, 24)
LR, LR_WARM_UP, L1, L1_WARM_UP, TRAIN_K = 3e-3, 40, 0.15, 100, 4


def initial_weights() -> dict[str, Tensor]:
    """Decoder rows of norm 0.1, the encoder their transpose, biases of zero (sae-lens' default start), in float64."""
    rows = np.random.default_rng(3).normal(size=(TRAIN_F, TRAIN_D))
    W_dec = torch.from_numpy(0.1 * rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return {"W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(TRAIN_F).double(), "W_dec": W_dec, "b_dec": torch.zeros(TRAIN_D).double()}


@cache
def directions() -> np.ndarray:
    rows = np.random.default_rng(4).normal(size=(48, TRAIN_D))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@cache
def batch(step: int) -> Tensor:
    """[BATCH, TRAIN_D] in float64: sparse positive combinations of 48 directions, off centre, with a little noise."""
    rng = np.random.default_rng((5, step))
    amounts = (rng.random((BATCH, 48)) < 0.08) * (0.5 + rng.random((BATCH, 48)))
    return torch.from_numpy(2 * amounts @ directions() + 0.2 + 0.02 * rng.normal(size=(BATCH, TRAIN_D)))
