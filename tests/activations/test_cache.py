"""What is written is what is read: in each data type, as single activations and as sequences, with where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lm_saes.activations import writer as writer_module
from lm_saes.activations.cache import ActivationCache
from lm_saes.activations.cache_format import MANIFEST_FILE
from lm_saes.activations.foreign_cache import open_activations
from lm_saes.activations.stored import ORIGIN
from lm_saes.errors import CacheError, ConfigError
from tests.activations.caches import CONTEXT, ONE, TWO, cached, text_stream, write
from tests.activations.fake import HOOKS, WIDTH, FakeLanguageModel

TOLERANCE = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127}
"""Largest error of an entry, relative to the largest magnitude of its vector."""


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 1000)  # several groups in each shard


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("target", [ONE, TWO], ids=lambda target: target.value)
def test_each_kept_token_is_there_once_with_its_activation(tmp_path: Path, dtype: str, target) -> None:
    model = FakeLanguageModel()
    manifest = write(tmp_path, text_stream(model), target=target, dtype=dtype, n_samples_per_chunk=300 if target is ONE else 30)
    assert (manifest.dtype, manifest.target, manifest.hook_points) == (dtype, target.value, dict.fromkeys(HOOKS, WIDTH))
    cache = ActivationCache(tmp_path)
    assert cache.verify() == []
    wanted = torch.cat([batch["tokens"][batch["mask"]] for batch in text_stream()])
    read = [cache.read(group, HOOKS, origin=True) for group in range(cache.n_groups)]
    assert cache.n_groups > len(manifest.shards) > 1
    origins, tokens = [], []
    for samples in read:
        assert samples is not None
        kept = samples["mask"]
        tokens.append(samples["tokens"][kept])
        origins.append(samples[ORIGIN][kept])
        exact = model.embedding[samples["tokens"][kept]]
        error = (samples[HOOKS[0]][kept].float() - exact).abs().amax(1) / exact.abs().amax(1)
        assert error.max() <= TOLERANCE[dtype] * 1.001
    order = torch.cat(origins).argsort()
    assert torch.equal(torch.cat(tokens)[order], wanted)  # sorted by place, the text is in order and whole
    assert torch.cat(origins).unique().numel() == len(wanted) == manifest.tokens


def test_int8_is_about_half_of_float16_and_a_quarter_of_float32_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 2**20)

    class Wide(FakeLanguageModel):
        def hook_width(self, hook_point: str) -> int:
            return 256

        def capture(self, ids, attention_mask, hook_points):
            return {hook: values.repeat(1, 1, 43)[..., :256] for hook, values in super().capture(ids, attention_mask, hook_points).items()}

    sizes = {}
    for dtype in ("float32", "float16", "int8"):
        manifest = write(tmp_path / dtype, text_stream(Wide()), dtype=dtype, n_samples_per_chunk=10_000)
        sizes[dtype] = manifest.bytes / manifest.tokens
    assert 0.5 < sizes["int8"] / sizes["float16"] < 0.6
    assert 0.25 < sizes["int8"] / sizes["float32"] < 0.3


@pytest.mark.parametrize("target", [ONE, TWO], ids=lambda target: target.value)
def test_contexts_can_be_shown_without_the_dataset(tmp_path: Path, target) -> None:
    write(tmp_path, target=target)
    cache = ActivationCache(tmp_path)
    rows = {}  # number of the context -> (tokens, meta), from the text
    number = 0
    for batch in text_stream():
        for tokens, attended, meta in zip(batch["tokens"], batch["attention_mask"], batch["meta"], strict=True):
            rows[number] = (tokens.masked_fill(~attended, -1), meta)
            number += 1
    for shard, record in enumerate(cache.manifest.shards):
        contexts = cache.contexts(shard)
        for index, (context, meta) in enumerate(zip(contexts.number.tolist(), contexts.meta, strict=True)):
            assert meta == rows[context][1]
            if contexts.tokens is not None:
                assert torch.equal(contexts.tokens[index].long(), rows[context][0])
        if target is ONE:
            assert contexts.tokens is not None
            context, position = cache.places(shard)
            tokens = load_file(tmp_path / record.file)["tokens"]
            assert torch.equal(contexts.tokens[context, position], tokens)


def test_sequences_come_back_as_the_text_stream_gave_them(tmp_path: Path) -> None:
    write(tmp_path, target=TWO, dtype="float32")

    def name(batch) -> str:
        return repr((batch["tokens"].tolist(), batch["meta"]))

    given = {name(batch): batch for batch in text_stream(batch_size=1, model_batch_size=1)}
    n = 0
    for batch in cached(tmp_path, target=TWO, batch_size=1, buffer_size=50):
        wanted = given[name(batch)]
        assert batch.keys() == wanted.keys()
        for key in ("mask", "attention_mask", "tokens"):
            assert torch.equal(batch[key], wanted[key])
        assert torch.allclose(batch[HOOKS[1]], wanted[HOOKS[1]], atol=1e-6)
        n += 1
    assert n == len(given) // 4 * 4  # the rest did not fill a batch of the language model


def test_tokens_alone_can_be_read_from_sequences(tmp_path: Path) -> None:
    write(tmp_path, target=TWO)
    from lm_saes.config import ActivationFactoryTarget

    batch = next(cached(tmp_path, target=ActivationFactoryTarget.TOKENS, batch_size=4, buffer_size=None))
    assert batch["tokens"].shape == (4, CONTEXT)
    assert not set(HOOKS) & set(batch)


def test_single_activations_have_no_contexts_to_give(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match='holds single activations, without their contexts: set target = "activations-1d"'):
        cached(tmp_path, target=TWO, batch_size=2)
    with pytest.raises(ConfigError, match="and no interceptor"):
        cached(tmp_path, interceptor=lambda batch, _source: batch)


def test_a_folder_that_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"is not a finished cache: there is no manifest\.json in it"):
        ActivationCache(tmp_path)
    with pytest.raises(CacheError, match=r"no such file or folder; wanted \.npy, \.safetensors, \.pt files, or a cache"):
        cached(tmp_path / "nowhere")
    write(tmp_path)
    with pytest.raises(CacheError, match="the activations on disk have no hook point x; they have"):
        open_activations(str(tmp_path), ["x"])
    (tmp_path / MANIFEST_FILE).write_text("[]")
    with pytest.raises(CacheError, match="must hold a JSON object, got list"):
        ActivationCache(tmp_path)


def test_a_cache_without_contexts_from_batches_of_single_activations(tmp_path: Path) -> None:
    """Whoever has activations of any kind writes them with a loop."""
    vectors = torch.randn(500, 7)
    manifest = write(tmp_path, ({"a": part} for part in vectors.split(64)), hook_points=["a"], settings={"mine": 1})
    assert (manifest.contexts, manifest.context_size, manifest.samples) == (False, None, 500)
    read = torch.cat([batch["a"] for batch in cached(tmp_path, hook_points=["a"], batch_size=50, buffer_size=100)])
    assert torch.equal(read.sort(0).values, vectors.sort(0).values)
    with pytest.raises(CacheError, match="does not record where its activations come from"):
        ActivationCache(tmp_path).contexts(0)
