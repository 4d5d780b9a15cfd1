"""From configuration to batches: the whole stack, resumed at any point, and every refusal."""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm_saes.activations.factory import ActivationFactory, ActivationStream
from lm_saes.config import (
    ActivationFactoryActivationsSource,
    ActivationFactoryConfig,
    ActivationFactoryDatasetSource,
    ActivationFactoryTarget,
    BufferShuffleConfig,
    DatasetConfig,
)
from lm_saes.errors import ConfigError, DataError, HookPointError
from tests.activations.fake import BOS, EOS, HOOKS, FakeLanguageModel

Target = ActivationFactoryTarget
TEXTS = {
    "prose": [
        f"the {word} fox jumps over {index} lazy dogs and goes home" for index, word in enumerate(["quick", "red", "grey", "old", "young", "wild"])
    ],
    "code": ["def f(x):\n    return x\n" * 3, "", "import this\n", "for i in range(9): print(i)\n" * 2],
}


def config(**fields: Any) -> ActivationFactoryConfig:
    sources = [source("prose", sample_weights=2.0), source("code")]
    defaults = {"sources": sources, "hook_points": HOOKS, "batch_size": 5, "context_size": 8, "model_batch_size": 2, "buffer_size": 20}
    return ActivationFactoryConfig(**{**defaults, **fields})


def source(name: str, **fields: Any) -> ActivationFactoryDatasetSource:
    return ActivationFactoryDatasetSource(name=name, **fields)


def open_stream(seed: int = 0, model: FakeLanguageModel | None = None, datasets: Any = TEXTS, **fields: Any) -> ActivationStream:
    return ActivationFactory(config(**fields)).process(model=model or FakeLanguageModel(), datasets=datasets, seed=seed)


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint would bring it back: tensors as tensors, everything else through JSON."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return {
        **json.loads(json.dumps({key: value for key, value in state.items() if key not in tensors})),
        **{key: value.clone() for key, value in tensors.items()},
    }


def same(one: list[Any], other: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b

    return len(one) == len(other) and all(a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------------------------------------- batches


def test_1d_batches_hold_the_activations_of_their_tokens() -> None:
    model = FakeLanguageModel()
    batches = list(open_stream(model=model))
    for batch in batches:
        assert set(batch) == {*HOOKS, "tokens", "mask"}
        assert batch[HOOKS[0]].shape == (5, 6)
        assert bool(batch["mask"].all())
        assert torch.equal(batch[HOOKS[0]], model.embedding[batch["tokens"]])
    assert not {BOS, EOS} & {token for batch in batches for token in batch["tokens"].tolist()}


def test_the_shuffled_stream_holds_what_the_unshuffled_one_holds() -> None:
    shuffled, plain = (
        sorted(tuple(row) for batch in open_stream(batch_size=1, buffer_size=buffer_size) for row in batch[HOOKS[1]].tolist())
        for buffer_size in (30, None)
    )
    assert shuffled == plain
    assert shuffled


@pytest.mark.parametrize("buffer_size", [None, 6])
@pytest.mark.parametrize("target", [Target.ACTIVATIONS_2D, Target.TOKENS])
def test_2d_batches_are_sequences_with_their_sources(target: ActivationFactoryTarget, buffer_size: int | None) -> None:
    model = FakeLanguageModel()
    stream = open_stream(
        model=model, target=target, batch_size=3, buffer_size=buffer_size, datasets={**TEXTS, "code": (TEXTS["code"], {"shard_idx": 0})}
    )
    batches = list(stream)
    names = set()
    for batch in batches:
        assert batch["tokens"].shape == batch["mask"].shape == (3, 8)
        assert len(batch["meta"]) == 3
        for ids, meta in zip(batch["tokens"], batch["meta"], strict=True):
            names.add(meta["dataset_name"])
            assert (meta.get("shard_idx") == 0) == (meta["dataset_name"] == "code")
            for name, start, end in meta["spans"]:
                dataset, index = name[:-1].split("[")
                assert dataset == meta["dataset_name"]
                assert bytes(ids[start:end].tolist()).decode() in TEXTS[dataset][int(index)]
        if target is Target.ACTIVATIONS_2D:
            assert torch.equal(batch[HOOKS[0]], model.embedding[batch["tokens"]])
    assert names == {"prose", "code"}
    assert bool(model.calls) == (target is Target.ACTIVATIONS_2D)
    assert stream.hook_widths == ({hook: 6 for hook in HOOKS} if target is Target.ACTIVATIONS_2D else {})


def test_override_dtype_reaches_the_batches() -> None:
    assert next(open_stream(override_dtype="bfloat16"))[HOOKS[0]].dtype == torch.bfloat16


def test_packing_can_be_switched_off() -> None:
    fields: dict[str, Any] = {"target": Target.TOKENS, "batch_size": 1, "buffer_size": None, "context_size": 50}
    packed, separate = (list(open_stream(packing=packing, **fields)) for packing in (True, False))
    assert all(bool(batch["attention_mask"].all()) for batch in packed)
    assert len(separate) == 9  # documents with text
    assert not all(bool(batch["attention_mask"].all()) for batch in separate)


def test_an_ended_stream_is_ended_when_loaded() -> None:
    stream, loaded = open_stream(), open_stream()
    assert list(stream)
    loaded.load_state_dict(through_files(stream.state_dict()))
    assert loaded.ended
    assert list(loaded) == []


def test_model_name_is_recorded() -> None:
    stream = ActivationFactory(config(target=Target.TOKENS, batch_size=1, buffer_size=None)).process(FakeLanguageModel(), "my-model", TEXTS)
    assert next(stream)["meta"][0]["model_name"] == "my-model"


# ---------------------------------------------------------------------------------------------- resuming


@given(
    target=st.sampled_from(list(Target)), buffer=st.sampled_from([None, 7, 20, 60]), packing=st.booleans(), causal=st.booleans(),
    bfloat=st.booleans(), cut=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_resumed_equals_uninterrupted(target: Any, buffer: int | None, packing: bool, causal: bool, bfloat: bool, cut: int) -> None:
    def make() -> ActivationStream:
        model = FakeLanguageModel(causal=causal)
        model.scale[ord("o")] = 40.0  # outliers, so that the filter's memory matters
        dtype = {"override_dtype": "bfloat16"} if bfloat and target is not Target.TOKENS else {}
        fields: dict[str, Any] = {"target": target, "packing": packing, "buffer_size": buffer, "batch_size": 3, "outlier_norm_factor": 10.0, **dtype}
        if target is Target.TOKENS:
            del fields["outlier_norm_factor"]
        return open_stream(model=model, **fields)

    n_batches = len(list(make()))
    whole = make()
    for _ in range(cut % (n_batches + 1)):
        next(whole)
    state = through_files(whole.state_dict())
    rest = list(whole)
    resumed = make()
    resumed.load_state_dict(state)
    assert same(list(resumed), rest)
    assert resumed.counts() == whole.counts()
    assert resumed.ended == whole.ended is True


def test_resuming_twice_and_in_the_middle_of_a_long_document() -> None:
    datasets = {"prose": ["line of text\n" * 50], "code": ["x = 1\n" * 40]}
    whole, stream = open_stream(datasets=datasets), open_stream(datasets=datasets)
    generator = random.Random(0)
    for batch in whole:
        assert same([next(stream)], [batch])
        if generator.random() < 0.4:
            state = through_files(stream.state_dict())
            stream = open_stream(datasets=datasets)
            stream.load_state_dict(state)
    assert list(stream) == []


def test_a_state_of_other_settings_is_refused() -> None:
    state = open_stream().state_dict()
    others: list[tuple[dict[str, Any], str]] = [({"context_size": 9}, "context_size"), ({"packing": False}, "packing"), ({"seed": 1}, "seed")]
    for fields, name in others:
        with pytest.raises(ConfigError, match=f"the saved stream had {name} = "):
            open_stream(**fields).load_state_dict(state)


# ---------------------------------------------------------------------------------------------- seeds


def orders(**fields: Any) -> list[list[int]]:
    return [batch["tokens"].tolist() for batch in open_stream(**fields)]


def test_one_seed_one_stream() -> None:
    assert orders(seed=3) == orders(seed=3) != orders(seed=4)
    assert orders(seed=3, buffer_size=None) != orders(seed=4, buffer_size=None)  # the order of the documents


def test_perm_seed_replaces_the_seed_in_the_buffer_only() -> None:
    perm: dict[str, Any] = {"buffer_shuffle": BufferShuffleConfig(perm_seed=9)}
    assert orders(seed=0, **perm) != orders(seed=0)
    assert orders(seed=0, **perm) != orders(seed=0, buffer_shuffle=BufferShuffleConfig(perm_seed=8))
    one = [source("prose")]
    assert orders(seed=9, sources=one) == orders(seed=9, sources=one, **perm)


# ---------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("swapped", [False, True])
def test_weights_stay_with_their_names_in_either_order(swapped: bool) -> None:
    sources = [source("a", sample_weights=0.9), source("b", sample_weights=0.1)]
    datasets = {"b": ["b" * 7000], "a": ["a" * 7000]}
    stream = open_stream(sources=sources[::-1] if swapped else sources, datasets=datasets, buffer_size=None, batch_size=7)
    tokens = [token for _, batch in zip(range(500), stream, strict=False) for token in batch["tokens"].tolist()]
    assert tokens.count(ord("a")) / len(tokens) == pytest.approx(0.9, abs=0.01)  # a row of 7 in 3,500 tokens, twice


def test_prepend_bos_of_a_source_overrides_that_of_the_model() -> None:
    for model_says, source_says, expected in ((True, None, True), (False, None, False), (True, False, False), (False, True, True)):
        sources = [source("prose", prepend_bos=source_says)]
        stream = open_stream(model=FakeLanguageModel(prepend_bos=model_says), sources=sources, target=Target.TOKENS, batch_size=1, buffer_size=None)
        assert (next(stream)["tokens"][0, 0].item() == BOS) == expected


def test_the_interceptor_gets_batches_of_one_source_with_its_number() -> None:
    seen: list[tuple[int, str]] = []

    def interceptor(batch: dict[str, Any], source: int) -> dict[str, Any]:
        seen.extend((source, row["dataset_name"]) for row in batch["meta"])
        return batch

    list(ActivationFactory(config(), interceptor).process(FakeLanguageModel(), datasets=TEXTS))
    assert set(seen) == {(0, "prose"), (1, "code")}


# ---------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("target", list(Target))
def test_every_token_is_accounted_for(target: ActivationFactoryTarget, packing: bool, causal: bool) -> None:
    model = FakeLanguageModel(causal=causal)
    model.scale[ord("o")] = 40.0
    stream = open_stream(model=model, target=target, packing=packing, batch_size=4)
    batches = list(stream)
    counts = stream.counts()
    assert counts["tokens"] == counts["kept"] + sum(counts["dropped"].values())
    n_text = sum(len(text) for texts in TEXTS.values() for text in texts)
    added = counts["dropped"]["special"]
    if not (packing and causal):  # packed: a separator at the end may be in the partial row
        assert counts["tokens"] - added == n_text
    assert n_text <= counts["tokens"] - added <= n_text + 8
    assert (counts["documents"], counts["empty_documents"]) == (10, 1)
    assert counts["dropped"]["outlier"] == (
        0 if target is Target.TOKENS else sum(text.count("o") for texts in TEXTS.values() for text in texts) - lost(stream)
    )
    if target is Target.ACTIVATIONS_1D:
        assert counts["delivered"] + counts["remainder"] == counts["kept"]
        assert counts["delivered"] == 4 * len(batches)
    for name, own in counts["sources"].items():
        assert own["tokens"] == own["kept"] + sum(own["dropped"].values())
        assert own["documents"] == len(TEXTS[name])
    assert counts["ended"]
    assert json.loads(json.dumps(counts)) == counts


def lost(stream: ActivationStream) -> int:
    """How many "o" stood in text that never reached a row: counted by reading the same rows again."""
    reread = open_stream(
        model=FakeLanguageModel(causal=stream._capture._model.is_causal), target=Target.TOKENS, packing=stream.cfg.packing, batch_size=1
    )
    read = sum(batch["tokens"].tolist()[0].count(ord("o")) for batch in reread)
    return sum(text.count("o") for texts in TEXTS.values() for text in texts) - read


def test_description_says_what_was_dropped_and_why() -> None:
    stream = open_stream(datasets={"prose": ["a" * 2100], "code": [" ", "lone \ud800 surrogate"]}, batch_size=100, buffer_size=None)
    assert stream.description() == "kept 0 of 0 tokens; 0 documents"
    list(stream)
    assert stream.description() == (
        "kept 2,114 of 2,420 tokens; dropped 302 special tokens (BOS, separators), 4 in rows that were not full; "
        "left over 14 tokens that did not fill a batch; "
        "3 documents (1 empty, 1 with invalid UTF-8, repaired); used up: prose, code"
    )


def test_an_ended_dataset_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lm_saes"):
        stream = open_stream(sources=[source("prose")])
        assert not stream.ended
        list(stream)
    assert stream.ended
    assert any("dataset 'prose' ended after" in record.getMessage() for record in caplog.records)


# ---------------------------------------------------------------------------------------------- context size and buffer


def test_context_size_is_the_models_up_to_1024() -> None:
    assert open_stream(context_size=None).context_size == 64
    assert open_stream(context_size=None, model=FakeLanguageModel(context=4096)).context_size == 1024
    assert open_stream(context_size=2048, model=FakeLanguageModel(context=4096)).context_size == 2048
    with pytest.raises(ConfigError, match="at most the model's 64, got 65"):
        open_stream(context_size=65)
    with pytest.raises(ConfigError, match="at least 3 for an encoder"):
        open_stream(context_size=2, model=FakeLanguageModel(causal=False))


def test_byte_budget_reaches_the_buffer() -> None:
    per_token = 2 * 6 * 4 + 8 + 1 + 16  # two hook points, the token, the mask, the slot and the origin
    stream = open_stream(buffer_size=1000, max_buffer_bytes=10 * per_token + 5)
    next(stream)
    assert stream._batches.capacity == 10  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="must hold one batch"):
        next(open_stream(buffer_size=1000, max_buffer_bytes=4 * per_token))


# ---------------------------------------------------------------------------------------------- refusals


def test_refusals_come_before_the_model_runs() -> None:
    model = FakeLanguageModel()
    with pytest.raises(HookPointError):
        open_stream(model=model, hook_points=["blocks.9.hook_resid_post"])
    with pytest.raises(ConfigError, match=r"source 'code' has no dataset; did you mean 'codes'\? \(datasets: prose, codes\)"):
        open_stream(model=model, datasets={"prose": ["a"], "codes": ["b"]})
    with pytest.raises(DataError, match="no file at"):
        open_stream(model=model, datasets={**TEXTS, "code": DatasetConfig(dataset_name_or_path="absent.txt")})
    with pytest.raises(DataError, match="dataset 'code' holds no documents"):
        open_stream(model=model, datasets={**TEXTS, "code": []})
    assert model.calls == []


def test_text_that_fills_no_batch_is_an_error_that_says_what_there_was() -> None:
    stream = open_stream(datasets={"prose": ["abcdefg"], "code": [" "]}, batch_size=8)
    with pytest.raises(DataError, match=r"before one batch of 8 was full \(kept 7 of 8 tokens; .*1 empty.*\); use more text or a smaller batch_size"):
        next(stream)


def test_what_this_version_does_not_do() -> None:
    with pytest.raises(ConfigError, match="sources must be all text or all activations on disk"):
        ActivationFactory(config(sources=[source("prose"), ActivationFactoryActivationsSource(name="cache", path="somewhere")]))
    with pytest.raises(ConfigError, match="device_mesh must be None"):
        ActivationFactory(config(), device_mesh=object())
    with pytest.raises(ConfigError, match="pass model="):
        ActivationFactory(config()).process(datasets=TEXTS)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_workers": 0}, r"num_workers \(tokenising"),
        ({"buffer_size": None, "max_buffer_bytes": 10}, r"max_buffer_bytes \(there is no buffer"),
        ({"buffer_size": None, "buffer_shuffle": BufferShuffleConfig()}, r"buffer_shuffle \(there is no buffer"),
        ({"target": Target.TOKENS, "override_dtype": "float16"}, r"override_dtype \(the target is tokens"),
    ],
)
def test_settings_without_effect_warn_once(fields: dict[str, Any], said: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        factory = ActivationFactory(config(**fields))
        factory.process(FakeLanguageModel(), datasets=TEXTS)
    assert len(caught) == 1
    assert re.search(said, str(caught[0].message))


# ---------------------------------------------------------------------------------------------- reading ahead


@pytest.mark.parametrize("buffer_size", [None, 20])
@pytest.mark.parametrize("target", [Target.ACTIVATIONS_1D, Target.ACTIVATIONS_2D, Target.TOKENS])
def test_reading_ahead_changes_nothing_and_a_run_may_be_resumed_with_or_without_it(target: Target, buffer_size: int | None) -> None:
    fields = {"target": target, "buffer_size": buffer_size, "batch_size": 3}
    whole = list(open_stream(prefetch=0, **fields))
    for depth, other in [(2, 0), (0, 2), (2, 3)]:
        stream = open_stream(prefetch=depth, **fields)
        assert same([next(stream) for _ in range(4)], whole[:4])
        state = through_files(stream.state_dict())
        delivered = stream.counts()["delivered"]
        assert delivered == 4 * 3
        resumed = open_stream(prefetch=other, **fields)
        resumed.load_state_dict(state)
        assert same(list(resumed), whole[4:])
        assert same(list(stream), whole[4:])
        assert resumed.counts() == stream.counts() == {**open_to_the_end(**fields), "ended": True}


def open_to_the_end(**fields: Any) -> dict[str, Any]:
    stream = open_stream(**fields)
    list(stream)
    return stream.counts()


def test_the_thread_works_while_the_batch_is_used_and_close_ends_it() -> None:
    model = FakeLanguageModel()
    stream = open_stream(model=model, prefetch=2)
    before = threading.active_count()
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    assert open_stream().cfg.prefetch is None
    quiet = open_stream()
    next(quiet)
    assert threading.active_count() == before  # nothing is read ahead on a CPU unless one asks for it
