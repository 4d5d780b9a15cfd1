"""Principal components as a baseline: what the best dense code of the same size reaches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lm_saes.errors import ConfigError, DataError
from lm_saes.models.statistics import RunningCovariance, kept_rows


@dataclass(frozen=True)
class PCAConfig:
    """Where the baseline reads, which is also where it writes, and how many components it keeps."""

    hook_point: str
    rank: int

    @property
    def hooks_in(self) -> list[str]:
        return [self.hook_point]

    @property
    def hooks_out(self) -> list[str]:
        return [self.hook_point]


class PCABaseline(nn.Module):
    """The best reconstruction of rank `rank` plus a mean, in squared error, fitted on activations in float64.

    It looks at the label itself. Beside an SAE that is the same view; beside a transcoder, which must predict the label from another hook
    point, it is an upper bound on what a linear code of that rank could do.

    Args:
        rank: components; every token uses all of them, so its L0 is `rank`.
        hook_point: the output hook of the dictionary it stands beside.
    """

    mean: Float[Tensor, " D"]
    components: Float[Tensor, "rank D"]

    def __init__(self, rank: int, hook_point: str) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"the rank of a PCA baseline must be at least 1, got {rank}")
        self.cfg = PCAConfig(hook_point, rank)
        self.register_buffer("mean", torch.zeros(0))
        self.register_buffer("components", torch.zeros(rank, 0))

    def fit(self, batches: Iterable[dict[str, Any]], n_tokens: int | None = None) -> Self:
        """Fit mean and components on the kept positions of `batches`, 1D or 2D; of all, or until `n_tokens` were seen.

        Raises:
            ConfigError: the rank exceeds the width of the activations.
            DataError: no position was kept.
        """
        moments = RunningCovariance()
        label: Tensor | None = None
        for batch in batches:
            label = kept_rows(batch, self.cfg.hook_point)
            moments.update(label)
            if n_tokens is not None and moments.count >= n_tokens:
                break
        if label is None or moments.count == 0:
            raise DataError(
                f"a PCA baseline needs activations of {self.cfg.hook_point} to be fitted on, and the stream kept none; check the text and its filters"
            )
        if self.cfg.rank > label.shape[1]:
            raise ConfigError(f"the rank of a PCA baseline must be at most the width {label.shape[1]} of {self.cfg.hook_point}, got {self.cfg.rank}")
        _, directions = moments.principal_directions()
        self.mean = moments.mean.to(device=label.device, dtype=torch.float32)
        self.components = directions[:, : self.cfg.rank].T.to(device=label.device, dtype=torch.float32).contiguous()
        return self

    def features_and_reconstruction(self, batch: dict[str, Any]) -> tuple[Float[Tensor, "N rank"], Float[Tensor, "N D"]]:
        """Coordinates along the components, and what they reconstruct, of `{hook_point: [N, D]}`."""
        codes = (batch[self.cfg.hook_point].float() - self.mean) @ self.components.T
        return codes, codes @ self.components + self.mean
