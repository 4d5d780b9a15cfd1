"""Closed-loop control of the sparsity coefficient towards a chosen L0."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class TargetL0:
    """Multiplies the sparsity coefficient so that the mean L0 approaches `target`.

    L0 falls as the coefficient rises, roughly as a power of it, and follows it only after some hundred steps of training. So the
    control works on logarithms, and looks at where L0 is going as well as where it is. With z the exponentially smoothed log(L0),
    z' its change per step, and g in [0, 1] the step's gain (0 during warm-ups, the learning rate's share of its peak after them):

        log c  <-  log c + g * clamp(rate * (z + horizon * z' - log(target)), -limit, limit)

    L0 is what evaluation counts: positive codes per token in the mask. All state lives on the device; nothing is read by the host.
    """

    rate = 0.01
    """Change of log c per step and unit of log L0."""
    horizon = 100.0
    """Steps that L0 is extrapolated by."""
    limit = 0.03
    """Largest change of log c per step."""
    smoothing = 0.05
    """Weight of the newest step in z."""

    def __init__(self, target: float, device: torch.device | str) -> None:
        self._log_target = torch.tensor(target, dtype=torch.float32, device=device).log()
        self.log_gain: Float[Tensor, ""] = torch.zeros((), device=device)
        """log c: the logarithm of the factor on the scheduled coefficient."""
        self._level = torch.full((), float("nan"), device=device)
        self._slope = torch.zeros((), device=device)

    def coefficient(self, scheduled: float) -> Float[Tensor, ""]:
        """The coefficient of this step: the scheduled one times c."""
        return scheduled * self.log_gain.exp()

    def update(self, l0: Float[Tensor, ""], gain: float) -> None:
        """Take note of a step's mean L0 and adjust c. An L0 below 1e-2 counts as 1e-2."""
        log_l0 = l0.float().clamp(min=1e-2).log()
        level = torch.where(self._level.isnan(), log_l0, torch.lerp(self._level, log_l0, self.smoothing))
        change = torch.where(self._level.isnan(), torch.zeros_like(level), level - self._level)
        self._slope.lerp_(change, self.smoothing)
        self._level.copy_(level)
        if gain > 0:
            step = self.rate * (self._level + self.horizon * self._slope - self._log_target)
            self.log_gain.add_(step.clamp(-self.limit, self.limit), alpha=gain)

    def state_dict(self) -> dict[str, Tensor]:
        return {"log_gain": self.log_gain, "level": self._level, "slope": self._slope}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for own, name in ((self.log_gain, "log_gain"), (self._level, "level"), (self._slope, "slope")):
            own.copy_(state[name])
