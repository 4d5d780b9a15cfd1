"""Samples in memory on their way into a cache: the block in which they are collected, and the tensors of a shard cut from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm_saes.activations.quantization import DIMENSIONS_PER_OUTLIER, quantize
from lm_saes.errors import DataError, NonFiniteError

Batch = Mapping[str, Any]


class _Context(NamedTuple):
    """Where a sample comes from."""

    tokens: Tensor
    """[S] int32, -1 at padding."""
    number: int
    meta: dict[str, Any]


def tensor_bytes(widths: Mapping[str, int], dtype: str, context_size: int | None, single: bool) -> int:
    """Bytes of one sample on disk: a token, or with `single` false a sequence. Spans and the like are counted at sixteen bytes a context."""
    item = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[dtype]
    extra = {hook: 4 + 4 * (width // DIMENSIONS_PER_OUTLIER) if dtype == "int8" else 0 for hook, width in widths.items()}
    entry = sum(width * item + extra[hook] for hook, width in widths.items())
    if single:
        return entry + 4 + (12 if context_size else 0)
    return (context_size or 1) * (entry + 6) + 16


class Block:
    """Room for `capacity` samples. Their activations are stored in `dtype` where that is a floating-point type, else as they come.

    `single`: samples are the kept positions of the batches; else whole sequences.
    """

    def __init__(self, hook_points: Sequence[str], capacity: int, single: bool, dtype: torch.dtype) -> None:
        self._hook_points, self._capacity, self._single = list(hook_points), capacity, single
        self._dtype = dtype if dtype.is_floating_point else None
        self._storage: dict[str, Tensor] = {}
        self._contexts: list[_Context] = []
        self._n = 0
        self.tokens = 0
        """Kept tokens in it."""

    def __len__(self) -> int:
        return self._n

    @property
    def room(self) -> int:
        """Samples that still fit."""
        return self._capacity - self._n

    @property
    def with_contexts(self) -> bool:
        """Whether it is known where the samples come from."""
        return bool(self._contexts)

    def clear(self) -> None:
        """Forget all samples; their room is kept."""
        self._n, self.tokens = 0, 0
        self._contexts = []

    def add(self, batch: Batch, skip: int, left: int | None, first_number: int) -> int:
        """Take samples of the batch from number `skip` on, until the block is full or has `left` more tokens.

        Args:
            first_number: the number of the batch's first context.

        Returns:
            How many samples of the batch have been taken now, or more than it has when there are no more.
        """
        sequences = batch[self._hook_points[0]].dim() == 3
        samples, tokens_each = self._kept_positions(batch, skip) if self._single else self._sequences(batch, skip)
        n = min(len(tokens_each), self.room)
        if left is not None:
            enough = torch.searchsorted(tokens_each.cumsum(0), torch.tensor(left)) + 1  # the sample with which `left` is reached is the last
            n = min(n, int(enough))
        if n:
            if sequences:
                samples["context"] = samples["context"] + len(self._contexts)
                self._contexts.extend(_contexts(batch, first_number))
            self._write({key: value[:n] for key, value in samples.items()}, n)
            self.tokens += int(tokens_each[:n].sum())
        return skip + n

    def count(self, batch: Batch) -> int:
        """How many samples the batch has."""
        first = batch[self._hook_points[0]]
        if not self._single:
            return len(first)
        mask = batch.get("mask")
        return int(mask.sum()) if mask is not None else first.shape[:-1].numel()

    def _kept_positions(self, batch: Batch, skip: int) -> tuple[dict[str, Tensor], Tensor]:
        first = batch[self._hook_points[0]]
        shape = first.shape[:-1]
        mask = batch.get("mask")
        kept = (torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu().bool()).flatten().nonzero().squeeze(1)[skip : skip + self.room]
        on_device = kept.to(first.device)
        samples = {hook: batch[hook].reshape(-1, batch[hook].shape[-1]).index_select(0, on_device).cpu() for hook in self._hook_points}
        tokens = batch.get("tokens")
        samples["tokens"] = torch.full((len(kept),), -1) if tokens is None else tokens.cpu().reshape(-1)[kept]
        if first.dim() == 3:
            samples |= {"context": kept // shape[1], "position": kept % shape[1]}
        return samples, torch.ones(len(kept), dtype=torch.int64)

    def _sequences(self, batch: Batch, skip: int) -> tuple[dict[str, Tensor], Tensor]:
        rows = slice(skip, skip + self.room)
        samples = {hook: batch[hook][rows].cpu() for hook in self._hook_points}
        n, length = samples[self._hook_points[0]].shape[:2]
        everywhere = torch.ones((n, length), dtype=torch.bool)
        attention_mask = batch["attention_mask"][rows].cpu().bool() if "attention_mask" in batch else everywhere
        mask = batch["mask"][rows].cpu().bool() if "mask" in batch else attention_mask
        tokens = batch["tokens"][rows].cpu() if "tokens" in batch else torch.full((n, length), -1)
        samples |= {"tokens": tokens, "mask": mask, "attention_mask": attention_mask, "context": torch.arange(skip, skip + n)}
        return samples, mask.sum(1)

    def _write(self, samples: dict[str, Tensor], n: int) -> None:
        for key, values in samples.items():
            if key in self._hook_points:
                values = self._finite(key, values)
            elif values.dtype is not torch.bool:
                values = values.to(torch.int32)
            if key not in self._storage:
                self._storage[key] = torch.empty((self._capacity, *values.shape[1:]), dtype=values.dtype)
            if values.shape[1:] != self._storage[key].shape[1:]:
                wanted, got = list(self._storage[key].shape[1:]), list(values.shape[1:])
                raise DataError(f"batches must keep their shape: {key} was {wanted} per sample, is now {got}")
            self._storage[key][self._n : self._n + n] = values
        self._n += n

    def _finite(self, hook: str, values: Tensor) -> Tensor:
        """The activations as they are stored. Raises `NonFiniteError`."""
        stored = values.to(self._dtype or values.dtype)
        if not bool(stored.isfinite().all()):
            bad = int((~values.isfinite()).any(-1).sum())
            what = f"{bad} activations at {hook} are NaN or infinite; run the language model in float32 or bfloat16"
            raise NonFiniteError(what if bad else f'activations at {hook} are too large for {stored.dtype}; store them as "bfloat16"')
        return stored

    def activations(self, hook: str, limit: int) -> Tensor:
        """Up to `limit` vectors, [n, D]: at kept positions."""
        values = self._storage[hook][: self._n]
        if self._single:
            return values[:limit]
        return values[self._storage["mask"][: self._n]][:limit]

    def tokens_of(self, rows: Tensor) -> int:
        """Kept tokens among some samples."""
        return len(rows) if self._single else int(self._storage["mask"][rows].sum())

    def shard(self, rows: Tensor, dtype: str, outlier_dimensions: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """The tensors of a shard that holds the samples `rows`, in their order (`cache_format.py` says which)."""
        tensors: dict[str, Tensor] = {}
        for hook in self._hook_points:
            values = self._storage[hook][rows]
            if dtype == "int8":
                dimensions = torch.tensor(outlier_dimensions[hook], dtype=torch.int64)
                quantized = quantize(values, dimensions)
                tensors |= {f"activations/{hook}": quantized.values, f"scale/{hook}": quantized.scale, f"outliers/{hook}": quantized.outliers,
                            f"outlier_dimensions/{hook}": dimensions}  # fmt: skip
            else:
                tensors[f"activations/{hook}"] = values
        names = ["tokens"] if self._single else ["tokens", "mask", "attention_mask"]
        tensors |= {name: self._storage[name][rows] for name in names}
        if not self._contexts:
            return tensors
        used, local = self._storage["context"][rows].unique(return_inverse=True)
        contexts = [self._contexts[index] for index in used.tolist()]
        if self._single:
            tensors |= {"context": local.to(torch.int32), "position": self._storage["position"][rows]}
            tensors["contexts/tokens"] = torch.stack([context.tokens for context in contexts])
        else:  # a sample is a context
            contexts = [contexts[index] for index in local.tolist()]
        return tensors | _tables(contexts)


def _contexts(batch: Batch, first_number: int) -> list[_Context]:
    n, length = batch[next(key for key, value in batch.items() if isinstance(value, Tensor) and value.dim() == 3)].shape[:2]
    tokens = batch["tokens"].cpu().to(torch.int32) if "tokens" in batch else torch.full((n, length), -1, dtype=torch.int32)
    if "attention_mask" in batch:
        tokens = tokens.masked_fill(~batch["attention_mask"].cpu().bool(), -1)
    meta = batch.get("meta") or [{} for _ in range(n)]
    return [_Context(tokens[row], first_number + row, dict(meta[row])) for row in range(n)]


def _tables(contexts: Sequence[_Context]) -> dict[str, Tensor]:
    """Numbers, spans and metadata of contexts."""
    documents: dict[str, int] = {}
    records: dict[str, int] = {}
    spans: list[list[int]] = []
    which: list[int] = []
    for row, context in enumerate(contexts):
        plain = {key: value for key, value in context.meta.items() if key != "spans"}
        which.append(records.setdefault(json.dumps(plain, sort_keys=True), len(records)))
        for document, first, end in context.meta.get("spans", []):
            spans.append([row, documents.setdefault(document, len(documents)), first, end])
    text = json.dumps({"documents": list(documents), "meta": [json.loads(record) for record in records]})
    return {
        "contexts/number": torch.tensor([context.number for context in contexts], dtype=torch.int64),
        "contexts/spans": torch.tensor(spans, dtype=torch.int32).reshape(-1, 4),
        "contexts/meta": torch.tensor(which, dtype=torch.int32),
        "contexts/records": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
    }
