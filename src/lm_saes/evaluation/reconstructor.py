"""What the evaluator needs of a dictionary, so that a baseline can stand beside it."""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from lm_saes.ops import Codes


@runtime_checkable
class HookPoints(Protocol):
    """The part of a configuration that says what is read and what is reconstructed."""

    @property
    def hooks_in(self) -> list[str]: ...
    @property
    def hooks_out(self) -> list[str]: ...


@runtime_checkable
class Reconstructor(Protocol):
    """A dictionary, or a baseline that is evaluated like one."""

    training: bool

    @property
    def cfg(self) -> HookPoints: ...

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode, as modules do."""
        ...

    def features_and_reconstruction(self, batch: dict[str, Any]) -> tuple[Codes, Float[Tensor, "N D"]]:
        """Codes, and the reconstruction of the output hook, of raw activations `{hook: [N, D]}`."""
        ...
