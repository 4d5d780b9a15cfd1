"""A stream of activations → a cache on disk.

Samples are collected in a block in memory, permuted, and cut into shards. After each shard a small file says how far the writing has come and
where the stream stood at the start of the block, so that a process that was killed goes on with the block it was killed in; what it reads again is
what it had read. The manifest is written when all parts are there: a reader sees a finished cache or none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_saes.activations.cache_format import GROUP_BYTES, MANIFEST_FILE, Manifest, ShardRecord, read_manifest, shard_name, write_shard
from lm_saes.activations.cache_progress import Progress, exclusive, finish_cache, room_for, space_errors
from lm_saes.activations.cache_samples import Block, tensor_bytes
from lm_saes.activations.quantization import find_outlier_dimensions
from lm_saes.activations.stream import snapshot
from lm_saes.config.activations import ActivationFactoryTarget
from lm_saes.config.generation import ActivationWriterConfig
from lm_saes.errors import CacheError, ConfigError, DataError

SHARD_BYTES = 256 * 2**20
OUTLIER_SAMPLE = 65_536
"""Vectors from which the dimensions that int8 keeps apart are chosen: the first of each process."""

Report = Callable[[int, int], None]


class ActivationWriter:
    """Writes activation caches. `executor` must be None: one thread writes."""

    def __init__(self, cfg: ActivationWriterConfig, executor: object | None = None) -> None:
        if executor is not None:
            raise ConfigError("executor must be None: a shard is written in one go")
        if cfg.num_workers is not None:
            warnings.warn("without effect in this activation writer: num_workers (a shard is written in one go)", stacklevel=2)
        self.cfg = cfg

    def process(
        self,
        stream: Iterable[Mapping[str, Any]],
        device_mesh: object | None = None,
        start_shard: int | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        report: Report | None = None,
    ) -> Manifest | None:
        """Write the stream, or what is left of it to write.

        Args:
            stream: 2D batches (or 1D ones, `{hook: [n, D], "tokens": [n]}`, for a cache without contexts). With `state_dict` and `load_state_dict`,
                writing goes on where it was killed.
            start_shard: which process this is, instead of `cfg.start_shard`.
            settings: what else the content depends on: writing goes on only with the same.
            provenance: model, dataset and so on, for the manifest; JSON values.
            report: called with the tokens and the bytes written so far, after each shard.

        Returns:
            The manifest, or None if other processes have not finished their parts.

        Raises:
            CacheError: the folder holds another cache; there is no room (finished shards are kept); another process writes this part.
            NonFiniteError: NaN or infinity, also where `dtype` cannot hold a number. DataError: the stream ended before it gave a sample.
        """
        if device_mesh is not None:
            raise ConfigError("device_mesh must be None: processes share the work by n_shards and start_shard")
        cfg = self.cfg if start_shard is None else self.cfg.replace(start_shard=start_shard)
        identity = {**_identity(cfg), **(settings or {})}
        folder = Path(cfg.cache_dir)
        if (folder / MANIFEST_FILE).is_file():
            return _same_cache(read_manifest(folder), identity, folder)
        with space_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder, f"{cfg.start_shard}-of-{cfg.n_shards}"):
            progress = Progress.load(folder, cfg.start_shard, cfg.n_shards) or Progress(cfg.start_shard, cfg.n_shards, identity)
            progress.check(identity, folder)
            progress.provenance = dict(provenance or {})
            if not progress.finished:
                _Writing(cfg, folder, progress, stream, report).run()
                progress.finished, progress.counts = True, _counts(stream)
                progress.save(folder)
        return finish_cache(folder, identity)


def _identity(cfg: ActivationWriterConfig) -> dict[str, Any]:
    """What the content of a cache depends on, apart from the stream."""
    table = cfg.model_dump(mode="json", exclude={"cache_dir", "start_shard", "num_workers", "format"})
    return {"target": table.pop("target"), **table}


def _same_cache(manifest: Manifest, identity: Mapping[str, Any], folder: Path) -> Manifest:
    for name, value in identity.items():
        if manifest.settings.get(name) != value:
            raise CacheError(f"{folder} holds a finished cache with {name} = {manifest.settings.get(name)!r}, got {value!r}; choose another folder")
    return manifest


def _counts(stream: Any) -> dict[str, Any]:
    return stream.counts() if callable(getattr(stream, "counts", None)) else {}


class _Writing:
    """One process's part, from where it stands to its end."""

    def __init__(self, cfg: ActivationWriterConfig, folder: Path, progress: Progress, stream: Any, report: Report | None) -> None:
        self._cfg, self._folder, self._progress, self._stream, self._report = cfg, folder, progress, stream, report
        self._resumable = hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict")
        self._single = cfg.target is ActivationFactoryTarget.ACTIVATIONS_1D
        self._block: Block | None = None
        self._first_context = progress.first_context or progress.part << 32  # numbers of contexts, different in each part
        self._largest_batch = 0

    def run(self) -> None:
        """Write shards until the tokens or the stream are used up."""
        progress = self._progress
        if progress.stream is not None:
            if not self._resumable:
                raise CacheError(f"{self._folder} cannot be gone on with: this stream has no state; write into an empty folder")
            self._stream.load_state_dict(progress.stream)
        elif progress.shards:
            raise CacheError(f"{self._folder} cannot be gone on with: its stream had no state; write into an empty folder")
        elif self._resumable:
            progress.stream = self._state()
        items, skip = iter(self._stream), progress.skip
        while not self._done():
            before = self._state() if self._may_fill() else None
            batch = next(items, None)
            if batch is None:
                break
            self._check(batch)
            self._take(batch, skip, before)
            skip = 0
        if self._block is not None and len(self._block) and not self._done():
            self._write_block(self._state(), 0)
        if not progress.shards:
            raise DataError("the stream ended before it gave a sample; check the dataset and the filters")

    def _state(self) -> Any:
        """Where the stream is; None of one without a state."""
        return snapshot(self._stream.state_dict()) if self._resumable else None

    def _may_fill(self) -> bool:
        """Whether a batch like those before could fill the block: only then the stream's state is taken, which can be slow."""
        return self._block is None or self._block.room <= self._largest_batch

    def _left(self) -> int | None:
        """Tokens still to be collected; None without a limit."""
        total = self._cfg.total_generating_tokens
        collected = self._progress.tokens_before_block + (self._block.tokens if self._block is not None else 0)
        return None if total is None else total - collected

    def _done(self) -> bool:
        left = self._left()
        return left is not None and left <= 0

    def _take(self, batch: Mapping[str, Any], skip: int, before: Any) -> None:
        """Put the batch's samples from `skip` on into blocks, and write those that get full."""
        if self._block is None:
            self._block = self._new_block(batch)
        first: Tensor = batch[self._cfg.hook_points[0]]
        self._largest_batch = max(self._largest_batch, first.shape[:-1].numel() if self._single else len(first))
        n = self._block.count(batch)
        if skip > n:
            raise CacheError(f"{self._folder} cannot be gone on with: the stream does not give what it gave; write into an empty folder")
        while skip < n and not self._done():
            skip = self._block.add(batch, skip, self._left(), self._first_context)
            if self._block.room == 0 or self._done():
                self._write_block(before, skip)
        if first.dim() == 3:
            self._first_context += len(first)

    def _new_block(self, batch: Mapping[str, Any]) -> Block:
        cfg, progress = self._cfg, self._progress
        if not progress.shape:
            dtype = cfg.dtype or batch[cfg.hook_points[0]].dtype
            assert isinstance(dtype, torch.dtype)
            name = str(dtype).removeprefix("torch.")
            if name not in {"float32", "bfloat16", "float16", "int8"}:
                raise ConfigError(f"a cache holds float32, bfloat16, float16 or int8, the activations are {name}; set dtype")
            widths = {hook: batch[hook].shape[-1] for hook in cfg.hook_points}
            context = batch["tokens"].shape[1] if "tokens" in batch and batch["tokens"].dim() == 2 else None
            per_sample = tensor_bytes(widths, name, context, self._single)
            entries = context if context and not self._single else 1
            progress.shape = {
                "hook_points": widths, "dtype": name, "context_size": context,
                "samples_per_shard": cfg.n_samples_per_chunk or max(1, SHARD_BYTES // per_sample),
                "samples_per_group": max(1, GROUP_BYTES // (entries * max(widths.values()) * 4)),
            }  # fmt: skip
        per_shard = progress.shape["samples_per_shard"]
        capacity = -(-(cfg.buffer_size or 1) // per_shard) * per_shard
        return Block(cfg.hook_points, capacity, self._single, getattr(torch, progress.shape["dtype"]))

    def _check(self, batch: Mapping[str, Any]) -> None:
        """The batch has what the cache needs, in the shape of the batches before.

        Raises:
            DataError: it lacks a hook point. ConfigError: it has no sequences, and the cache is to hold them.
        """
        missing = [hook for hook in self._cfg.hook_points if hook not in batch]
        if missing:
            raise DataError(f"the stream has no hook point {missing[0]}; it has {', '.join(map(str, batch))}")
        first: Tensor = batch[self._cfg.hook_points[0]]
        if first.dim() != 3 and not self._single:
            raise ConfigError("a cache of sequences (activations-2d) needs batches of sequences; write activations-1d")

    def _write_block(self, before: Any, skip: int) -> None:
        """Permute the block and write its shards; those that were written before the process was killed are there already."""
        progress, block = self._progress, self._block
        assert block is not None
        per_shard = progress.shape["samples_per_shard"]
        seed = self._cfg.seed * 1_000_003 + progress.part
        order = torch.randperm(len(block), generator=torch.Generator().manual_seed((seed * 1_000_003 + progress.block) % 2**63))
        pieces = list(order.split(per_shard))
        first = len(progress.shards) - progress.shards_before_block
        self._choose_outliers(block)
        progress.contexts = block.with_contexts
        for number in range(first, len(pieces)):
            record = self._write_one(block, pieces[number])
            progress.shards.append(record)
            if number == len(pieces) - 1:
                progress.close_block(block.tokens, self._first_context, before, skip)
            with space_errors(self._folder):
                progress.save(self._folder)
            if self._report is not None:
                self._report(sum(shard.tokens for shard in progress.shards), sum(shard.bytes for shard in progress.shards))
        block.clear()

    def _write_one(self, block: Block, rows: Tensor) -> ShardRecord:
        progress, shape = self._progress, self._progress.shape
        tensors = block.shard(rows, shape["dtype"], progress.outlier_dimensions)
        path = self._folder / shard_name(progress.part, progress.parts, len(progress.shards))
        room_for(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), self._folder, progress)
        with space_errors(self._folder, progress):
            n_bytes, sha256 = write_shard(path, tensors, shape["samples_per_group"])
        return ShardRecord(file=path.name, samples=len(rows), tokens=block.tokens_of(rows), bytes=n_bytes, sha256=sha256)

    def _choose_outliers(self, block: Block) -> None:
        if self._progress.shape["dtype"] == "int8" and not self._progress.outlier_dimensions:
            self._progress.outlier_dimensions = {
                hook: find_outlier_dimensions(block.activations(hook, OUTLIER_SAMPLE)).tolist() for hook in self._cfg.hook_points
            }
