"""Captured activations and the mask: what is dropped, why, and that it is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.activations.capture import ActivationCapture, KeptPositions, RunningMedian
from lm_saes.activations.documents import DocumentStream, ListedDocuments
from lm_saes.activations.mix import Mix, Source
from lm_saes.activations.tokens import token_rows
from tests.activations.fake import BOS, EOS, HOOKS, FakeLanguageModel


def capture(
    texts: list[str], model: FakeLanguageModel, *, context_size: int = 8, packing: bool = True, rows: int = 2, **options: Any
) -> ActivationCapture:
    documents = DocumentStream(ListedDocuments("d", texts))
    stream = token_rows(documents, model, context_size=context_size, rows_per_item=rows, packing=packing, meta={"dataset_name": "d"})
    return ActivationCapture(Mix([Source("d", 1.0, stream)]), model, options.pop("hook_points", HOOKS), **options)


# ---------------------------------------------------------------------------------------------- the running median


@given(values=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60), cut=st.integers(0, 60))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_running_median_is_the_median_to_within_a_bin(values: list[float], cut: int) -> None:
    median = RunningMedian()
    for part in (values[:cut], values[cut:]):
        median.update(torch.tensor(part))
    exact = sorted(values)[(len(values) - 1) // 2]
    assert median.value() is not None
    # half a bin, and an ulp of float32 in the logarithm
    assert abs(math.log2(median.value() / exact)) <= 0.5 / RunningMedian.BINS_PER_OCTAVE + 1e-5  # pyright: ignore[reportOptionalOperand]


def test_running_median_passes_over_what_has_no_logarithm() -> None:
    median = RunningMedian()
    median.update(torch.tensor([0.0, -1.0, math.nan, math.inf]))
    assert median.value() is None
    median.update(torch.tensor([0.0] * 10 + [3.0]))
    assert median.value() == pytest.approx(3.0, rel=0.006)
    median.update(torch.tensor([1e-30, 1e30]))  # beyond the bins: the outermost
    assert median.value() == pytest.approx(3.0, rel=0.006)


# ---------------------------------------------------------------------------------------------- activations


def test_activations_are_those_of_the_model_and_full_rows_have_no_attention_mask() -> None:
    model = FakeLanguageModel()
    batch = next(capture(["abcdefg" * 4], model))
    assert model.masks == [None]
    expected = model.capture(batch["tokens"], None, HOOKS)
    assert all(torch.equal(batch[hook], expected[hook]) for hook in HOOKS)
    assert batch["tokens"].shape == batch["mask"].shape == batch["attention_mask"].shape == (2, 8)
    assert [row["spans"] for row in batch["meta"]] == [[("d[0]", 1, 8)]] * 2


def test_padded_rows_run_no_longer_than_the_longest_and_are_zero_behind() -> None:
    model = FakeLanguageModel()
    batch = next(capture(["abc", "d"], model, packing=False))
    assert model.calls == [(2, 4)]
    assert model.masks[0] is not None
    assert sorted(model.masks[0].sum(1).tolist()) == [2, 4]
    for hook in HOOKS:
        assert batch[hook].shape == (2, 8, 6)
        assert bool((batch[hook][~batch["attention_mask"]] == 0).all())
        assert bool((batch[hook][batch["attention_mask"]] != 0).any(-1).all())


def test_dtype() -> None:
    model = FakeLanguageModel()
    assert next(capture(["abcdefg"], model))[HOOKS[0]].dtype == torch.float32
    assert next(capture(["abcdefg"], model, dtype=torch.bfloat16))[HOOKS[0]].dtype == torch.bfloat16


def test_without_hook_points_the_model_does_not_run() -> None:
    model = FakeLanguageModel()
    batch = next(capture(["abcdefg"], model, hook_points=[], outlier_norm_factor=10.0))
    assert model.calls == []
    assert set(batch) == {"tokens", "mask", "attention_mask", "meta"}


# ---------------------------------------------------------------------------------------------- filters


def test_special_tokens_are_dropped_by_default() -> None:
    stream = capture(["abc", "defgh"], FakeLanguageModel(), context_size=10, rows=1)
    batch = next(stream)
    assert batch["mask"].tolist() == [[token < 256 for token in batch["tokens"][0].tolist()]]
    assert stream.counts[0] | {"tokens": 10, "kept": 8, "special": 2, "ignored": 0, "outlier": 0} == stream.counts[0]


def test_a_list_drops_those_tokens_and_no_others() -> None:
    stream = capture(["abcabcabc"], FakeLanguageModel(), context_size=10, rows=1, ignore_token_ids=[ord("b")])
    batch = next(stream)
    assert batch["tokens"][0, batch["mask"][0]].tolist() == [BOS, *b"acacac"]
    assert (stream.counts[0]["ignored"], stream.counts[0]["special"]) == (3, 0)
    keep_all = next(capture(["abcabcabc"], FakeLanguageModel(), context_size=10, rows=1, ignore_token_ids=[]))
    assert bool(keep_all["mask"].all())


def test_padding_is_never_kept_even_where_nothing_is_ignored() -> None:
    model = FakeLanguageModel(bos=EOS, eos=EOS, pad=EOS)
    stream = capture(["ab"], model, packing=False, ignore_token_ids=[])
    assert next(stream)["mask"].tolist() == [[True] * 3 + [False] * 5]
    assert (stream.counts[0]["tokens"], stream.counts[0]["padding"]) == (3, 5)
    listed = capture(["ab"], model, packing=False, ignore_token_ids=[EOS])
    assert next(listed)["mask"].tolist() == [[False, True, True] + [False] * 5]
    assert (listed.counts[0]["ignored"], listed.counts[0]["padding"]) == (1, 5)


def test_a_giant_token_is_dropped_whichever_hook_point_shows_it() -> None:
    model = FakeLanguageModel()
    model.scale[ord("z")] = 50.0  # at the second hook point only
    text = "abcdefz" * 8
    stream = capture([text], model, rows=8, outlier_norm_factor=10.0)
    batch = next(stream)
    assert stream.counts[0]["outlier"] == 8
    assert torch.equal(batch["mask"], (batch["tokens"] != ord("z")) & (batch["tokens"] != BOS))
    for off in (capture([text], model, rows=8, outlier_norm_factor=0.0), capture([text], model, rows=8, outlier_norm_factor=100.0)):
        assert bool((next(off)["mask"] == (batch["tokens"] != BOS)).all())
        assert off.counts[0]["outlier"] == 0


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_special_tokens_neither_move_the_median_nor_count_as_outliers(size: float) -> None:
    model = FakeLanguageModel()
    model.scale[BOS] = size
    stream = capture(["abcdefg"], model, context_size=2, rows=1, outlier_norm_factor=3.0)
    next(stream)  # half of the positions are BOS
    assert stream.norm_medians[HOOKS[1]].value() == pytest.approx(1.1, abs=0.2)
    assert stream.counts[0] | {"kept": 1, "special": 1, "outlier": 0} == stream.counts[0]


def test_the_median_is_of_all_text_so_far_not_of_the_batch() -> None:
    model = FakeLanguageModel()
    model.scale[ord("z")] = 50.0
    stream, resumed = (capture(["a" * 70 + "z" * 7], model, rows=1, outlier_norm_factor=10.0) for _ in range(2))
    assert [int(next(stream)["mask"].sum()) for _ in range(10)] == [7] * 10
    resumed.load_state_dict(stream.state_dict())
    for last in (stream, resumed):
        assert [int(batch["mask"].sum()) for batch in last] == [0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_activations_are_passed_on(value: float) -> None:
    model = FakeLanguageModel()
    model.scale[ord("z")] = value
    stream = capture(["abcdzfg" * 8], model, outlier_norm_factor=10.0)
    batch = next(stream)
    assert stream.counts[0]["outlier"] == 0
    assert not bool(batch[HOOKS[1]][batch["mask"]].isfinite().all())


def test_the_interceptor_sees_the_source_and_decides_last() -> None:
    seen: list[int] = []

    def interceptor(batch: dict[str, Any], source: int) -> dict[str, Any]:
        seen.append(source)
        return {**batch, HOOKS[0]: batch[HOOKS[0]] * 2, "mask": batch["mask"] & (batch["tokens"] != ord("a"))}

    model = FakeLanguageModel()
    stream = capture(["abcdefg" * 2], model, interceptor=interceptor)
    batch = next(stream)
    assert seen == [0]
    assert torch.equal(batch[HOOKS[0]], model.embedding[batch["tokens"]] * 2)
    assert stream.counts[0] | {"tokens": 16, "kept": 12, "special": 2, "interceptor": 2} == stream.counts[0]


def test_kept_positions_are_the_mask_in_order() -> None:
    model = FakeLanguageModel()
    stream = KeptPositions(capture(["abc", "defgh"], model, packing=False), HOOKS)
    batch = next(stream)
    assert bytes(batch["tokens"].tolist()) in (b"abcdefgh", b"defghabc")
    assert torch.equal(batch[HOOKS[0]], model.embedding[batch["tokens"]])
    assert bool(batch["mask"].all())
    assert set(batch) == {*HOOKS, "tokens", "mask"}
