"""Stopping at the first NaN or infinity, before it reaches the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from lm_saes.errors import NonFiniteError
from lm_saes.training.checkpoint import disk_errors


class _Vitals(NamedTuple):
    step: int
    batch: dict[str, Any]
    names: Sequence[str]
    values: Tensor
    copied: torch.cuda.Event | None


class NonFiniteWatch:
    """Looks at a few numbers of each step: the loss, its terms, the norm of each gradient.

    On the CPU at once; on CUDA when the next step asks, so that the host never waits for the step it has just launched. (The
    optimizer is told on the device, see `TrainingStep`, and does not move the weights.)
    """

    def __init__(self, run_folder: str | Path) -> None:
        self._folder = Path(run_folder)
        self._pending: _Vitals | None = None

    def check(self, step: int, batch: dict[str, Any], names: Sequence[str], values: Float[Tensor, " n"]) -> None:
        """Look at the numbers of `step` (counted from 1), or put them down to be looked at.

        Raises:
            NonFiniteError: one of them is not finite. The batch was saved to `nonfinite_step_<n>.safetensors`.
        """
        if values.device.type != "cuda":
            self._look(_Vitals(step, batch, names, values, None))
            return
        self.settle()
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = _Vitals(step, batch, names, on_host, copied)

    def settle(self) -> None:
        """Look at what was put down. To be called before anything is kept: a checkpoint, an evaluation, the end.

        Raises:
            NonFiniteError: as `check`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            if pending.copied is not None:
                pending.copied.synchronize()
            self._look(pending)

    def _look(self, vitals: _Vitals) -> None:
        finite = torch.isfinite(vitals.values)
        if finite.all():
            return
        activations = [key for key, value in vitals.batch.items() if _is_float(value) and not torch.isfinite(value).all()]
        culprits = [f"the activations at {hook}" for hook in activations]
        culprits += [name for name, is_finite in zip(vitals.names, finite.tolist(), strict=True) if not is_finite]
        path = self._folder / f"nonfinite_step_{vitals.step}.safetensors"
        with disk_errors(str(path)):
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({key: value.detach().cpu().contiguous() for key, value in vitals.batch.items() if isinstance(value, Tensor)}, path)
        fix = (
            "remove them from the stream, or run the language model in float32 or bfloat16"
            if activations
            else "lower lr, set clip_grad_norm = 1, or compute in float32 (amp_dtype = none)"
        )
        raise NonFiniteError(
            f"step {vitals.step}: NaN or infinity in {culprits[0]}; the weights are those before this step, the batch is in {path}; {fix}"
        )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
