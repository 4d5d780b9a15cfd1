"""Activations with a known sparse structure, as a stream that remembers its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lm_saes.config import SAEConfig
from lm_saes.models.sparse_dictionary import SparseDictionary

HOOK = "blocks.0.hook_resid_post"


class SyntheticStream:
    """Batches of sparse combinations of F unit vectors plus a little noise; batch i depends on (seed, i) only."""

    def __init__(
        self, batch_size: int = 64, d_model: int = 16, n_features: int = 32, active: float = 4.0, seed: int = 0, n_batches: int | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(1234)
        self.features = torch.nn.functional.normalize(torch.randn(n_features, d_model, generator=generator), dim=-1)
        self.batch_size, self.probability, self.seed, self.n_batches = batch_size, active / n_features, seed, n_batches
        self.position = 0

    def activations(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        shape = (self.batch_size, len(self.features))
        amounts = torch.rand(shape, generator=generator) + 0.5
        codes = amounts * (torch.rand(shape, generator=generator) < self.probability)
        return codes @ self.features + 0.01 * torch.randn(self.batch_size, self.features.shape[1], generator=generator)

    def __iter__(self) -> SyntheticStream:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.n_batches is not None and self.position >= self.n_batches:
            raise StopIteration
        x = self.activations(self.position)
        self.position += 1
        return {HOOK: x, "tokens": torch.arange(len(x)), "mask": torch.ones(len(x), dtype=torch.bool)}

    def mean_norm(self) -> float:
        return float(self.activations(10**6).norm(dim=-1).mean())

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "nested": {"marker": torch.tensor([self.position])}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state["nested"]["marker"].tolist() == [state["position"]]
        self.position = state["position"]


def make_dictionary(act_fn: str = "topk", seed: int = 0, **options: Any) -> SparseDictionary:
    """A small dictionary with the mean norm of the stream above, tied at the start as the Initializer would."""
    torch.manual_seed(seed)
    settings = {"d_model": 16, "expansion_factor": 4, "top_k": 4, **options}
    sae = SparseDictionary.from_config(SAEConfig(hook_point_in=HOOK, act_fn=act_fn, **settings))  # pyright: ignore[reportArgumentType]
    if sae.cfg.norm_activation == "dataset-wise":
        sae.set_dataset_average_activation_norm({HOOK: SyntheticStream(d_model=sae.cfg.d_model).mean_norm()})
    return sae
