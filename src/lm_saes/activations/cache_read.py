"""Activations on disk → batches. What `factory.py` does where its sources are activations:

1. `foreign_cache.py` and `cache.py` open what is at each source's path; samples are read in groups, each one piece of sequential reading.
2. `StoredSamples` reads the groups of a source, each once: in an order drawn from the seed where the stream is shuffled, else in their own.
   Threads read ahead; the state is a position, because the order is known.
3. `StoredFilters` applies what is still to be applied: tokens of `ignore_token_ids`, outliers where the cache was written unfiltered, the interceptor.
4. For single activations the positions of the mask are taken out of their sequences. `mix.py` takes from the source that is furthest
   behind its share of the tokens.
5. `shuffle.py` and `prefetch.py`, as for text.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from lm_saes.activations.cache import ORIGIN, Samples, StoredActivations
from lm_saes.activations.capture import Batch, Interceptor, KeptPositions, RunningMedian
from lm_saes.activations.factory import ActivationStream
from lm_saes.activations.foreign_cache import open_activations
from lm_saes.activations.mix import Mix, Source
from lm_saes.activations.prefetch import Prefetch, automatic_depth
from lm_saes.activations.shuffle import Rebatch, ShuffleBuffer
from lm_saes.activations.stream import State, Stream, nested, part
from lm_saes.config import ActivationFactoryActivationsSource, ActivationFactoryConfig, ActivationFactoryTarget
from lm_saes.devices import resolve_device
from lm_saes.errors import CacheError, ConfigError, DataError, HookPointError

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel


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


class _KeptRows:
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


class _Weighing:
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


class CachedActivationStream(ActivationStream):
    """Batches like those from text, read from the disk. `stored`: what is open, by source."""

    def __init__(
        self,
        cfg: ActivationFactoryConfig,
        batches: Rebatch | ShuffleBuffer,
        mix: Mix,
        filters: list[StoredFilters],
        *,
        context_size: int,
        hook_widths: dict[str, int],
        seed: int,
        device: torch.device,
    ) -> None:
        self.cfg, self.context_size, self.hook_widths, self.ended = cfg, context_size, hook_widths, False
        self.stored = {source.name: filtered.samples.stored for source, filtered in zip(cfg.sources, filters, strict=True)}
        self._batches, self._mix, self._filters = batches, mix, filters
        self._ahead = Prefetch(batches, automatic_depth(device) if cfg.prefetch is None else cfg.prefetch, device)
        decisive = cfg.model_dump(mode="json", exclude={"num_workers", "prefetch", "sources", "packing", "model_batch_size"})
        sources = [source.model_dump(mode="json", include={"name", "sample_weights", "dtype"}) for source in cfg.sources]
        self._settings = {"seed": seed, "sources": sources, **decisive}

    def counts(self) -> dict[str, Any]:
        """What has been read (also ahead of the batches that were given out), kept and dropped so far.

        `samples` read, `damaged` ones that were passed over; `tokens` = `kept` + the sum of `dropped`, whose reasons are `masked` (by the cache),
        `ignored`, `outlier`, `interceptor`; `padding`; `ended`; `sources`: the same for each source; `delivered` and `remainder` as for text.
        """
        with self._ahead.paused():
            sources = {}
            for source, filtered, ended in zip(self._mix.sources, self._filters, self._mix.ended, strict=True):
                counts = dict(filtered.counts)
                dropped = {reason: counts.pop(reason) for reason in ("masked", "ignored", "outlier", "interceptor")}
                sources[source.name] = {**filtered.samples.counts, **counts, "dropped": dropped, "ended": ended}
            delivered = self._batches.delivered - self._ahead.ahead * self.cfg.batch_size
        total: dict[str, Any] = {"ended": self.ended, "dropped": {}}
        for counts in sources.values():
            for key, value in counts.items():
                if key == "dropped":
                    total["dropped"] = {reason: total["dropped"].get(reason, 0) + number for reason, number in value.items()}
                elif key != "ended":
                    total[key] = total.get(key, 0) + value
        return {**total, "delivered": delivered, "remainder": self._batches.remainder if self.ended else 0, "sources": sources}

    def description(self) -> str:
        """What was kept, what was dropped and why, and which caches ended, in one line."""
        counts = self.counts()
        words = {
            "masked": "masked in the cache",
            "ignored": "tokens of ignore_token_ids",
            "outlier": "outliers by norm",
            "interceptor": "by the interceptor",
        }
        parts = [f"read {counts['samples']:,} samples from disk, kept {counts['kept']:,} of {counts['tokens']:,} tokens"]
        if dropped := [f"{counts['dropped'][reason]:,} {text}" for reason, text in words.items() if counts["dropped"][reason]]:
            parts.append(f"dropped {', '.join(dropped)}")
        if counts["damaged"]:
            parts.append(f"passed over {counts['damaged']:,} damaged samples")
        if ended := [name for name, source in counts["sources"].items() if source["ended"]]:
            parts.append(f"used up: {', '.join(ended)}")
        return "; ".join(parts)


def cached_stream(
    cfg: ActivationFactoryConfig, model: LanguageModel | None, seed: int, interceptor: Interceptor | None = None, *, origins_only: bool = False
) -> CachedActivationStream:
    """A stream from the beginning of the sources of `cfg`, all of them activations on disk. With `origins_only`, batches hold where
    each token comes from instead of its activations.

    Raises:
        CacheError: nothing is there, it is not finished or damaged. ConfigError, HookPointError: it does not go with `cfg` or `model`.
    """
    sources = [source for source in cfg.sources if isinstance(source, ActivationFactoryActivationsSource)]
    single = cfg.target is ActivationFactoryTarget.ACTIVATIONS_1D
    hooks = [] if cfg.target is ActivationFactoryTarget.TOKENS or origins_only else cfg.hook_points
    device = model.device if model is not None else resolve_device(sources[0].device)
    stored = [open_activations(source.path, cfg.hook_points, skip_damaged=source.skip_damaged) for source in sources]
    widths = _check(cfg, sources, stored, model, interceptor)
    keys = [*hooks, "tokens", "mask", *([ORIGIN] if origins_only else [])]
    filters: list[StoredFilters] = []
    items: list[Source] = []
    for index, (source, one) in enumerate(zip(sources, stored, strict=True)):
        samples = StoredSamples(
            one,
            hooks,
            seed=None if cfg.buffer_size is None else zlib.crc32(f"{seed} {source.name}".encode()),
            workers=source.num_workers,
            ahead=source.prefetch or 2,
            dtype=cfg.override_dtype or source.dtype,  # pyright: ignore[reportArgumentType]  # a torch.dtype when it is read
            device=device,
            origin=origins_only,
        )
        filtered = StoredFilters(
            samples,
            hooks,
            ignore_token_ids=cfg.ignore_token_ids,
            outlier_norm_factor=cfg.outlier_norm_factor,
            interceptor=interceptor,
            source=index,
        )
        filters.append(filtered)
        batches: Any = filtered
        if single:
            batches = KeptPositions(filtered, [key for key in keys if key not in ("tokens", "mask")]) if one.sequences else _KeptRows(filtered, keys)
        weighed: Any = _Weighing(batches)
        items.append(Source(source.name, source.sample_weights, weighed))
    mix = Mix(items)
    mixed = MixedActivations(mix)
    if cfg.buffer_size is None:
        out = Rebatch(mixed, cfg.batch_size, device=device)
    else:
        buffer_seed = seed if cfg.buffer_shuffle is None else cfg.buffer_shuffle.perm_seed
        out = ShuffleBuffer(mixed, cfg.batch_size, cfg.buffer_size, seed=buffer_seed, max_bytes=cfg.max_buffer_bytes, device=device)
    context_size = next((one.context_size for one in stored if one.context_size is not None), 0)
    return CachedActivationStream(cfg, out, mix, filters, context_size=context_size, hook_widths=widths if hooks else {}, seed=seed, device=device)


def _check(
    cfg: ActivationFactoryConfig,
    sources: Sequence[ActivationFactoryActivationsSource],
    stored: Sequence[StoredActivations],
    model: LanguageModel | None,
    interceptor: Interceptor | None,
) -> dict[str, int]:
    """What is on disk goes with what is asked for; the widths of the hook points."""
    widths = {hook: stored[0].hook_widths[hook] for hook in cfg.hook_points}
    sequences = cfg.target is not ActivationFactoryTarget.ACTIVATIONS_1D
    for source, one in zip(sources, stored, strict=True):
        here = {hook: one.hook_widths[hook] for hook in cfg.hook_points}
        if here != widths:
            raise HookPointError(f"source '{source.name}' has the widths {here}, '{sources[0].name}' {widths}")
        if source.device != sources[0].device:
            raise ConfigError(f"sources must name one device, got '{sources[0].device}' and '{source.device}'")
        if not one.sequences and (sequences or interceptor is not None):
            raise ConfigError(
                f"source '{source.name}' holds single activations, without their contexts: set target = \"activations-1d\""
                + (" and no interceptor" if interceptor is not None else "")
            )
        if sequences and one.context_size != stored[0].context_size:
            raise ConfigError(f"source '{source.name}' has contexts of {one.context_size} positions, '{sources[0].name}' of {stored[0].context_size}")
        if cfg.context_size is not None and one.context_size not in (None, cfg.context_size):
            raise ConfigError(
                f"source '{source.name}' has contexts of {one.context_size} positions, got context_size = {cfg.context_size}; leave it out"
            )
        if model is not None:
            _check_model(source.name, one, widths, model)
    return widths


def _check_model(name: str, stored: StoredActivations, widths: Mapping[str, int], model: LanguageModel) -> None:
    for hook, width in widths.items():
        if model.hook_width(hook) != width:
            raise HookPointError(
                f"'{hook}' is {model.hook_width(hook)} wide in the model and {width} in source '{name}': it comes from another model"
            )
    written = (stored.provenance.get("model_identity") or {}).get("tokenizer_hash")
    own = model.provenance().get("tokenizer_hash")
    if written and own and written != own:
        raise ConfigError(
            f"source '{name}' was written with another tokenizer than that of {model.cfg.model_name}; use the model that it was written with"
        )
