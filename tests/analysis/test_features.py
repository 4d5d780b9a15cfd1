"""The contexts that are found, against all codes of all tokens."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from lm_saes import SAEConfig, SparseAutoEncoder
from lm_saes.analysis.features import Feature, FeatureFinder, find_features, pick

ROWS, POSITIONS, WIDTH, LATENTS = 24, 12, 8, 32


def dictionary(**options) -> SparseAutoEncoder:
    table = {
        "hook_point_in": "x",
        "d_model": WIDTH,
        "expansion_factor": LATENTS // WIDTH,
        "act_fn": "topk",
        "top_k": 4,
        "norm_activation": "inference",
    }
    sae = SparseAutoEncoder(SAEConfig(**{**table, **options}))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return sae.eval()


def batches(rows_per_batch: int = 5, scale: float = 1.0) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    x = scale * torch.randn(ROWS, POSITIONS, WIDTH, generator=generator).half().float()  # the finder recomputes windows from two bytes
    tokens = torch.arange(ROWS * POSITIONS).view(ROWS, POSITIONS)
    mask = torch.rand(ROWS, POSITIONS, generator=generator) > 0.3
    meta = [{"spans": [(f"folder{row % 3}/file{row}", 0, POSITIONS)]} for row in range(ROWS)]
    return [
        {
            "x": x[i : i + rows_per_batch],
            "tokens": tokens[i : i + rows_per_batch],
            "mask": mask[i : i + rows_per_batch],
            "meta": meta[i : i + rows_per_batch],
        }
        for i in range(0, ROWS, rows_per_batch)
    ]


def joined(stream: list[dict], key: str) -> Tensor:
    return torch.cat([batch[key] for batch in stream])


def texts(ids: list[int]) -> list[str]:
    return [f"<{index}>" for index in ids]


@pytest.mark.parametrize("options", [{}, {"act_fn": "relu"}, {"hook_point_out": "y"}], ids=["topk", "relu", "transcoder"])
def test_contexts_are_the_strongest_rows_of_each_latent(options):
    sae, stream = dictionary(**options), batches()
    finder = find_features(sae, stream, 10**9, n_contexts=3)
    codes = sae.features({"x": joined(stream, "x")}) * joined(stream, "mask")[..., None]
    assert finder.n_tokens == int(joined(stream, "mask").sum())
    assert torch.equal(finder.density(), (codes > 0).sum((0, 1)).double() / finder.n_tokens)
    for index in range(LATENTS):
        peaks, positions = codes[..., index].max(1)
        rows = [row for row in peaks.argsort(descending=True).tolist() if peaks[row] > 0][:3]
        found = finder.contexts(index)
        assert [(row, position) for row, position, _ in found] == [(row, int(positions[row])) for row in rows]
        torch.testing.assert_close(torch.tensor([peak for *_, peak in found]), peaks[rows].detach())


def test_the_size_of_the_batches_changes_nothing():
    sae = dictionary()
    one, other = (find_features(sae, batches(size), 10**9) for size in (1, ROWS))
    assert torch.equal(one.counts, other.counts)
    assert all(one.contexts(index) == other.contexts(index) for index in range(LATENTS))


def test_a_window_shows_the_activations_around_the_peak_and_none_where_the_stream_drops():
    sae, stream = dictionary(), batches()
    finder = FeatureFinder(sae, before=3, after=2)
    for batch in stream:
        finder.add(batch)
    codes = (sae.features({"x": joined(stream, "x")}) * joined(stream, "mask")[..., None]).detach()
    index = int(finder.density().argmax())
    feature = finder.feature(index, texts)
    for context, (row, position, _) in zip(feature.contexts, finder.contexts(index), strict=True):
        start, end = max(0, position - 3), min(POSITIONS, position + 3)
        assert context.tokens == list(range(row * POSITIONS + start, row * POSITIONS + end))
        assert context.texts == texts(context.tokens)
        assert context.peak == position - start
        torch.testing.assert_close(torch.tensor(context.activations), codes[row, start:end, index], atol=1e-4, rtol=1e-4)  # rounded to 4 places


def test_activations_beyond_float16_stay_finite():
    stream = batches(scale=1e5)
    finder = find_features(dictionary(), stream, 10**9)
    values = [value for index in range(LATENTS) for context in finder.feature(index, texts).contexts for value in context.activations]
    assert torch.tensor(values).isfinite().all()


def test_dropped_positions_may_hold_anything():
    sae, dirty = dictionary(act_fn="relu"), batches()
    for batch in dirty:
        batch["x"][~batch["mask"]] = float("nan")
    expected, finder = (find_features(sae, stream, 10**9) for stream in (batches(), dirty))
    assert torch.equal(finder.counts, expected.counts)
    assert all(finder.contexts(index) == expected.contexts(index) for index in range(LATENTS))


def test_repetitions_of_the_same_tokens_are_shown_once():
    sae, stream = dictionary(act_fn="relu"), batches(ROWS)
    stream[0]["tokens"] = torch.arange(POSITIONS).expand(ROWS, -1)
    stream[0]["x"] = stream[0]["x"][:1].expand(ROWS, -1, -1)
    stream[0]["mask"] = torch.ones(ROWS, POSITIONS, dtype=torch.bool)
    finder = find_features(sae, stream, 10**9)
    fired = [index for index in range(LATENTS) if finder.counts[index]]
    assert fired
    assert all(len(finder.contexts(index)) == 1 for index in fired)


def test_reading_stops_when_it_has_seen_enough():
    finder = find_features(dictionary(), batches(1), 20)
    assert 20 <= finder.n_tokens < 20 + POSITIONS


def test_a_silent_latent_has_no_context():
    sae = dictionary(act_fn="relu")
    with torch.no_grad():
        sae.b_E[5] = -1e6
    feature = find_features(sae, batches(), 10**9).feature(5, texts)
    assert (feature.density, feature.max_activation, feature.contexts) == (0.0, 0.0, [])


def test_pick_takes_different_latents_within_the_range_of_densities():
    finder = find_features(dictionary(act_fn="relu"), batches(), 10**9)
    density = finder.density()
    middle = float(density.median())
    chosen = pick(finder, 4, lowest=middle, highest=1.0)
    assert len(set(chosen)) == 4
    assert all(density[index] >= middle for index in chosen)
    assert density[chosen].tolist() == sorted(density[chosen].tolist())
    nothing_in_range = pick(finder, 3, lowest=2.0, highest=3.0)
    assert nothing_in_range == density.argsort(descending=True)[:3].tolist()


def test_sources_are_the_top_folders_of_documents():
    finder = find_features(dictionary(), batches(), 10**9)
    assert finder.sources(int(finder.density().argmax())) <= {"folder0", "folder1", "folder2"}
    assert finder.sources(int(finder.density().argmax()))


def test_a_feature_survives_json():
    finder = find_features(dictionary(), batches(), 10**9)
    feature = finder.feature(int(finder.density().argmax()), texts)
    assert feature.contexts
    assert Feature.from_dict(json.loads(json.dumps(feature.as_dict()))) == feature
