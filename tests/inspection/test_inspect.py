"""Inspections of streams whose mean, covariance, ranks and outliers are known in closed form."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm_saes.config import ActivationFactoryConfig, ActivationFactoryDatasetSource, ActivationFactoryTarget, DatasetConfig, StreamSettings
from lm_saes.errors import ConfigError, DataError, HookPointError, LmSaesError, NonFiniteError
from lm_saes.inspection.inspect import expand, inspect_activations, inspect_batches, inspect_settings
from lm_saes.inspection.report import HookPointReport
from tests.activations import fake
from tests.activations.fake import BOS, HOOKS

WIDTH = 32


class FakeLanguageModel(fake.FakeLanguageModel):
    def token_texts(self, ids: Any) -> list[str]:
        return [chr(index) if index < 256 else f"<{index}>" for index in ids]


def inspect(x: Tensor, cut: int = 50, **options: Any) -> HookPointReport:
    """The record of rows [N, D] that come `cut` at a time."""
    return inspect_batches(({"h": part} for part in x.split(cut)), ["h"], tokens=None, **options)["h"]


def cross(rank: int, mean: float, width: int = WIDTH) -> Tensor:
    """Rows mean ± e_i for i < rank, the mean along the last axis: covariance 1/rank on the first `rank` axes, total variance 1."""
    axes = torch.eye(width, dtype=torch.float64)[:rank]
    centre = mean * torch.eye(width, dtype=torch.float64)[-1]
    return torch.cat([centre + axes, centre - axes]).repeat(20, 1)


@pytest.mark.parametrize("rank", [1, 5, 16, 31])
def test_known_rank_mean_and_norm(rank: int) -> None:
    record = inspect(cross(rank, mean=2.0))
    assert record.tokens == 40 * rank
    assert record.dimensionality.of == WIDTH
    assert record.dimensionality.variance_99 == math.ceil(0.99 * rank)
    assert record.dimensionality.effective_rank == pytest.approx(rank, rel=1e-6)
    assert record.gamma == pytest.approx(2.0)
    assert record.mean_share == pytest.approx(4 / 5)
    assert record.mean_norm == pytest.approx(math.sqrt(5))
    assert record.scale == pytest.approx(math.sqrt(WIDTH) / math.sqrt(5))
    assert record.largest_norm == pytest.approx(math.sqrt(5))
    assert record.norm_quantiles["5%"] == pytest.approx(math.sqrt(5), rel=0.006)
    assert record.median_distance == pytest.approx(0, abs=1e-4)  # symmetric
    n = record.tokens  # the directions' mean is 2/√5 along the last axis
    assert record.mean_cosine == pytest.approx((n * n * 4 / 5 - n) / (n * (n - 1)))
    assert sum(record.spectrum) == pytest.approx(1)
    assert record.spectrum[:rank] == pytest.approx([1 / rank] * rank)


def test_two_unequal_variances_have_the_entropy_of_their_deviations() -> None:
    x = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]).repeat(10, 1)
    p = 3 / 4
    expected = math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert inspect(x).dimensionality.effective_rank == pytest.approx(expected, rel=1e-6)
    assert inspect(x).dimensionality.variance_99 == 2
    assert inspect(x).spectrum == pytest.approx((0.9, 0.1)), "of variances"


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), cut=st.integers(10, 200))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_what_is_geometric_does_not_change_with_scale_rotation_or_batches(seed: int, scale: float, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(150, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + torch.arange(6)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    one, other = inspect(x, 150), inspect(scale * x @ rotation, cut)
    assert other.dimensionality.variance_99 == one.dimensionality.variance_99
    assert other.dimensionality.effective_rank == pytest.approx(one.dimensionality.effective_rank, rel=1e-9)
    for name in ("gamma", "mean_share", "mean_cosine"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9)
    assert other.median_distance == pytest.approx(one.median_distance, rel=1e-2)  # to the tolerance of the median
    assert other.mean_norm == pytest.approx(scale * one.mean_norm, rel=1e-9)


def test_outlier_tokens_are_found_described_and_left_out() -> None:
    x = cross(8, mean=0.0)
    tokens = torch.zeros(len(x), dtype=torch.int64)
    outlying = torch.tensor([100, 150, 200])
    spoiled = x.clone()
    spoiled[outlying] = 50 * torch.eye(WIDTH, dtype=torch.float64)[0]
    tokens[outlying] = torch.tensor([7, 9, 7])
    others = torch.ones(len(x), dtype=torch.bool)
    others[outlying] = False
    (record,) = inspect_batches([{"h": spoiled, "tokens": tokens}], ["h"], tokens=None).values()
    clean = inspect(x[others])
    assert record.outlier_tokens.count == 3
    assert record.outlier_tokens.tokens == (("7", 2), ("9", 1))
    assert record.outlier_tokens.share == pytest.approx(3 / len(x))
    assert record.outlier_tokens.squares_share == pytest.approx(7500 / (7500 + len(x) - 3))
    assert record.outlier_tokens.largest_ratio == pytest.approx(50, rel=0.006)
    assert record.outlier_tokens.dropped
    assert record.tokens == len(x) - 3
    assert record.dimensionality == clean.dimensionality
    assert record.mean_norm == pytest.approx(clean.mean_norm)


def test_without_the_filter_outliers_count_in_everything_and_are_described_all_the_same() -> None:
    x = cross(8, mean=0.0)
    x[100] = 50 * torch.eye(WIDTH, dtype=torch.float64)[0]
    record = inspect(x, outlier_norm_factor=0.0)
    assert record.outlier_tokens.count == 1
    assert not record.outlier_tokens.dropped
    assert record.tokens == len(x)
    assert record.outlier_tokens.squares_share == pytest.approx(2500 / (2500 + len(x) - 1))
    assert record.largest_norm == pytest.approx(50)
    assert record.mean_norm == pytest.approx((len(x) - 1 + 50) / len(x))
    assert record.scale == pytest.approx(math.sqrt(WIDTH) / record.mean_norm), "by the mean norm, not its root mean square"


def test_an_outlier_at_one_hook_point_is_none_at_another() -> None:
    x = cross(8, mean=0.0)
    spoiled = x.clone()
    spoiled[200] *= 100
    records = inspect_batches([{"a": x, "b": spoiled}], ["a", "b"], tokens=None)
    assert (records["a"].tokens, records["b"].tokens) == (len(x), len(x) - 1)


def test_a_sink_dimension_is_found_and_taken_out_of_the_second_measure() -> None:
    x = cross(16, mean=0.0)
    x[:, 20] = 30.0  # large and constant: no variance, all of the mean
    x[::2, 21] = 20.0
    x[1::2, 21] = -20.0  # large and varying
    record = inspect(x, outlier_norm_factor=0.0)
    assert [one.index for one in record.outlier_dimensions] == [20, 21]
    assert record.n_outlier_dimensions == 2
    sink, swing = record.outlier_dimensions
    assert (sink.mean, sink.std) == (pytest.approx(30), pytest.approx(0, abs=1e-6))
    assert (swing.mean, swing.std) == (pytest.approx(0, abs=1e-9), pytest.approx(20))
    assert sink.share == pytest.approx(900 / 1301)
    assert record.dimensionality.variance_99 == 1
    inner = record.dimensionality_without_outliers
    assert inner is not None
    assert (inner.of, inner.variance_99) == (WIDTH - 2, 16)
    assert inner.effective_rank == pytest.approx(16, rel=1e-6)


def test_a_far_group_moves_the_mean_and_not_the_median() -> None:
    x = torch.zeros(1000, 2, dtype=torch.float64)
    x[:, 0] = torch.linspace(-1, 1, 1000)
    x[::10, 1] = 9.0
    record = inspect(x, outlier_norm_factor=0.0)
    deviation = math.sqrt(float(x.var(0, correction=0).sum()))
    assert record.median_distance == pytest.approx(0.9 / deviation, rel=0.05)


def test_positions_and_special_tokens_of_a_language_model() -> None:
    model = FakeLanguageModel(context=16)
    model.scale[BOS] = 40.0
    model.scale[ord("!")] = 30.0
    report = inspect_activations(model, [HOOKS[1]], ["abcdefgh " * 200 + "abc!defgh " + "abcdefgh " * 100], tokens=10_000)
    record = report.hook_points[HOOKS[1]]
    bos = {token.text: token for token in record.special_tokens}[f"<{BOS}>"]
    assert bos.ratio == pytest.approx(40, rel=0.1)
    assert bos.count == (record.tokens + record.outlier_tokens.count) // 15  # one in front of 15 tokens of text
    assert record.outlier_tokens.count == 1
    assert record.outlier_tokens.tokens == (("!", 1),)
    ((position, times),) = record.outlier_tokens.positions
    assert (position, times) == ((1800 + 3) % 15 + 1, 1)  # 15 tokens of text in a row, behind the BOS token
    assert report.context_size == 16


def test_one_forward_serves_all_hook_points() -> None:
    both, one = FakeLanguageModel(context=16), FakeLanguageModel(context=16)
    text = ["some words to read " * 100]
    together = inspect_activations(both, HOOKS, text, tokens=500)
    alone = inspect_activations(one, [HOOKS[1]], text, tokens=500)
    assert both.calls == one.calls
    assert together.hook_points[HOOKS[1]] == alone.hook_points[HOOKS[1]]


def test_a_settings_file_is_inspected_with_its_own_context_and_filters(tmp_path: Any) -> None:
    (tmp_path / "text.txt").write_text("some words to read " * 300)
    model = FakeLanguageModel(context=64)
    factory = ActivationFactoryConfig(
        sources=[ActivationFactoryDatasetSource(name="mine")], target=ActivationFactoryTarget.ACTIVATIONS_1D, hook_points=[HOOKS[0]],
        batch_size=32, buffer_size=64, context_size=16, model_batch_size=8, ignore_token_ids=[ord(" ")],
    )  # fmt: skip
    stream = StreamSettings(
        activation_factory=factory, model=model.cfg, datasets={"mine": DatasetConfig(dataset_name_or_path=str(tmp_path / "text.txt"))}
    )
    report = inspect_settings(stream, tokens=300, model=model)
    assert list(report.hook_points) == [HOOKS[0]]
    assert report.context_size == 16
    assert [token.text for token in report.hook_points[HOOKS[0]].special_tokens] == [" "]  # and not BOS, which the list leaves out
    assert 300 <= report.hook_points[HOOKS[0]].tokens < 300 + 8 * 16


def test_activations_that_do_not_vary_leave_nothing_undefined_in_the_record() -> None:
    for x in (torch.zeros(30, 4), torch.ones(30, 4)):
        record = inspect(x)
        assert record.gamma is None
        assert record.median_distance is None
        assert record.dimensionality.variance_99 == 0
        json.dumps(record.as_dict(), allow_nan=False)


def test_the_record_is_json_and_says_when_tokens_are_few() -> None:
    record = inspect(torch.randn(50, WIDTH))
    table = json.loads(json.dumps(record.as_dict(), allow_nan=False))
    assert table["tokens"] == 50
    assert [answer["topic"] for answer in table["advice"]] == [answer.topic for answer in record.advice]
    assert "320" in table["notes"][0]
    assert inspect(torch.randn(400, WIDTH)).notes == ()


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        ([{"h": torch.tensor([[1.0, float("nan")]])}], NonFiniteError, "1 of 1"),
        ([{"g": torch.ones(2, 2)}], DataError, "add them to the stream's hook_points"),
        ([], DataError, "no batch"),
        ([{"h": torch.ones(2, 2), "mask": torch.zeros(2, dtype=torch.bool)}], DataError, "keeps no token"),
    ],
)
def test_what_cannot_be_inspected_is_said_in_one_line(batches: Any, error: type[LmSaesError], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        inspect_batches(batches, ["h"])
    assert "\n" not in str(caught.value)


def test_stars_stand_for_every_block() -> None:
    model = FakeLanguageModel()
    assert expand(["blocks.*.hook_resid_post"], model) == HOOKS
    assert expand([HOOKS[1], "blocks.*.hook_resid_post"], model) == [HOOKS[1], HOOKS[0]]
    with pytest.raises(HookPointError):
        expand(["blocks.*.hook_attn_out"], model)
    with pytest.raises(ConfigError, match="no hook point"):
        expand([], model)


def test_tokens_must_be_some() -> None:
    with pytest.raises(ConfigError, match="tokens"):
        inspect_activations(FakeLanguageModel(), HOOKS, ["text"], tokens=0)
