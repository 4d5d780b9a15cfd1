"""The streams that only activations on disk have: groups of samples in an order, filters, and the mixing of sources."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lm_saes.activations.capture import Batch, Interceptor, RunningMedian
from lm_saes.activations.mix import Mix
from lm_saes.activations.stored import Samples, StoredActivations
from lm_saes.activations.stream import State, Stream, nested, part
from lm_saes.errors import CacheError, DataError


class StoredSamples:
    """The samples of one source, group after group, each once. `seed` None: in the order in which they stand on the disk.

    `workers` threads read `ahead` groups each before they are asked for; with 0 workers each is read when it is asked for. `dtype`: cast to
    it. `counts`: `samples` read, and `damaged` ones that were passed over.
    """

    def __init__(
        self,
        stored: StoredActivations,
        hook_points: Sequence[str],
        *,
        seed: int | None,
        workers: int = 4,
        ahead: int = 8,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        origin: bool = False,
    ) -> None:
        self.stored, self._hook_points, self._origin = stored, list(hook_points), origin
        self._dtype, self._device = dtype, torch.device(device)
        n = stored.n_groups
        self._order = torch.arange(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        self._position, self._ahead = 0, workers * ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="lm_saes cache") if workers else None
        self._reading: deque[Future[Samples | None]] = deque()
        self.counts = {"samples": 0, "damaged": 0}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Samples:
        while self._position < len(self._order):
            samples = self._next_group()
            self._position += 1
            if samples is not None:
                self.counts["samples"] += len(samples["tokens"])
                return {key: self._placed(key, value) for key, value in samples.items()}
        missing = self.stored.n_samples - self.counts["samples"]
        if missing and self.counts["samples"] == 0:
            raise CacheError("every shard of the cache is damaged")
        self.counts["damaged"] = missing
        raise StopIteration

    def _next_group(self) -> Samples | None:
        if self._pool is None:
            return self._read(int(self._order[self._position]))
        while len(self._reading) < self._ahead and self._position + len(self._reading) < len(self._order):
            self._reading.append(self._pool.submit(self._read, int(self._order[self._position + len(self._reading)])))
        samples = self._reading[0].result()  # what it raises it raises again when asked again
        self._reading.popleft()
        return samples

    def _read(self, group: int) -> Samples | None:
        return self.stored.read(group, self._hook_points, origin=self._origin)

    def _placed(self, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self._device, self._dtype if key in self._hook_points else None)

    def state_dict(self) -> State:
        return {"position": self._position, "content": self.stored.fingerprint(), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `DataError` if the files are not those that were read then."""
        if state["content"] != self.stored.fingerprint():
            raise DataError(
                f"the activations on disk have changed: {state['content']} when the run was saved, {self.stored.fingerprint()} now; "
                "resume with the same files"
            )
        self._position, self.counts = state["position"], dict(state["counts"])
        self._reading.clear()


class StoredFilters:
    """Samples with the mask of those that are kept. `counts`: `tokens` in the samples, `kept`, and dropped by reason."""

    def __init__(
        self,
        samples: StoredSamples,
        hook_points: Sequence[str],
        *,
        ignore_token_ids: Sequence[int] | None = None,
        outlier_norm_factor: float = 0.0,
        interceptor: Interceptor | None = None,
        source: int = 0,
    ) -> None:
        self.samples, self._hook_points = samples, list(hook_points)
        self._ignored = None if ignore_token_ids is None else torch.tensor(sorted(ignore_token_ids), dtype=torch.int64)
        self._factor = 0.0 if samples.stored.filtered else outlier_norm_factor
        self._interceptor, self._source = interceptor, source
        self.norm_medians = {hook: RunningMedian() for hook in self._hook_points} if self._factor else {}
        self.counts = {reason: 0 for reason in ("tokens", "kept", "masked", "ignored", "outlier", "interceptor", "padding")}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = next(self.samples)
        attended = batch.get("attention_mask", batch["mask"])
        stored = batch["mask"] & attended
        ignored = torch.zeros_like(stored) if self._ignored is None else torch.isin(batch["tokens"], self._ignored.to(stored.device)) & stored
        candidates = stored & ~ignored
        outliers = self._outliers(batch, candidates)
        mask = candidates & ~outliers
        batch["mask"] = mask
        if self._interceptor is not None:
            batch = self._interceptor(batch, self._source)
        kept, counts = int(batch["mask"].sum()), self.counts
        counts["tokens"] += int(attended.sum())
        counts["kept"] += kept
        counts["masked"] += int((attended & ~stored).sum())
        counts["ignored"] += int(ignored.sum())
        counts["outlier"] += int(outliers.sum())
        counts["interceptor"] += int(mask.sum()) - kept
        counts["padding"] += attended.numel() - int(attended.sum())
        return batch

    def _outliers(self, batch: Batch, candidates: Tensor) -> Tensor:
        """As `capture.py` does it."""
        outliers = torch.zeros_like(candidates)
        for hook, median in self.norm_medians.items():
            norms = torch.linalg.vector_norm(batch[hook], dim=-1, dtype=torch.promote_types(batch[hook].dtype, torch.float32))
            median.update(norms[candidates].float().cpu())
            middle = median.value()
            if middle is not None:
                outliers |= norms.isfinite() & (norms > self._factor * middle)
        return outliers & candidates

    def state_dict(self) -> State:
        medians = {hook: median.counts.clone() for hook, median in self.norm_medians.items()}
        return {"counts": dict(self.counts), **nested("norms", medians), **nested("samples", self.samples.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts = dict(state["counts"])
        for hook, counts in part("norms", state).items():
            self.norm_medians[hook].counts = counts.clone()
        self.samples.load_state_dict(part("samples", state))


class KeptRows:
    """Single activations that the mask keeps."""

    def __init__(self, batches: StoredFilters, keys: Sequence[str]) -> None:
        self._batches, self._keys = batches, list(keys)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if bool(batch["mask"].all()):
            return {key: batch[key] for key in self._keys}
        kept = batch["mask"].nonzero().squeeze(1)
        return {key: batch[key].index_select(0, kept) for key in self._keys}

    def state_dict(self) -> State:
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches.load_state_dict(state)


class _Weighed(NamedTuple):
    """A batch as `Mix` takes it: the tokens that count are those that are kept."""

    batch: Batch
    attention_mask: Tensor


class Weighing:
    """Batches as `Mix` takes them."""

    def __init__(self, batches: Stream[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _Weighed:
        batch = next(self._batches)
        return _Weighed(batch, batch["mask"])

    def state_dict(self) -> State:
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches.load_state_dict(state)


class MixedActivations:
    """The batches of several sources, mixed by weight; of which source one is, is forgotten."""

    def __init__(self, mix: Mix) -> None:
        self._mix = mix

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        weighed: Any = next(self._mix).tokens
        return weighed.batch

    def state_dict(self) -> State:
        return self._mix.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mix.load_state_dict(state)
