"""Rows of tokens → activations in context, with the mask of the positions that are kept.

The filters, here and nowhere else:

1. padding is never kept;
2. special tokens (BOS, separators, ...) are not, or, where `ignore_token_ids` is a list, the tokens in it and no others;
3. outliers are not: positions at which the norm at some hook point is more than `outlier_norm_factor` times the median norm there. These
   are the attention sinks that some models grow at arbitrary tokens; a few of them would dominate every mean.

Each position that is not kept is counted under the first of these reasons. NaN and infinity are no outliers: they are kept, so that whoever
trains on them sees them and stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lm_saes.activations.mix import Mix
from lm_saes.activations.padding import forward_cost, groups_by_length
from lm_saes.activations.stream import State, Stream, nested, part
from lm_saes.activations.tokens import Tokens
from lm_saes.lm.language_model import forward_errors

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel

Batch = dict[str, Any]
Interceptor = Callable[[Batch, int], Batch]


class RunningMedian:
    """The median of all positive numbers seen, to within 0.6 %: a histogram of their logarithms with 64 bins per octave from 2^-32 to 2^32.

    Its memory is fixed, and it does not depend on the order in which the numbers came.
    """

    BINS_PER_OCTAVE = 64
    OCTAVES = 32

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * self.OCTAVES * self.BINS_PER_OCTAVE, dtype=torch.int64)

    def update(self, values: Float[Tensor, " n"]) -> None:
        """Count `values` (on the CPU); those that are not positive and finite are left out."""
        values = values[values.isfinite() & (values > 0)]
        bins = ((values.log2() + self.OCTAVES) * self.BINS_PER_OCTAVE).floor().long().clamp_(0, len(self.counts) - 1)
        self.counts += torch.bincount(bins, minlength=len(self.counts))

    def value(self) -> float | None:
        """The (lower) median, the middle of its bin; None before the first number."""
        total = int(self.counts.sum())
        if total == 0:
            return None
        middle = int(torch.searchsorted(self.counts.cumsum(0), (total + 1) // 2))
        return 2 ** ((middle + 0.5) / self.BINS_PER_OCTAVE - self.OCTAVES)


class ActivationCapture:
    """A stream of 2D batches, one for each item of `rows`.

    Without hook points the language model does not run, and the batches hold tokens and masks only.
    `counts[i]` are the tokens of source i: `tokens` read, `kept`, and dropped by reason; `padding` counts positions that hold no token.
    """

    def __init__(
        self,
        rows: Mix,
        model: LanguageModel,
        hook_points: Sequence[str],
        *,
        ignore_token_ids: Sequence[int] | None = None,
        outlier_norm_factor: float = 0.0,
        dtype: torch.dtype | None = None,
        interceptor: Interceptor | None = None,
    ) -> None:
        self._rows, self._model, self._hook_points = rows, model, list(hook_points)
        self._ignored = None if ignore_token_ids is None else torch.tensor(sorted(ignore_token_ids), dtype=torch.int64)
        self._outlier_norm_factor, self._dtype, self._interceptor = outlier_norm_factor, dtype, interceptor
        self.norm_medians = {hook: RunningMedian() for hook in self._hook_points}
        reasons = ("tokens", "kept", "special", "ignored", "outlier", "interceptor", "padding")
        self.counts: list[dict[str, int]] = [{reason: 0 for reason in reasons} for _ in rows.sources]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        source, tokens = next(self._rows)
        activations = self._activations(tokens)
        unwanted = tokens.special if self._ignored is None else torch.isin(tokens.ids, self._ignored) & tokens.attention_mask
        candidates = tokens.attention_mask & ~unwanted
        outliers = self._outliers(activations, candidates)
        mask = candidates & ~outliers
        device = self._model.device
        batch = {
            **activations,
            "tokens": tokens.ids.to(device),
            "mask": mask.to(device),
            "attention_mask": tokens.attention_mask.to(device),
            "meta": tokens.meta,
        }
        if self._interceptor is not None:
            batch = self._interceptor(batch, source)
        kept, n_tokens = int(batch["mask"].sum()), int(tokens.attention_mask.sum())
        counts = self.counts[source]
        counts["tokens"] += n_tokens
        counts["kept"] += kept
        counts["special" if self._ignored is None else "ignored"] += int(unwanted.sum())
        counts["outlier"] += int(outliers.sum())
        counts["interceptor"] += int(mask.sum()) - kept
        counts["padding"] += tokens.attention_mask.numel() - n_tokens
        return batch

    def _activations(self, tokens: Tokens) -> dict[str, Tensor]:
        """The hook points' activations [B, S, D]; zero at padding."""
        if not self._hook_points:
            return {}
        with forward_errors(self._model.cfg.model_name, tokens.ids):
            return self._captured(tokens)

    def _captured(self, tokens: Tokens) -> dict[str, Tensor]:
        lengths = tokens.attention_mask.sum(1).tolist()
        if min(lengths) == tokens.ids.shape[1]:
            captured = self._model.capture(tokens.ids, None, self._hook_points)
            return {hook: self._cast(captured[hook]) for hook in self._hook_points}
        activations: dict[str, Tensor] = {}
        for group in groups_by_length(lengths, forward_cost(self._model.device)):
            rows, longest = torch.tensor(group), max(lengths[row] for row in group)  # rows are padded on the right
            attended = tokens.attention_mask[rows, :longest]
            mask = None if bool(attended.all()) else attended.to(self._model.device)
            captured = self._model.capture(tokens.ids[rows, :longest], mask, self._hook_points)
            rows = rows.to(self._model.device)
            for hook, values in captured.items():
                values = self._cast(values) if mask is None else self._cast(values).masked_fill(~mask[..., None], 0)
                if hook not in activations:
                    activations[hook] = values.new_zeros(*tokens.ids.shape, values.shape[-1])
                activations[hook][rows, :longest] = values
        return activations

    def _cast(self, activations: Tensor) -> Tensor:
        return activations.to(device=self._model.device, dtype=self._dtype or activations.dtype)

    def _outliers(self, activations: Mapping[str, Tensor], candidates: Bool[Tensor, "B S"]) -> Bool[Tensor, "B S"]:
        """Candidates whose norm is an outlier at some hook point. The medians count this batch before they judge it."""
        outliers = torch.zeros_like(candidates)
        if self._outlier_norm_factor == 0:
            return outliers
        for hook, values in activations.items():
            norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32).cpu()
            self.norm_medians[hook].update(norms[candidates])
            median = self.norm_medians[hook].value()
            if median is not None:
                outliers |= norms.isfinite() & (norms > self._outlier_norm_factor * median)
        return outliers & candidates

    def state_dict(self) -> State:
        medians = {hook: median.counts.clone() for hook, median in self.norm_medians.items()}
        return {"counts": [dict(counts) for counts in self.counts], **nested("norms", medians), **nested("rows", self._rows.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = [dict(counts) for counts in state["counts"]]
        for hook, counts in part("norms", state).items():
            self.norm_medians[hook].counts = counts.clone()
        self._rows.load_state_dict(part("rows", state))


class KeptPositions:
    """2D batches → single activations: the positions of the mask, `{hook: [n, D], "tokens": [n], "mask": [n]}`."""

    def __init__(self, batches: Stream[Batch], hook_points: Sequence[str]) -> None:
        self._batches, self._keys = batches, [*hook_points, "tokens", "mask"]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        kept = batch["mask"].flatten().nonzero().squeeze(1)
        return {key: batch[key].flatten(0, 1).index_select(0, kept) for key in self._keys}

    def state_dict(self) -> State:
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches.load_state_dict(state)
