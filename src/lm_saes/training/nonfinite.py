"""NaN and infinity, seen before they reach the weights: the run stops, or passes over the batch and says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from lm_saes.errors import NonFiniteError
from lm_saes.models.statistics import kept_rows
from lm_saes.tensor_files import separate
from lm_saes.training.run_folder import disk_errors

MOST_KEPT = 8
"""Batches that are saved in a run's folder."""
MOST_IN_A_ROW = 20
"""Batches that may be passed over one after the other. More than that, and it is not the data."""

Mode = Literal["stop", "skip"]
Say = Callable[[str], None]


class _Vitals(NamedTuple):
    step: int
    batch: dict[str, Any]
    names: Sequence[str]
    values: Tensor
    copied: torch.cuda.Event | None


class NonFiniteWatch:
    """Looks at a few numbers of each step: the loss, its terms, the norm of each gradient.

    At once on the CPU, and wherever a step may be passed over ("skip"). Else on CUDA when the next step asks, so that the host never waits
    for the step it has just launched. (The optimizer is told on the device, see `TrainingStep`, and does not move the weights.)
    """

    def __init__(self, run_folder: str | Path, mode: Mode = "stop", say: Say | None = None) -> None:
        self._folder, self._mode, self._say = Path(run_folder), mode, say or (lambda _: None)
        self._pending: _Vitals | None = None
        self._in_a_row = 0
        self.skipped = 0
        """Batches that were passed over."""

    def check(self, step: int, batch: dict[str, Any], names: Sequence[str], values: Float[Tensor, " n"]) -> bool:
        """Look at the numbers of `step` (counted from 1), or put them down to be looked at. Whether the step may be taken.

        Raises:
            NonFiniteError: one of them is not finite, and the run is to stop; or too many batches in a row were passed over. The batch was
                saved to `nonfinite_step_<n>.safetensors`.
        """
        if self._mode == "skip" or values.device.type != "cuda":
            return self._look(_Vitals(step, batch, names, values, None))
        self.settle()
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = _Vitals(step, batch, names, on_host, copied)
        return True

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

    def _look(self, vitals: _Vitals) -> bool:
        finite = torch.isfinite(vitals.values)
        if finite.all():
            self._in_a_row = 0
            return True
        activations = [key for key, value in vitals.batch.items() if _is_float(value) and not torch.isfinite(value).all()]
        culprits = [f"the activations at {hook}" for hook in activations]
        culprits += [name for name, is_finite in zip(vitals.names, finite.tolist(), strict=True) if not is_finite]
        where = self._save(vitals)
        what = f"step {vitals.step}: NaN or infinity in {culprits[0]}"
        if self._mode == "skip":
            self._skip(what, where)
            return False
        fix = (
            'remove them from the stream, run the language model in float32 or bfloat16, or set non_finite = "skip"'
            if activations
            else "lower lr, set clip_grad_norm = 1, or compute in float32 (amp_dtype = none)"
        )
        raise NonFiniteError(f"{what}; the weights are those before this step, the batch is {where}; {fix}")

    def _skip(self, what: str, where: str) -> None:
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        if self._in_a_row > MOST_IN_A_ROW:
            raise NonFiniteError(
                f"{what}, as in the {MOST_IN_A_ROW} batches before it, which were skipped; the weights are those before them, the batch is {where}; "
                "lower lr, set clip_grad_norm = 1, or run the language model in float32 or bfloat16"
            )
        if _worth_saying(self.skipped):
            self._say(f"{what}; the batch is skipped, {self.skipped} so far, and {where}")

    def _save(self, vitals: _Vitals) -> str:
        """Save the batch, if it is among the first, and say where it is."""
        path = self._folder / f"nonfinite_step_{vitals.step}.safetensors"
        if not path.exists() and len(list(self._folder.glob("nonfinite_step_*.safetensors"))) >= MOST_KEPT:
            return f"not saved ({MOST_KEPT} others are)"
        with disk_errors(str(path), path):
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(separate({key: value for key, value in vitals.batch.items() if isinstance(value, Tensor)}), path)
        return f"in {path}"

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, where batches may be passed over."""
        return {"skipped": torch.tensor([self.skipped, self._in_a_row])} if self._mode == "skip" else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.skipped, self._in_a_row = state["skipped"].tolist()


def finite_batches(stream: Iterable[Mapping[str, Any]], hook_points: Sequence[str], say: Say) -> Iterator[Any]:
    """The batches whose kept activations are finite: what dictionaries are initialised from where batches may be passed over.

    Raises:
        NonFiniteError: too many in a row are not.
    """
    skipped = in_a_row = 0
    for batch in stream:
        bad = [hook for hook in hook_points if hook in batch and not torch.isfinite(kept_rows(batch, hook)).all()]
        if not bad:
            in_a_row = 0
            yield batch
            continue
        skipped, in_a_row = skipped + 1, in_a_row + 1
        if in_a_row > MOST_IN_A_ROW:
            raise NonFiniteError(
                f"{in_a_row} batches in a row hold NaN or infinity in the activations at {bad[0]}; run the language model in float32 or bfloat16"
            )
        if _worth_saying(skipped):
            say(f"initialisation: NaN or infinity in the activations at {bad[0]}; the batch is skipped, {skipped} so far")


def _worth_saying(count: int) -> bool:
    """The first few, then each time their number has doubled."""
    return count <= MOST_KEPT or count.bit_count() == 1


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
