"""From text to batches of activations. The way of a token through this room:

1. `text.py` finds the documents of each source; `documents.py` goes through them once, in an order drawn from the seed.
2. `tokens.py` tokenises them and makes rows of `context_size` tokens, `model_batch_size` rows at a time: packed, or a document each.
3. `mix.py` takes rows from the source that is furthest behind its share of the tokens.
4. `capture.py` runs the language model on the rows, up to the deepest hook point, and sets the mask: no padding, no special tokens, no
   outliers. The interceptor, if there is one, sees each of these batches with the number of its source. Target `TOKENS` skips the model.
5. Target `ACTIVATIONS_1D`: the positions of the mask are taken out of their contexts.
6. `shuffle.py` mixes them in a buffer and cuts batches of `batch_size`: tokens for `ACTIVATIONS_1D`, whole sequences otherwise.
7. `prefetch.py` does all this in a thread, `prefetch` batches ahead of whoever asks, or at once where that is 0.

Each step is a stream with a state; `ActivationStream` is the last of them and knows the others, so it can say what was dropped and why.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from lm_saes.activations.capture import ActivationCapture, Batch, Interceptor, KeptPositions
from lm_saes.activations.documents import Documents, DocumentStream
from lm_saes.activations.mix import Mix, Source
from lm_saes.activations.prefetch import Prefetch, automatic_depth
from lm_saes.activations.shuffle import Rebatch, ShuffleBuffer
from lm_saes.activations.stream import State, nested, part
from lm_saes.activations.text import as_documents
from lm_saes.activations.tokens import TokenRows, token_rows
from lm_saes.config import (
    ActivationFactoryActivationsSource,
    ActivationFactoryConfig,
    ActivationFactoryDatasetSource,
    ActivationFactoryTarget,
    DatasetConfig,
)
from lm_saes.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from lm_saes.lm.language_model import LanguageModel

LONGEST_DEFAULT_CONTEXT = 1024


class ActivationFactory:
    """Makes activation streams as `cfg` describes them.

    `before_aggregation_interceptor(batch, source)` gets each 2D batch (see `docs/architecture.md`), all of one source, with the position of
    that source in `cfg.sources`, and returns the batch that goes on; it may change the mask.
    Raises `ConfigError` for what this version cannot do, and warns once about settings that have no effect.
    """

    def __init__(
        self, cfg: ActivationFactoryConfig, before_aggregation_interceptor: Interceptor | None = None, device_mesh: object | None = None
    ) -> None:
        if device_mesh is not None:
            raise ConfigError("device_mesh must be None: activations are not sharded over devices in this version")
        self._from_disk = any(isinstance(source, ActivationFactoryActivationsSource) for source in cfg.sources)
        if self._from_disk and any(isinstance(source, ActivationFactoryDatasetSource) for source in cfg.sources):
            raise ConfigError("sources must be all text or all activations on disk; write the text's activations to disk first (lm-saes generate)")
        self.cfg = cfg
        self._interceptor = before_aggregation_interceptor
        if without_effect := _fields_without_effect(cfg):
            warnings.warn(f"without effect in this activation factory: {'; '.join(without_effect)}", stacklevel=2)

    def process(
        self, model: LanguageModel | None = None, model_name: str | None = None, datasets: Mapping[str, Any] | None = None, seed: int = 0
    ) -> ActivationStream:
        """A new stream from the beginning of the text, or of the activations on disk, which need no `model` and no `datasets`.

        `datasets` holds for each source's name a `DatasetConfig`, a list of texts, a `datasets.Dataset` (or `IterableDataset`), or a pair of
        one of these and a dict of metadata; a source named "demo" needs no entry. `seed` orders the documents, and shuffles if
        `cfg.buffer_shuffle` gives no seed of its own. `model_name` is recorded in the meta.
        Raises `ConfigError`, `HookPointError` or `DataError` before the language model runs.
        """
        cfg = self.cfg
        if self._from_disk:
            from lm_saes.activations.cache_read import cached_stream  # whose streams are kinds of those below

            return cached_stream(cfg, model, seed, self._interceptor)
        if model is None:
            raise ConfigError("text needs a language model to be tokenised and read: pass model=load_model(LanguageModelConfig(...))")
        captures = cfg.target is not ActivationFactoryTarget.TOKENS
        widths = {hook: model.hook_width(hook) for hook in cfg.hook_points} if captures else {}
        context_size = _context_size(cfg, model)
        rows = [self._rows(source, model, model_name, datasets or {}, context_size, seed) for source in cfg.sources]
        mix = Mix([Source(source.name, source.sample_weights, stream) for source, stream in zip(cfg.sources, rows, strict=True)])
        capture = ActivationCapture(
            mix,
            model,
            list(widths),
            ignore_token_ids=cfg.ignore_token_ids,
            outlier_norm_factor=cfg.outlier_norm_factor,
            dtype=cfg.override_dtype,  # pyright: ignore[reportArgumentType]  # a torch.dtype when it is read
            interceptor=self._interceptor,
        )
        items = KeptPositions(capture, list(widths)) if cfg.target is ActivationFactoryTarget.ACTIVATIONS_1D else capture
        if cfg.buffer_size is None:
            batches = Rebatch(items, cfg.batch_size, device=model.device)
        else:
            buffer_seed = seed if cfg.buffer_shuffle is None else cfg.buffer_shuffle.perm_seed
            batches = ShuffleBuffer(
                items,
                cfg.batch_size,
                cfg.buffer_size,
                seed=buffer_seed,
                max_bytes=cfg.max_buffer_bytes,
                device=model.device,
                repeatable=self._interceptor is None,  # which may do anything
            )
        ahead = Prefetch(batches, automatic_depth(model.device) if cfg.prefetch is None else cfg.prefetch, model.device)
        return ActivationStream(
            cfg,
            ahead,
            batches,
            capture,
            mix,
            rows,
            context_size=context_size,
            hook_widths=widths,
            seed=seed,
            tokenizer=model.provenance().get("tokenizer_hash"),
        )

    def _rows(
        self, source: Any, model: LanguageModel, model_name: str | None, datasets: Mapping[str, Any], context_size: int, seed: int
    ) -> TokenRows:
        dataset = datasets.get(source.name)
        if dataset is None:
            if source.name != "demo":
                near = did_you_mean(source.name, datasets)
                raise ConfigError(f"source '{source.name}' has no dataset{near} (datasets: {', '.join(datasets) or 'none'}); pass it in datasets")
            dataset = DatasetConfig(dataset_name_or_path="demo")
        documents, metadata = as_documents(source.name, dataset, source.is_dataset_tokenized)
        if isinstance(documents, Documents) and len(documents) == 0:
            raise DataError(f"dataset '{source.name}' holds no documents")
        own_seed = zlib.crc32(f"{seed} {source.name}".encode())  # 32 bits, all that torch's CPU generator uses; sources do not depend on each other
        return token_rows(
            DocumentStream(documents, own_seed),
            model,
            context_size=context_size,
            rows_per_item=self.cfg.model_batch_size,
            packing=self.cfg.packing,
            prepend_bos=model.cfg.prepend_bos if source.prepend_bos is None else source.prepend_bos,
            meta={**metadata, "dataset_name": source.name, **({} if model_name is None else {"model_name": model_name})},
        )


class ActivationStream:
    """Batches as `docs/architecture.md` describes them, each with `cfg.batch_size` tokens or sequences; a shorter rest at the end is dropped.

    `context_size`; `hook_widths` (width of each hook point); `ended`: the text is used up and the last batch was given out.
    """

    def __init__(
        self,
        cfg: ActivationFactoryConfig,
        ahead: Prefetch,
        batches: Rebatch | ShuffleBuffer,
        capture: ActivationCapture,
        mix: Mix,
        rows: list[TokenRows],
        *,
        context_size: int,
        hook_widths: dict[str, int],
        seed: int,
        tokenizer: str | None = None,
    ) -> None:
        self.cfg, self.context_size, self.hook_widths = cfg, context_size, hook_widths
        self.ended = False
        self._ahead, self._batches, self._capture, self._mix, self._rows = ahead, batches, capture, mix, rows
        decisive = cfg.model_dump(mode="json", exclude={"context_size", "num_workers", "prefetch"})
        self._settings = {"seed": seed, "context_size": context_size, "tokenizer_hash": tokenizer, **decisive}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises `DataError` where the text does not fill even one."""
        try:
            return next(self._ahead)
        except StopIteration:
            self.ended = True
            if self._batches.delivered == 0:
                raise DataError(
                    f"the text ended before one batch of {self.cfg.batch_size} was full ({self.description()}); use more text or a smaller batch_size"
                ) from None
            raise

    def close(self) -> None:
        """End the thread that reads ahead, if there is one. Nothing is lost; the next batch that is asked for starts it again."""
        self._ahead.close()

    def state_dict(self) -> State:
        """Everything that decides which batches come next: the buffer's content, or where it comes from, included."""
        return {"settings": self._settings, "ended": self.ended, **nested("batches", self._ahead.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream was that gave `state`. Raises `ConfigError` if it had other settings, `DataError` if the text has changed."""
        saved = state["settings"]
        for name, value in self._settings.items():
            if saved.get(name) != value:
                raise ConfigError(f"the saved stream had {name} = {saved.get(name)!r}, this one has {value!r}; resume with the settings of the run")
        self.ended = state["ended"]
        self._ahead.load_state_dict(part("batches", state))

    def counts(self) -> dict[str, Any]:
        """What has been read (also ahead of the batches that were given out), kept and dropped so far.

        `documents` (read), `empty_documents`, `invalid_utf8_documents`; `tokens` = `kept` + the sum of `dropped`, whose reasons are `special`,
        `ignored`, `outlier`, `interceptor` (read by the language model, not kept), `partial_row` and `cut` (not read); `padding`
        (positions without a token); `ended`; `sources`: the same for each source. For the whole stream also `delivered` and `remainder`:
        tokens (activations-1d) or sequences given out, and dropped at the end because they did not fill a batch.
        """
        with self._ahead.paused():
            sources = {
                source.name: _source_counts(rows, counts, ended)
                for source, rows, counts, ended in zip(self._mix.sources, self._rows, self._capture.counts, self._mix.ended, strict=True)
            }
            delivered = self._batches.delivered - self._ahead.ahead * self.cfg.batch_size
        total: dict[str, Any] = {"ended": self.ended}
        for counts in sources.values():
            for key, value in counts.items():
                if isinstance(value, dict):
                    total[key] = {reason: total.get(key, {}).get(reason, 0) + number for reason, number in value.items()}
                elif key != "ended":
                    total[key] = total.get(key, 0) + value
        return {**total, "delivered": delivered, "remainder": self._batches.remainder if self.ended else 0, "sources": sources}

    def description(self) -> str:
        """What was kept, what was dropped and why, and which datasets ended, in one line."""
        counts = self.counts()
        words = {
            "special": "special tokens (BOS, separators)", "ignored": "tokens of ignore_token_ids", "outlier": "outliers by norm",
            "interceptor": "by the interceptor", "partial_row": "in rows that were not full", "cut": "beyond the context",
        }  # fmt: skip
        dropped = [f"{counts['dropped'][reason]:,} {text}" for reason, text in words.items() if counts["dropped"][reason]]
        parts = [f"kept {counts['kept']:,} of {counts['tokens']:,} tokens"]
        if dropped:
            parts.append(f"dropped {', '.join(dropped)}")
        if counts["remainder"]:
            unit = "tokens" if self.cfg.target is ActivationFactoryTarget.ACTIVATIONS_1D else "sequences"
            parts.append(f"left over {counts['remainder']:,} {unit} that did not fill a batch")
        passed_over = [f"{counts[f'{kind}_documents']:,} {text}" for kind, text in (("empty", "empty"), ("invalid_utf8", "with invalid UTF-8, repaired"))
                       if counts[f"{kind}_documents"]]  # fmt: skip
        parts.append(f"{counts['documents']:,} documents" + (f" ({', '.join(passed_over)})" if passed_over else ""))
        if ended := [name for name, source in counts["sources"].items() if source["ended"]]:
            parts.append(f"used up: {', '.join(ended)}")
        return "; ".join(parts)


def _source_counts(rows: TokenRows, counts: Mapping[str, int], ended: bool) -> dict[str, Any]:
    dropped = {reason: counts[reason] for reason in ("special", "ignored", "outlier", "interceptor")} | rows.counts
    tokens = counts["kept"] + sum(dropped.values())
    return {**rows.documents.counts, "tokens": tokens, "kept": counts["kept"], "dropped": dropped, "padding": counts["padding"], "ended": ended}


def _context_size(cfg: ActivationFactoryConfig, model: LanguageModel) -> int:
    if cfg.context_size is None:
        return min(model.max_context, LONGEST_DEFAULT_CONTEXT)
    if cfg.context_size > model.max_context:
        raise ConfigError(f"context_size must be at most the model's {model.max_context}, got {cfg.context_size}; lower it or leave it out")
    if not model.is_causal and cfg.context_size < 3:
        raise ConfigError(
            f"context_size must be at least 3 for an encoder model (one token between its begin and end tokens), got {cfg.context_size}"
        )
    return cfg.context_size


def _fields_without_effect(cfg: ActivationFactoryConfig) -> list[str]:
    """Fields that were changed from their defaults and do nothing here, each with the reason."""
    reasons = {"num_workers": "tokenising is not where the time goes"}
    if cfg.buffer_size is None:
        reasons |= dict.fromkeys(("buffer_shuffle", "max_buffer_bytes"), "there is no buffer without buffer_size")
    if cfg.target is ActivationFactoryTarget.TOKENS:
        reasons |= dict.fromkeys(("override_dtype", "outlier_norm_factor"), "the target is tokens")
    changed = [name for name in reasons if getattr(cfg, name) != type(cfg).model_fields[name].default]
    return [f"{name} ({reasons[name]})" for name in changed]
