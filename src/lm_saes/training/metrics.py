"""What is measured during training, and how often each latent fires.

Everything stays on the device until the log interval; then one transfer brings the numbers to the host. With e = x^ - y the error of
a token, y its label in the dictionary's own (normalised) space, and y_mean the batch's mean label over the tokens in the mask:

    explained_variance          1 - sum_n |e_n|^2 / sum_n |y_n - y_mean|^2
    explained_variance_legacy   mean_n (1 - |e_n|^2 / |y_n - y_mean|^2): every token counts the same, so that tokens near the mean,
                                whose ratio is unbounded, can dominate it; kept for comparison with older runs
    l0                          mean number of positive codes per token
    l2_norm_error (_ratio)      mean |e_n|  (over mean |y_n|)
    mean_feature_act            mean of the positive codes
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lm_saes.models.sparse_dictionary import Forward
from lm_saes.ops import Codes, at_least_float32, map_codes, row_sums

_DENSE = {"above_1e-1": 1e-1, "above_1e-2": 1e-2}
_RARE = {"below_1e-5": 1e-5, "below_1e-6": 1e-6, "below_1e-7": 1e-7}


def reconstruction_metrics(reconstruction: Float[Tensor, "N D"], target: Float[Tensor, "N D"], mask: Bool[Tensor, " N"]) -> dict[str, Tensor]:
    """The metrics of the reconstruction defined at the top of this file, as 0-dim tensors, over the tokens in `mask`."""
    target, reconstruction = at_least_float32(target), at_least_float32(reconstruction)
    error, weights = reconstruction - target, mask.to(target.dtype)
    tokens = weights.sum().clamp(min=1)
    mean = (weights @ target) / tokens
    variance = (target - mean).square().sum(-1)
    squared_error = error.square().sum(-1)
    norm_error, norm = weights @ squared_error.sqrt() / tokens, weights @ torch.linalg.vector_norm(target, dim=-1) / tokens
    return {
        "metrics/explained_variance": 1 - (weights @ squared_error) / (weights @ variance),
        "metrics/explained_variance_legacy": weights @ (1 - squared_error / variance.clamp(min=torch.finfo(variance.dtype).tiny)) / tokens,
        "metrics/l2_norm_error": norm_error,
        "metrics/l2_norm_error_ratio": norm_error / norm,
    }


def sum_of_codes(codes: Codes, mask: Bool[Tensor, " N"]) -> Float[Tensor, ""]:
    """The sum of all codes of the tokens in `mask`; none is negative."""
    return row_sums(map_codes(codes, Tensor.float)) @ mask.float()


class FiringDensity:
    """On which share of the tokens each latent fires, counted over windows of `window` steps.

    The density of the last full window is reported; before the first one is full, that of the steps so far.
    """

    def __init__(self, n_latents: int, window: int, device: torch.device | str) -> None:
        self.window = window
        self._steps = 0
        self._counts: Int[Tensor, " F"] = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self._tokens: Int[Tensor, ""] = torch.zeros((), dtype=torch.int64, device=device)
        self._full_counts, self._full_tokens = self._counts.clone(), self._tokens.clone()

    def update(self, counts: Int[Tensor, " F"], tokens: Int[Tensor, ""]) -> None:
        """Take note of one step."""
        self._counts.add_(counts)
        self._tokens.add_(tokens)
        self._steps += 1
        if self._steps % self.window == 0:
            self._full_counts.copy_(self._counts)
            self._full_tokens.copy_(self._tokens)
            self._counts.zero_()
            self._tokens.zero_()

    def density(self) -> Float[Tensor, " F"]:
        """Share of the tokens on which each latent fired."""
        full = self._steps >= self.window
        counts, tokens = (self._full_counts, self._full_tokens) if full else (self._counts, self._tokens)
        return counts / tokens.clamp(min=1)

    def metrics(self) -> dict[str, Tensor]:
        """How many latents fire on more than 1e-1 and 1e-2, and on less than 1e-5, 1e-6 and 1e-7 of the tokens."""
        density = self.density()
        dense = {f"sparsity/{name}": (density > limit).sum() for name, limit in _DENSE.items()}
        return dense | {f"sparsity/{name}": (density < limit).sum() for name, limit in _RARE.items()}

    def state_dict(self) -> dict[str, Tensor]:
        steps = torch.tensor(self._steps)
        return {"steps": steps, "counts": self._counts, "tokens": self._tokens, "full_counts": self._full_counts, "full_tokens": self._full_tokens}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._steps = int(state["steps"])
        for own, name in ((self._counts, "counts"), (self._tokens, "tokens"), (self._full_counts, "full_counts"), (self._full_tokens, "full_tokens")):
            own.copy_(state[name])


class BatchResult:
    """What forward and backward of a batch leave behind, summed over its micro-batches."""

    def __init__(self, x: Float[Tensor, "N D_in"], target: Float[Tensor, "N D"], mask: Bool[Tensor, " N"], tokens: Int[Tensor, ""]) -> None:
        self.x, self.target, self.mask, self.tokens = x, target, mask, tokens
        self.forward: Forward
        """That of the last micro-batch."""
        self.loss = self.sum_of_codes = torch.zeros((), device=target.device)
        self.counts = torch.zeros((), dtype=torch.int64, device=target.device)
        self.terms: dict[str, Tensor] = {}
        self._reconstructions: list[Tensor] = []

    def add(self, forward: Forward, loss: Tensor, terms: dict[str, Tensor], share: Tensor | float, counts: Int[Tensor, " F"]) -> None:
        """Take in a micro-batch that holds `share` of the tokens."""
        self.forward = forward
        self.loss = self.loss + loss.detach() * share
        self.terms = {name: self.terms.get(name, 0) + term.detach() * share for name, term in terms.items()}
        self.counts = self.counts + counts

    def add_measured(self, reconstruction: Float[Tensor, "n D"], sum_of_codes: Float[Tensor, ""]) -> None:
        """Take in what only the metrics need."""
        self._reconstructions.append(reconstruction)
        self.sum_of_codes = self.sum_of_codes + sum_of_codes

    @property
    def l0(self) -> Float[Tensor, ""]:
        """Mean number of positive codes per token."""
        return self.counts.sum() / self.tokens.clamp(min=1)

    def losses(self) -> dict[str, Tensor]:
        """The loss and its weighted terms."""
        return {"losses/overall_loss": self.loss} | {f"losses/{name}": term for name, term in self.terms.items()}

    def metrics(self) -> dict[str, Tensor]:
        """Reconstruction and codes, as 0-dim tensors."""
        return {
            **reconstruction_metrics(torch.cat(self._reconstructions), self.target, self.mask),
            "metrics/l0": self.l0,
            "metrics/mean_feature_act": self.sum_of_codes / self.counts.sum().clamp(min=1),
        }


def to_host(metrics: dict[str, Tensor]) -> dict[str, float]:
    """All numbers, in one transfer from the device."""
    if not metrics:
        return {}
    device = next((value.device for value in metrics.values() if value.device.type != "cpu"), torch.device("cpu"))
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.stack([value.detach().to(device, dtype) for value in metrics.values()]).tolist()
    return dict(zip(metrics, numbers, strict=True))
