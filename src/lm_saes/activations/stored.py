"""What the streams ask of activations on disk, whatever their format: samples in groups, each one piece of sequential reading that any thread can
read by its number. `cache.py` is the library's own format, `foreign_cache.py` has the others, `cache_streams.py` reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from lm_saes.errors import CacheError

Samples = dict[str, Any]
"""`{hook point: [n, D] or [n, S, D], "tokens": [n] or [n, S] int64, "mask": bool}`; sequences also have `attention_mask` and `meta`."""

ORIGIN = "origin"
"""Key of `[n]` or `[n, S]` int64: where each token stood when the cache was written, context · S + position."""


class StoredActivations(ABC):
    """Samples on disk, read group by group."""

    hook_widths: dict[str, int]
    context_size: int | None
    """Positions of a context; None where that is not known."""
    sequences: bool
    """Whether a sample is a sequence (2D) or a single activation (1D)."""
    filtered: bool
    """Whether outliers were dropped when it was written."""
    provenance: dict[str, Any]
    """Where it comes from, as far as it says."""
    n_samples: int

    @property
    @abstractmethod
    def n_groups(self) -> int: ...

    @abstractmethod
    def read(self, group: int, hook_points: Sequence[str], *, origin: bool = False) -> Samples | None:
        """The samples of a group, on the CPU, with `origin` also where they come from; None for one that is damaged and may be skipped.

        Raises:
            CacheError: it is damaged or missing; the message names the file.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the content does: states of streams hold it."""

    def require(self, hook_points: Sequence[str]) -> None:
        """Raises `CacheError` if it does not hold the hook points."""
        missing = [hook for hook in hook_points if hook not in self.hook_widths]
        if missing:
            raise CacheError(f"the activations on disk have no hook point {missing[0]}; they have {', '.join(self.hook_widths)}")
