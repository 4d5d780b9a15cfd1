"""Configuration of the synthetic model: activations made of known features (SynthSAEBench, arXiv 2602.14687)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lm_saes.config.base import BaseConfig

SyntheticPreset = Literal["mini", "16k"]


class SyntheticModelConfig(BaseConfig):
    """What the features are, how often they fire and with what. The defaults are the preset "mini"; see `preset`.

    Features are numbered from frequent to rare. The first ones stand in a forest, breadth first: the roots, then the children of the
    first root, of the second ...; the others stand alone.
    """

    n_features: int = Field(default=2048, ge=2)
    """Features N, more than there are dimensions."""
    d_model: int = Field(default=256, ge=1)
    """Width D of the activations."""
    zipf_exponent: float = Field(default=0.5, gt=0)
    """a in p_r ~ r^-a, the firing probability of the feature of rank r, rescaled to the two ends below."""
    max_firing_probability: float = Field(default=0.4, gt=0, lt=1)
    """Firing probability of the first feature."""
    min_firing_probability: float = Field(default=5e-4, gt=0, lt=1)
    """Firing probability of the last feature."""
    n_roots: int = Field(default=16, ge=0)
    """Trees of the hierarchy; 0: no hierarchy."""
    branching_factor: int = Field(default=4, ge=2)
    """Children of each parent."""
    depth: int = Field(default=3, ge=1)
    """Generations below the roots."""
    mutually_exclusive_children: bool = True
    """At most one child of a parent fires at a time: one drawn at random of those that would."""
    scale_children_by_parent: bool = True
    """A child's magnitude is multiplied by that of its parent over the parent's mean; without it the parent only lets it fire."""
    compensate_probabilities: bool = True
    """Raise the probabilities before the hierarchy is applied, so that what is left of them is near what they were."""
    correlation_rank: int = Field(default=25, ge=0)
    """Rank of the correlations between the latent Gaussians that decide what fires; 0: independent."""
    correlation_scale: float = Field(default=0.1, ge=0)
    """Standard deviation of the entries of the correlations' factor."""
    orthogonalization_steps: int = Field(default=100, ge=0)
    """Steps of Adam that push the feature directions apart."""
    orthogonalization_lr: float = Field(default=3e-4, gt=0)
    """Their learning rate."""
    first_mean_magnitude: float = Field(default=5.0, gt=0)
    """Mean magnitude of the first feature ..."""
    last_mean_magnitude: float = Field(default=4.0, gt=0)
    """... and of the last one; linear between them."""
    magnitude_spread_mean: float = Field(default=0.5, ge=0)
    """Each feature has its own standard deviation of the magnitude, |s| with s normal: the mean of s ..."""
    magnitude_spread_std: float = Field(default=0.5, ge=0)
    """... and the standard deviation of s."""
    bias_norm: float = Field(default=0.5, ge=0)
    """Norm of the vector that is added to all activations."""
    seed: int = Field(default=42, ge=0)
    """Of the directions, the correlations, the spreads and the bias. What is sampled from them has seeds of its own."""

    @classmethod
    def preset(cls, name: SyntheticPreset, **changes: Any) -> Self:
        """ "16k" is the model of the paper (16,384 features in 768 dimensions); "mini" has an eighth of its features in a third of its dimensions."""
        sizes = {"mini": {}, "16k": {"n_features": 16_384, "d_model": 768, "n_roots": 128}}
        return cls(**{**sizes[name], **changes})

    @property
    def n_hierarchical(self) -> int:
        """Features that stand in the forest."""
        return self.n_roots * sum(self.branching_factor**level for level in range(self.depth + 1))

    @model_validator(mode="after")
    def _joints(self) -> Self:
        if self.min_firing_probability >= self.max_firing_probability:
            raise ValueError(
                f"min_firing_probability must be below max_firing_probability = {self.max_firing_probability:g}, got {self.min_firing_probability:g}"
            )
        if self.n_hierarchical > self.n_features:
            raise ValueError(
                f"{self.n_roots} trees of depth {self.depth} with {self.branching_factor} children each hold {self.n_hierarchical} features, "
                f"n_features is {self.n_features}; lower n_roots or depth, or raise n_features"
            )
        return self


class SyntheticBenchmarkConfig(BaseConfig):
    """What dictionaries are trained and scored on. The defaults are the preset "mini"; see `preset`."""

    model: SyntheticModelConfig = SyntheticModelConfig()
    """Where activations come from."""
    d_sae: int = Field(default=512, ge=2)
    """Latents of each dictionary: fewer than there are features."""
    l0: int = Field(default=8, ge=1)
    """L0 of each dictionary: k, or what the sparsity coefficient is steered to."""
    batch_size: int = Field(default=1024, ge=1)
    """Samples per step."""
    n_training_samples: int = Field(default=4_096_000, ge=1)
    """Samples that each dictionary is trained on."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of the dictionaries."""
    n_probe_samples: int = Field(default=2_048_000, ge=1)
    """Samples that the probe is trained on."""
    n_evaluation_samples: int = Field(default=204_800, ge=1)
    """Samples that dictionaries and probe are scored on."""
    device: str = "auto"
    """Where samples are drawn and dictionaries trained: auto, cpu, cuda, mps."""

    @classmethod
    def preset(cls, name: SyntheticPreset, **changes: Any) -> Self:
        """ "16k" is the protocol of the paper at L0 25; "mini" an eighth of its width and fewer samples."""
        paper = {
            "model": SyntheticModelConfig.preset("16k"), "d_sae": 4096, "l0": 25, "n_training_samples": 200_000_000, "lr": 3e-4,
            "n_probe_samples": 20_000_000, "n_evaluation_samples": 500_000,
        }  # fmt: skip
        return cls(**{**({} if name == "mini" else paper), **changes})

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.d_sae > self.model.n_features:
            raise ValueError(f"d_sae must be at most n_features = {self.model.n_features}, got {self.d_sae}")
        if self.l0 >= self.d_sae:
            raise ValueError(f"l0 must be below d_sae = {self.d_sae}, got {self.l0}")
        return self
