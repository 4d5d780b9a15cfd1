"""Small caches for tests: the text of `test_factory.py` through the see-through language model, written to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_saes.activations.cache_format import Manifest
from lm_saes.activations.factory import ActivationFactory, ActivationStream
from lm_saes.activations.writer import ActivationWriter
from lm_saes.config import (
    ActivationFactoryActivationsSource,
    ActivationFactoryConfig,
    ActivationFactoryDatasetSource,
    ActivationFactoryTarget,
)
from lm_saes.config.generation import ActivationWriterConfig
from tests.activations.fake import HOOKS, FakeLanguageModel

ONE, TWO = ActivationFactoryTarget.ACTIVATIONS_1D, ActivationFactoryTarget.ACTIVATIONS_2D
TEXTS = [f"document {index}: the quick fox number {index * 7} jumps over {index} lazy dogs and goes home again" for index in range(40)]
CONTEXT = 16


def text_stream(model: FakeLanguageModel | None = None, texts: list[str] | None = None, seed: int = 3, **fields: Any) -> ActivationStream:
    """Sequences, as a cache is written from."""
    cfg = ActivationFactoryConfig(
        **{  # pyright: ignore[reportArgumentType]
            "sources": [ActivationFactoryDatasetSource(name="text")], "target": TWO, "hook_points": HOOKS, "batch_size": 4, "context_size": CONTEXT,
            "model_batch_size": 4, **fields,
        }
    )  # fmt: skip
    return ActivationFactory(cfg).process(model=model or FakeLanguageModel(), datasets={"text": texts or TEXTS}, seed=seed)


def writer(folder: Path, **fields: Any) -> ActivationWriter:
    cfg: dict[str, Any] = {"hook_points": HOOKS, "cache_dir": str(folder), "target": ONE, "n_samples_per_chunk": 300, "seed": 3, **fields}
    return ActivationWriter(ActivationWriterConfig(**cfg))


def write(folder: Path, stream: Any = None, settings: Any = None, **fields: Any) -> Manifest:
    manifest = writer(folder, **fields).process(stream or text_stream(), settings=settings or {"outlier_norm_factor": 10.0})
    assert manifest is not None
    return manifest


def cached(path: Any, seed: int = 0, model: Any = None, interceptor: Any = None, source: Any = None, **fields: Any) -> ActivationStream:
    """The stream of a training from a cache."""
    cfg = ActivationFactoryConfig(
        **{  # pyright: ignore[reportArgumentType]
            "sources": [ActivationFactoryActivationsSource(name="cache", path=path if isinstance(path, dict) else str(path), **(source or {}))],
            "hook_points": HOOKS, "batch_size": 64, "buffer_size": 512, **fields,
        }
    )  # fmt: skip
    return ActivationFactory(cfg, interceptor).process(model=model, seed=seed)
