"""The arms: what each does about latents that die. Everything else, the centring above all, is the same in all of them.

Data points: each decoder row starts along the deviation of a random token from the mean (the encoder is its transpose, as in every arm).
Aligned: the encoder is reparametrised so that its product with the decoder row is 1 for each latent, here by its orthogonal projection onto that plane:
e = v + (1 - <v, d>) d / ||d||². The abstract of arXiv 2605.18629 states the constraint; this form is our reading of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lm_saes import Initializer, InitializerConfig, SAEConfig
from lm_saes.models.sae import SparseAutoEncoder

CENTRED: dict[str, Any] = {"bias_init_method": "geometric_median", "init_encoder_bias_with_mean_hidden_pre": True, "grid_search_init_norm": True}


@dataclass(frozen=True)
class Arm:
    """What differs from a tied random start trained by Adam."""

    title: str
    subspace: float | str | None = None
    """Dimension of the active subspace over D, or "auto"."""
    trainer: dict[str, Any] = field(default_factory=dict)
    data_points: bool = False
    aligned: bool = False


ARMS = {
    "random": Arm("tied random"),
    "active-.25": Arm("active subspace, .25 D", 0.25),
    "active-auto": Arm('active subspace, "auto"', "auto"),
    "active-.75": Arm("active subspace, .75 D", 0.75),
    "masked": Arm("masked Adam", trainer={"optimizer_class": "sparseadam"}),
    "active-auto-masked": Arm('"auto" and masked Adam', "auto", {"optimizer_class": "sparseadam"}),
    "active-.25-masked": Arm(".25 D and masked Adam", 0.25, {"optimizer_class": "sparseadam"}),
    "auxk": Arm("AuxK", trainer={"auxk_coefficient": 1 / 32}),
    "data-points": Arm("data points", data_points=True),
    "aligned": Arm("aligned", aligned=True),
}


def start(arm: Arm, cfg: SAEConfig, batches: list[dict[str, Tensor]], seed: int) -> tuple[SparseAutoEncoder, int | None]:
    """A dictionary that starts as the arm says, from the first batches, and the dimension of its active subspace."""
    options: dict[str, Any] = {**CENTRED, "n_batches": len(batches)}
    if arm.subspace is not None:
        d_active = arm.subspace if isinstance(arm.subspace, str) else round(arm.subspace * cfg.d_model)
        options |= {"initialize_W_D_with_active_subspace": True, "d_active_subspace": d_active}
    points = torch.cat([batch[cfg.hook_point_in] for batch in batches]) if arm.data_points else None
    initializer = Initializer(InitializerConfig(**options)) if points is None else DataPoints(InitializerConfig(**options), points)
    sae = initializer.initialize_sae_from_config(cfg, batches, seed=seed)
    if arm.aligned:
        align(sae)
    return sae, initializer.report.d_active


class DataPoints(Initializer):
    """Decoder rows along the deviations of random tokens from their mean."""

    def __init__(self, cfg: InitializerConfig, points: Tensor) -> None:
        super().__init__(cfg)
        self._points = points

    @override
    def initialize_parameters(self, sae: SparseAutoEncoder, generator: torch.Generator | None = None) -> None:
        super().initialize_parameters(sae, generator)
        if len(self._points) < sae.cfg.d_sae:
            raise ValueError(f"{sae.cfg.d_sae} latents need as many tokens to start from, got {len(self._points)}")
        chosen = torch.randperm(len(self._points), generator=generator)[: sae.cfg.d_sae]
        deviations = self._points[chosen] - self._points.mean(0)
        with torch.no_grad():
            sae.W_D.copy_(nn.functional.normalize(deviations, dim=1))  # the scale is chosen afterwards, and the encoder tied


class Aligned(nn.Module):
    """The projection of each encoder column onto the plane on which its product with the decoder row is 1."""

    def __init__(self, sae: SparseAutoEncoder) -> None:
        super().__init__()
        self._decoder = (sae,)  # in a tuple, so that it is not a submodule of its own parameter

    @override
    def forward(self, encoder: Tensor) -> Tensor:
        rows = self._decoder[0].W_D
        missing = (1 - (encoder.T * rows).sum(1)) / rows.square().sum(1)
        return encoder + (missing[:, None] * rows).T


def align(sae: SparseAutoEncoder) -> None:
    """From now on the encoder of `sae` is aligned with its decoder, whatever the optimizer does."""
    parametrize.register_parametrization(sae, "W_E", Aligned(sae), unsafe=True)
