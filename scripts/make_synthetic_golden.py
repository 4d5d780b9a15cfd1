"""Golden figures of the synthetic benchmark, made by sae-lens' module for the same purpose.

Run in an environment of its own that has sae-lens, with this library's sources on the path (they need torch, pydantic and jaxtyping):

    python -m venv golden && golden/bin/pip install torch sae-lens==6.54.12
    PYTHONPATH=src golden/bin/python scripts/make_synthetic_golden.py tests/evaluation/synthetic_golden.safetensors

The file holds (1) a small dictionary, samples and the metrics that sae-lens gives for them; (2) what sae-lens makes of the parts of a
small synthetic model of ours: firing probabilities, directions pushed apart; (3) how often each feature, and each child together with
its parent, fires among the samples that sae-lens draws from the same model, and with what mean magnitude.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import sae_lens
import torch
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary
from sae_lens.synthetic.correlation import LowRankCorrelationMatrix
from sae_lens.synthetic.evals import eval_sae_on_synthetic_data
from sae_lens.synthetic.feature_dictionary import orthogonalize_embeddings
from sae_lens.synthetic.firing_probabilities import zipfian_firing_probabilities
from sae_lens.synthetic.hierarchy import HierarchyConfig, generate_hierarchy
from safetensors.torch import save_file

from lm_saes.config.synthetic import SyntheticModelConfig
from lm_saes.evaluation.synthetic.generator import SyntheticModel

# The same numbers stand in tests/evaluation/test_synthetic_golden.py.
MODEL = {"n_features": 64, "d_model": 24, "n_roots": 4, "branching_factor": 3, "depth": 2, "correlation_rank": 5, "correlation_scale": 0.3,
         "min_firing_probability": 0.02, "orthogonalization_steps": 0, "seed": 7}  # fmt: skip
SAMPLES, DRAWN = 256, 2_000_000


class Given:
    """A generator that hands out the same samples."""

    def __init__(self, samples: torch.Tensor) -> None:
        self.samples = samples

    def sample(self, n: int) -> torch.Tensor:
        return self.samples[:n]


def dictionary_and_metrics() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Twelve latents over 20 features in 10 dimensions: some near a feature, two on the same one, one dead, one with a zero decoder row."""
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(20, 10), dim=1)
    features = torch.where(torch.rand(SAMPLES, 20) < 0.15, 1 + torch.rand(SAMPLES, 20), 0.0)
    decoder = directions[[0, 1, 2, 3, 4, 5, 6, 7, 7, 9, 10, 11]] + 0.2 * torch.randn(12, 10)
    decoder[11] = 0
    encoder, bias = decoder.T.contiguous(), torch.full((12,), -0.3)
    bias[5] = -100.0
    decoder_bias = 0.1 * torch.randn(10)

    cfg = StandardSAEConfig(d_in=10, d_sae=12, apply_b_dec_to_input=False, normalize_activations="none")
    sae = StandardSAE(cfg)
    for name, value in {"W_enc": encoder, "W_dec": decoder, "b_enc": bias, "b_dec": decoder_bias}.items():
        getattr(sae, name).data = value
    truth = FeatureDictionary(20, 10, bias=0.5, initializer=None, seed=0)
    truth.feature_vectors.data = directions
    result = eval_sae_on_synthetic_data(sae, truth, Given(features), num_samples=SAMPLES, batch_size=100_000)  # pyright: ignore[reportArgumentType]
    tensors = {
        "directions": directions,
        "features": features,
        "bias": truth.bias.data,
        "W_E": encoder,
        "W_D": decoder,
        "b_E": bias,
        "b_D": decoder_bias,
    }
    return tensors, {name: float(value) for name, value in result.to_log_dict().items()}


def law() -> dict[str, torch.Tensor]:
    """What sae-lens makes of the parts of our model, and the figures of what it samples from them."""
    cfg = SyntheticModelConfig(**MODEL)
    model = SyntheticModel(cfg)
    torch.manual_seed(0)
    start = torch.randn(cfg.n_features, cfg.d_model)
    zipf = zipfian_firing_probabilities(cfg.n_features, cfg.zipf_exponent, cfg.max_firing_probability, cfg.min_firing_probability)
    hierarchy = generate_hierarchy(
        cfg.n_features,
        HierarchyConfig(cfg.n_roots, cfg.branching_factor, cfg.depth, mutually_exclusive_portion=1.0, scale_children_by_parent=True),
        seed=0,
    )
    probabilities = (zipf * hierarchy.compute_probability_correction_factors(zipf)).clamp(max=1)
    factor = model.correlation_factor
    generator = ActivationGenerator(
        cfg.n_features,
        probabilities,
        model.magnitude_spreads,
        model.mean_magnitudes,
        modify_activations=hierarchy.modifier,
        correlation_matrix=LowRankCorrelationMatrix(factor, 1 - factor.square().sum(1)),
    )
    together, sums, squares = torch.zeros(cfg.n_features, cfg.n_features), torch.zeros(cfg.n_features), torch.zeros(())
    for _ in range(DRAWN // 20_000):
        sample = generator.sample(20_000)
        fires = (sample > 0).float()
        together += fires.T @ fires
        sums += sample.sum(0)
        squares += fires.sum(1).square().sum()
    return {
        "start": start,
        "spread_out": orthogonalize_embeddings(start, num_steps=50, lr=0.01),
        "zipf": zipf,
        "probabilities": probabilities,
        "firing_counts": together.diagonal().clone(),
        "with_parent": together[torch.arange(cfg.n_features), model.parents.clamp(min=0)].clone(),
        "mean_amounts": sums / DRAWN,
        "mean_squared_l0": squares / DRAWN,
    }


def main() -> None:
    tensors, metrics = dictionary_and_metrics()
    figures = {"drawn": DRAWN, "sae_lens": sae_lens.__version__, "torch": torch.__version__}
    metadata = {"metrics": json.dumps(metrics), "figures": json.dumps(figures)}
    save_file({**tensors, **{f"law.{name}": value for name, value in law().items()}}, sys.argv[1], metadata)
    print(f"{sys.argv[1]}: {Path(sys.argv[1]).stat().st_size:,} bytes, {metrics}")


if __name__ == "__main__":
    main()
