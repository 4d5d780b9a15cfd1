"""Closed-loop control of the sparsity coefficient towards a chosen L0."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class TargetL0:
    """Multiplies the sparsity coefficient so that the mean L0 arrives at `target`.

    L0 falls as the coefficient rises, roughly as a power of it, and follows it only after some hundred steps of training. So the
    control works on logarithms, looks at where L0 is going as well as where it is, and takes its time: over the first half of the
    steps under control, L0 is led from where it was to the target along a straight line in log(L0). (Forcing a dictionary that has
    not learned yet to a small L0 kills latents that it needs later.) With z the smoothed log(L0), y its line, z' and y' their
    changes per step, r the rate and g the learning rate's share of its peak:

        log c  <-  log c + sqrt(g) * clamp(1.5 r (z - y) + (z' - y'), -3 r, 3 r)

    The rate suits the length of the run: r = 16 / (steps under control), within [0.002, 0.01]; z is smoothed with weight 5 r.
    Control starts after the warm-ups, and first spares itself the way from a coefficient that is too small to matter.

    L0 is what evaluation counts: positive codes per token in the mask. All state lives on the device; nothing is read by the host.
    JumpReLU needs the pre-activation loss (`lp_coefficient`) beside it if latents die: no coefficient revives them.
    """

    start_share = 0.03
    """Share of the labels' variance that the weighted penalty amounts to at least when the control starts."""

    def __init__(self, target: float, steps: int, device: torch.device | str) -> None:
        self.rate = min(max(16 / max(steps, 1), 0.002), 0.01)
        self._approach = max(steps / 2, 1.0)
        self._log_target = torch.tensor(target, dtype=torch.float32, device=device).log()
        self.log_gain: Float[Tensor, ""] = torch.zeros((), device=device)
        """log c: the logarithm of the factor on the scheduled coefficient."""
        self._level = torch.full((), float("nan"), device=device)
        self._slope, self._origin = torch.zeros((), device=device), torch.zeros((), device=device)
        self.started = False

    def coefficient(self, scheduled: float) -> Float[Tensor, ""]:
        """The coefficient of this step: the scheduled one times c."""
        return scheduled * self.log_gain.exp()

    def observe(self, l0: Float[Tensor, ""]) -> None:
        """Take note of a step's mean L0; below 1e-2 it counts as 1e-2."""
        log_l0, first = l0.float().clamp(min=1e-2).log(), self._level.isnan()
        level = torch.where(first, log_l0, torch.lerp(self._level, log_l0, 5 * self.rate))
        self._slope.lerp_(torch.where(first, 0.0, level - self._level), 5 * self.rate)
        self._level.copy_(level)

    def start(self, penalty: Float[Tensor, ""], variance: Float[Tensor, ""]) -> None:
        """Begin: the line starts at the present L0. If that is above the target, raise c so far that the weighted penalty is at least
        `start_share` of the labels' variance."""
        self.started = True
        self._origin.copy_(self._level)
        missing = (self.start_share * variance / penalty).log()
        self.log_gain += torch.where((self._level > self._log_target) & missing.isfinite(), missing.clamp(min=0), 0.0)

    def adjust(self, elapsed: int, lr_share: float) -> None:
        """Adjust c, `elapsed` steps after the start."""
        way = self._log_target - self._origin
        line = self._origin + way * min(1.0, elapsed / self._approach)
        heading = way / self._approach if elapsed < self._approach else torch.zeros_like(way)
        change = 1.5 * self.rate * (self._level - line) + (self._slope - heading)
        self.log_gain.add_(change.clamp(-3 * self.rate, 3 * self.rate), alpha=lr_share**0.5)

    def state_dict(self) -> dict[str, Tensor]:
        moved = {"log_gain": self.log_gain, "level": self._level, "slope": self._slope, "origin": self._origin}
        return {**moved, "started": torch.tensor(self.started)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for own, name in ((self.log_gain, "log_gain"), (self._level, "level"), (self._slope, "slope"), (self._origin, "origin")):
            own.copy_(state[name])
        self.started = bool(state["started"])
