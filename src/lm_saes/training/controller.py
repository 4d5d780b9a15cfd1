"""Closed-loop control of the sparsity coefficient towards a chosen L0."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class TargetL0:
    """Multiplies the sparsity coefficient so that the mean L0 approaches `target`.

    L0 falls as the coefficient rises, roughly as a power of it, and follows it only after some hundred steps of training. So the
    control works on logarithms, and looks at where L0 is going as well as where it is. With z the exponentially smoothed log(L0),
    z' its smoothed change per step, r the rate and g in [0, 1] the step's gain (0 during warm-ups, the learning rate's share of its
    peak after them):

        log c  <-  log c + g * r * clamp(z + z' / r - log(target), -3, 3)

    The rate suits the length of the run: r = 16 / (steps under control), within [0.002, 0.02]; z is smoothed with weight 5 r.
    `start` spares the control the way from a coefficient that is too small to matter. L0 is what evaluation counts: positive codes
    per token in the mask. All state lives on the device; nothing is read by the host.
    """

    start_share = 0.1
    """Share of the labels' variance that the penalty amounts to at least when the control starts."""

    def __init__(self, target: float, steps: int, device: torch.device | str) -> None:
        self.rate = min(max(16 / max(steps, 1), 0.002), 0.02)
        self._log_target = torch.tensor(target, dtype=torch.float32, device=device).log()
        self.log_gain: Float[Tensor, ""] = torch.zeros((), device=device)
        """log c: the logarithm of the factor on the scheduled coefficient."""
        self._level = torch.full((), float("nan"), device=device)
        self._slope = torch.zeros((), device=device)

    def coefficient(self, scheduled: float) -> Float[Tensor, ""]:
        """The coefficient of this step: the scheduled one times c."""
        return scheduled * self.log_gain.exp()

    def start(self, penalty: Float[Tensor, ""], variance: Float[Tensor, ""]) -> None:
        """Raise c so far that the weighted penalty is `start_share` of the labels' variance, unless it is more already or L0 is below
        the target without it."""
        missing = (self.start_share * variance / penalty).log()
        self.log_gain += torch.where((self._level > self._log_target) & missing.isfinite(), missing.clamp(min=0), 0.0)

    def update(self, l0: Float[Tensor, ""], gain: float) -> None:
        """Take note of a step's mean L0 and adjust c. An L0 below 1e-2 counts as 1e-2."""
        log_l0, first = l0.float().clamp(min=1e-2).log(), self._level.isnan()
        level = torch.where(first, log_l0, torch.lerp(self._level, log_l0, 5 * self.rate))
        self._slope.lerp_(torch.where(first, 0.0, level - self._level), 5 * self.rate)
        self._level.copy_(level)
        if gain > 0:
            error = self._level + self._slope / self.rate - self._log_target
            self.log_gain.add_(error.clamp(-3, 3), alpha=gain * self.rate)

    def state_dict(self) -> dict[str, Tensor]:
        return {"log_gain": self.log_gain, "level": self._level, "slope": self._slope}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for own, name in ((self.log_gain, "log_gain"), (self._level, "level"), (self._slope, "slope")):
            own.copy_(state[name])
