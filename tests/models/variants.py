"""The combinations of options that a dictionary can have, and small dictionaries of each."""

from __future__ import annotations

import itertools

import torch

from lm_saes.config import SAEConfig
from lm_saes.models import SparseAutoEncoder, SparseDictionary

FACTORS = {
    "act_fn": ["relu", "jumprelu", "topk", "batchtopk"],
    "norm_activation": ["token-wise", "batch-wise", "dataset-wise", "inference"],
    "use_glu_encoder": [False, True],
    "use_decoder_bias": [True, False],
    "sparsity_include_decoder_norm": [True, False],
    "transcoder": [False, True, "skip"],
}
NORMS = {"in": 3.0, "out": 0.7}
D, F, K = 5, 12, 3


def combinations(factors: dict[str, list]) -> list[dict]:
    """Every combination."""
    return [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]


def pairwise(factors: dict[str, list]) -> list[dict]:
    """Few combinations in which every two values of two factors meet: greedily, the first that shows most pairs not yet seen."""
    everything = combinations(factors)
    unseen = {pair for combination in everything for pair in pairs(combination)}
    chosen = []
    while unseen:
        chosen.append(max(everything, key=lambda combination: len(unseen & pairs(combination))))
        unseen -= pairs(chosen[-1])
    return chosen


def pairs(combination: dict) -> set:
    return set(itertools.combinations(combination.items(), 2))


def name_of(combination: dict) -> str:
    return "-".join(str(value) if isinstance(value, str) else name if value else f"no_{name}" for name, value in combination.items())


def config(combination: dict, **fields) -> SAEConfig:
    options = {"norm_activation": "inference", **combination}
    transcoder = options.pop("transcoder", False)
    hook_point_out = "out" if transcoder else "in"
    options["use_skip_connection"] = transcoder == "skip"
    return SAEConfig(
        **{"d_model": D, "expansion_factor": F / D, "top_k": K, "dtype": "float64", "jumprelu_threshold_window": 0.5, **options, **fields},
        hook_point_in="in",
        hook_point_out=hook_point_out,
    )


def build(combination: dict, seed: int = 0, **fields) -> SparseAutoEncoder:
    """A dictionary in which no parameter is special: biases, norms and thresholds all differ. Statistics are set."""
    cfg = config(combination, **fields)
    dictionary = SparseDictionary.from_config(cfg)
    assert isinstance(dictionary, SparseAutoEncoder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        dictionary.W_D *= 0.5 + 1.5 * torch.rand(cfg.d_sae, 1, generator=generator, dtype=torch.float64)
        if cfg.act_fn == "jumprelu":
            dictionary.activation_function.log_jumprelu_threshold -= 1.3
        if cfg.act_fn == "batchtopk":
            dictionary.activation_function.threshold.fill_(0.37)
        if dictionary.running_activation_norms is not None:
            dictionary.running_activation_norms.copy_(torch.tensor([NORMS[hook] for hook in cfg.associated_hook_points], dtype=torch.float64))
    if cfg.norm_activation == "dataset-wise":
        dictionary.set_dataset_average_activation_norm({hook: NORMS[hook] for hook in cfg.associated_hook_points})
    return dictionary


def batch(seed: int = 0, n: int = 9, dtype: torch.dtype = torch.float64) -> dict:
    """Raw activations at both hook points, of different size, some outside the mask."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = 1.4 * torch.randn(n, D, generator=generator, dtype=torch.float64) + 0.3
    y = 0.4 * torch.randn(n, D, generator=generator, dtype=torch.float64) - 0.1
    mask = torch.ones(n, dtype=torch.bool)
    mask[2] = mask[5] = False
    return {"in": x.to(dtype), "out": y.to(dtype), "mask": mask, "tokens": torch.arange(n)}
