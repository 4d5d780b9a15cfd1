"""Reading: resumed at any batch, with any number of threads; mixed, filtered, refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_saes.activations import writer as writer_module
from lm_saes.activations.factory import ActivationFactory, ActivationStream
from lm_saes.config import ActivationFactoryActivationsSource, ActivationFactoryConfig
from lm_saes.errors import CacheError, ConfigError, DataError, HookPointError
from tests.activations.caches import CONTEXT, ONE, TWO, cached, text_stream, write
from tests.activations.fake import HOOKS, FakeLanguageModel


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 2000)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """One of single activations, one of sequences."""
    folder = tmp_path_factory.mktemp("caches")
    original, writer_module.GROUP_BYTES = writer_module.GROUP_BYTES, 2000
    for target in (ONE, TWO):
        write(folder / target.value, target=target, dtype="float16", n_samples_per_chunk=300 if target is ONE else 20)
    writer_module.GROUP_BYTES = original
    return {target: folder / target.value for target in (ONE, TWO)}


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint brings it back."""
    tensors = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
    return {**json.loads(json.dumps({key: value for key, value in state.items() if key not in tensors})), **tensors}


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) if isinstance(a[key], Tensor) else a[key] == b[key] for key in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("written", [ONE, TWO], ids=lambda target: f"from {target.value}")
@pytest.mark.parametrize("read", [ONE, TWO], ids=lambda target: f"as {target.value}")
def test_resumed_after_any_batch_the_rest_is_the_same(caches, written, read) -> None:
    if written is ONE and read is TWO:
        pytest.skip("contexts are gone")
    fields = {"target": read, "batch_size": 64 if read is ONE else 5, "buffer_size": 512 if read is ONE else 40}
    whole = list(cached(caches[written], **fields))
    for stop in random.Random(0).sample(range(len(whole) + 1), 8):
        stream = cached(caches[written], **fields, source={"num_workers": stop % 3})
        assert same([next(stream) for _ in range(stop)], whole[:stop])
        resumed = cached(caches[written], **fields, source={"num_workers": (stop + 1) % 3, "prefetch": 2})
        list(zip(range(3), resumed, strict=False))  # a stream that has been used is set back as well
        resumed.load_state_dict(through_files(stream.state_dict()))
        assert same(list(resumed), whole[stop:])
        assert resumed.counts() == {**resumed.counts(), "kept": 3145, "ended": True}


def test_each_seed_has_an_order_of_its_own_and_without_a_buffer_it_is_that_of_the_disk(caches) -> None:
    def tokens(**fields: Any) -> Tensor:
        return torch.cat([batch["tokens"] for batch in cached(caches[ONE], batch_size=1, **fields)])

    first, again, other = (tokens(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort().values, other.sort().values)
    on_disk = tokens(buffer_size=None)
    assert torch.equal(on_disk, tokens(buffer_size=None, seed=1))
    assert torch.equal(on_disk.sort().values, first.sort().values)


def test_caches_mix_by_weight(tmp_path: Path) -> None:
    model = FakeLanguageModel()
    model.embedding = model.embedding + 10
    write(tmp_path / "low")
    write(tmp_path / "high", text_stream(model))
    sources = [
        ActivationFactoryActivationsSource(name="low", path=str(tmp_path / "low"), sample_weights=3.0),
        ActivationFactoryActivationsSource(name="high", path=str(tmp_path / "high"), sample_weights=1.0),
    ]
    stream = ActivationFactory(ActivationFactoryConfig(sources=sources, hook_points=HOOKS[:1], batch_size=100, buffer_size=400)).process()
    shares = []
    for _ in range(30):
        batch = next(stream)
        shares.append(float((batch[HOOKS[0]].mean(1) > 5).float().mean()))
    assert abs(sum(shares) / 30 - 0.25) < 0.04
    stream = ActivationFactory(ActivationFactoryConfig(sources=sources, hook_points=HOOKS[:1], batch_size=1)).process()
    assert sum(len(batch["tokens"]) for batch in stream) == 2 * 3145
    assert "used up: low, high" in stream.description()


def test_a_cache_that_changed_is_not_resumed_from(caches, tmp_path: Path) -> None:
    state = through_files(cached(caches[ONE]).state_dict())
    write(tmp_path, text_stream(seed=4))
    with pytest.raises(DataError, match="the activations on disk have changed: 3145 samples"):
        cached(tmp_path).load_state_dict(state)
    with pytest.raises(ConfigError, match="the saved stream had batch_size = 64, this one has 65; resume with the settings of the run"):
        cached(caches[ONE], batch_size=65).load_state_dict(state)


def test_a_cache_that_was_moved_is(caches, tmp_path: Path) -> None:
    stream = cached(caches[ONE])
    next(stream)
    (tmp_path / "elsewhere").symlink_to(caches[ONE])
    moved = cached(tmp_path / "elsewhere")
    moved.load_state_dict(through_files(stream.state_dict()))
    assert same(list(moved), list(stream))


def test_ignored_tokens_are_dropped_and_counted(caches) -> None:
    stream = cached(caches[TWO], ignore_token_ids=[ord(" "), ord("o")], batch_size=1)
    tokens = torch.cat([batch["tokens"] for batch in stream])
    assert not {ord(" "), ord("o")} & set(tokens.tolist())
    counts = stream.counts()
    assert counts["tokens"] == counts["kept"] + sum(counts["dropped"].values())
    assert counts["dropped"]["ignored"] == 3145 - counts["kept"] > 0
    assert "tokens of ignore_token_ids" in stream.description()


@pytest.mark.parametrize("target", [ONE, TWO], ids=lambda target: target.value)
def test_outliers_are_dropped_where_the_cache_was_written_with_them(tmp_path: Path, target) -> None:
    model = FakeLanguageModel()
    model.scale[ord("q")] = 1000.0
    outliers = sum(int((batch["tokens"][batch["mask"]] == ord("q")).sum()) for batch in text_stream())
    write(
        tmp_path / "all",
        text_stream(model, outlier_norm_factor=0),
        settings={"outlier_norm_factor": 0.0},
        target=target,
        n_samples_per_chunk=400 if target is ONE else 30,
    )
    stream = cached(tmp_path / "all", batch_size=1)
    assert ord("q") not in torch.cat([batch["tokens"] for batch in stream]).tolist()
    assert stream.counts()["dropped"]["outlier"] == outliers > 0
    stream = cached(tmp_path / "all", batch_size=1, outlier_norm_factor=0)
    assert stream.counts()["dropped"]["outlier"] == 0 < sum(batch["tokens"].eq(ord("q")).sum() for batch in stream)


def test_the_interceptor_sees_sequences(caches) -> None:
    def only_first_half(batch: dict[str, Any], source: int) -> dict[str, Any]:
        assert source == 0
        return {**batch, "mask": batch["mask"] & (torch.arange(CONTEXT) < CONTEXT // 2)}

    stream = cached(caches[TWO], interceptor=only_first_half, batch_size=1)
    n = sum(len(batch["tokens"]) for batch in stream)
    assert 0 < n == 3145 - stream.counts()["dropped"]["interceptor"] < 3145


def test_data_types_on_reading(caches) -> None:
    assert next(cached(caches[ONE]))[HOOKS[0]].dtype is torch.float16
    assert next(cached(caches[ONE], source={"dtype": "float32"}))[HOOKS[0]].dtype is torch.float32
    assert next(cached(caches[ONE], override_dtype="bfloat16"))[HOOKS[0]].dtype is torch.bfloat16


def test_a_model_that_is_another_one(caches, tmp_path: Path) -> None:
    class Wider(FakeLanguageModel):
        def hook_width(self, hook_point: str) -> int:
            return super().hook_width(hook_point) + 1

    class OtherTokenizer(FakeLanguageModel):
        def provenance(self) -> dict[str, Any]:
            return {"model_name": "fake", "tokenizer_hash": "b"}

    assert next(cached(caches[ONE], model=FakeLanguageModel()))["tokens"].shape == (64,)
    with pytest.raises(HookPointError, match="it comes from another model"):
        cached(caches[ONE], model=Wider())
    from tests.activations.caches import writer

    writer(tmp_path).process(text_stream(), provenance={"model_identity": {"tokenizer_hash": "a"}})
    with pytest.raises(ConfigError, match="was written with another tokenizer"):
        cached(tmp_path, model=OtherTokenizer())


def test_sources_that_do_not_match(caches, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has contexts of 16 positions, got context_size = 32; leave it out"):
        cached(caches[ONE], context_size=32)
    write(tmp_path / "narrow", ({HOOKS[0]: part} for part in torch.randn(50, 3).split(9)), hook_points=HOOKS[:1])
    sources = [ActivationFactoryActivationsSource(name=name, path=str(path)) for name, path in (("a", caches[ONE]), ("b", tmp_path / "narrow"))]
    with pytest.raises(HookPointError, match="source 'b' has the widths"):
        ActivationFactory(ActivationFactoryConfig(sources=sources, hook_points=HOOKS[:1], batch_size=4)).process()
    with pytest.raises(CacheError, match=r"the activations on disk have no hook point blocks\.1"):
        cached(tmp_path / "narrow")


def test_the_read_ahead_is_bounded(caches, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_saes.activations.cache import ActivationCache
    from lm_saes.activations.cache_streams import StoredSamples

    cache, read = ActivationCache(caches[ONE]), []
    monkeypatch.setattr(cache, "read", lambda group, hooks, origin: read.append(group) or ActivationCache.read(cache, group, hooks, origin=origin))
    samples = StoredSamples(cache, HOOKS, seed=0, workers=2, ahead=3)
    next(samples)
    assert isinstance(samples, StoredSamples)
    assert len(read) <= 6 < cache.n_groups


def test_a_stream_is_a_stream_of_the_factory(caches) -> None:
    stream = cached(caches[ONE])
    assert isinstance(stream, ActivationStream)
    assert (stream.context_size, stream.hook_widths) == (CONTEXT, dict.fromkeys(HOOKS, 6))
    with pytest.raises(DataError, match="ended before one batch of 4000 was full"):
        next(cached(caches[ONE], batch_size=4000, buffer_size=4000))
