"""The C++ kernels against definitions in a few lines of torch: every instruction set of this machine, one to three threads."""

from __future__ import annotations

import pytest
import torch

from lm_saes.errors import ConfigError
from lm_saes.ops import native
from lm_saes.ops.native import build, library
from lm_saes.ops.sparse_codes import Pattern

INSTRUCTION_SETS = [name for name in build.instruction_sets() if native.available() and name in library._possible()]
pytestmark = pytest.mark.skipif(not native.available(), reason=native.describe())

SHAPES = [(1, 1, 1), (3, 7, 5), (5, 33, 100), (17, 64, 256), (40, 97, 1003)]  # rows, width, latents
EXTREMES = [float("nan"), float("inf"), -float("inf"), 1e-42, 3e38]


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, request.param)
    return request.param


def same_with_any_number_of_threads(function, *arguments):
    """The result, after seeing that two and three threads give the same bits."""
    result = function(*arguments)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for one, other in zip(as_tuple(result), as_tuple(function(*arguments)), strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(bits(one), bits(other))
    finally:
        torch.set_num_threads(1)
    return result


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def bits(tensor):
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor


def gate(h, norm):
    return h if norm is None else h * norm


def random_pattern(n_rows, n_latents, most):
    """Rows of different length, the first latent in all, the last in none, some rows empty."""
    rows = []
    for row in range(n_rows):
        others = torch.randperm(max(n_latents - 2, 0))[: row % (most + 1)] + 1
        rows.append(torch.cat([torch.zeros(int(row % 5 != 3), dtype=torch.int64), others]))
    counts = torch.tensor([0, *map(len, rows)])
    return Pattern(torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64), counts.cumsum(0), n_latents)


def dense(pattern, values):
    codes = torch.zeros(pattern.n_rows, pattern.n_latents, dtype=torch.float64)
    codes[pattern.rows, pattern.indices] = values.double()
    return codes


def assert_close(actual, wanted, scale=1.0):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("kind", ["normal", "ties", "negative", "constant", "few", "extreme"])
@pytest.mark.parametrize(("n_rows", "n_latents"), [(1, 1), (3, 5), (40, 100), (50, 1003), (2, 4096)])
def test_topk(n_rows, n_latents, kind, with_norm):
    h = {
        "normal": lambda h: h,
        "ties": lambda h: (2 * h).round(),
        "negative": lambda h: -h.abs() - 1,
        "constant": torch.ones_like,
        "few": lambda h: torch.where(h > 2, h, -h.abs()),
        "extreme": lambda h: h.index_put_((torch.arange(5) % n_rows, torch.arange(5) % n_latents), torch.tensor(EXTREMES)),
    }[kind](torch.randn(n_rows, n_latents))
    norm = (torch.rand(n_latents) + 0.5) if with_norm else None
    q = gate(h, norm).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).clamp(min=0)
    for k in {0, 1, n_latents // 7, n_latents // 2, n_latents}:
        values, indices = same_with_any_number_of_threads(native.topk, h, norm, k)
        chosen = q.sort(descending=True, stable=True).indices[:, :k].sort().values  # of equal ones the first
        assert torch.equal(indices.sort().values, chosen)
        assert torch.equal(values, torch.where(q.gather(1, indices) > 0, h.gather(1, indices), 0.0))


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("floor", [-1.0, 0.0, 0.7, 99.0, float("inf"), "each"])
@pytest.mark.parametrize(("n_rows", "n_latents"), [(0, 4), (1, 1), (3, 5), (40, 100), (50, 1003)])
def test_above(n_rows, n_latents, floor, with_norm):
    h = torch.randn(n_rows, n_latents)
    h[:, ::7] = h[:, ::7].round()
    h.flatten()[::11] = float("nan")
    floor = torch.randn(n_latents) if floor == "each" else floor
    norm = (torch.rand(n_latents) + 0.5) if with_norm else None
    counts, indices, values, gates = same_with_any_number_of_threads(native.above, h, norm, floor)
    wanted = (gate(h, norm) > floor) & (h > 0)
    assert torch.equal(counts, wanted.sum(1))
    assert torch.equal(indices, wanted.nonzero()[:, 1])
    assert torch.equal(values, h[wanted])
    assert torch.equal(gates, gate(h, norm)[wanted])


@pytest.mark.parametrize(("n_rows", "width", "n_latents"), [(0, 3, 4), *SHAPES])
def test_sums_over_the_entries_of_tokens(n_rows, width, n_latents):
    pattern = random_pattern(n_rows, n_latents, 60)
    values, matrix, left = torch.randn(len(pattern.indices)), torch.randn(n_latents, width), torch.randn(n_rows, width)
    sums = same_with_any_number_of_threads(native.gather_sum, pattern, values, matrix)
    assert_close(sums, dense(pattern, values) @ matrix.double(), 10)
    dots = same_with_any_number_of_threads(native.entry_dots, pattern, left, matrix)
    assert_close(dots, (left.double()[pattern.rows] * matrix.double()[pattern.indices]).sum(1), 10)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n_rows", "width", "n_latents"), [(0, 3, 4), *SHAPES])
def test_reconstruct(n_rows, width, n_latents, with_bias):
    pattern = random_pattern(n_rows, n_latents, 60)
    values, W_D, target = torch.randn(len(pattern.indices)), torch.randn(n_latents, width), torch.randn(n_rows, width)
    b_D = torch.randn(width) if with_bias else None
    reconstruction, residual, squared_error, slopes = same_with_any_number_of_threads(native.reconstruct, pattern, values, W_D, b_D, target)
    wanted = dense(pattern, values) @ W_D.double() + (0 if b_D is None else b_D.double())
    assert_close(reconstruction, wanted, 10)
    assert torch.equal(residual, reconstruction - target)
    assert_close(squared_error, residual.double().square().sum(1), 10)
    assert_close(slopes, (residual.double()[pattern.rows] * W_D.double()[pattern.indices]).sum(1), 100)


@pytest.mark.parametrize(("n_rows", "width", "n_latents"), [(0, 3, 4), (600, 3, 50), *SHAPES])
def test_sums_over_the_entries_of_latents(n_rows, width, n_latents):
    pattern = random_pattern(n_rows, n_latents, 60)
    entries = same_with_any_number_of_threads(native.by_latent, pattern)
    order = pattern.indices.sort(stable=True).indices
    assert torch.equal(entries.order, order)
    assert torch.equal(entries.rows, pattern.rows[order])
    assert torch.equal(entries.offsets.diff(), torch.bincount(pattern.indices, minlength=n_latents))
    values, matrix = torch.randn(len(pattern.indices)), torch.randn(n_rows, width)
    wanted = dense(pattern, values).t() @ matrix.double()
    for transposed in (False, True):
        sums = same_with_any_number_of_threads(native.latent_sums, entries, values, matrix, transposed)
        assert sums.is_contiguous()
        assert_close(sums, wanted.t() if transposed else wanted, 100)


def test_infinite_and_missing_numbers_spread_to_what_they_touch():
    pattern = Pattern(torch.tensor([0, 2, 1]), torch.tensor([0, 2, 3]), 3)
    for number in (float("nan"), float("inf")):
        W_D = torch.ones(3, 40).index_fill_(0, torch.tensor(2), number)
        sums = native.gather_sum(pattern, torch.ones(3), W_D)
        assert not sums[0].isfinite().any()
        assert sums[1].isfinite().all()


def test_what_the_kernels_do_not_take_is_refused():
    h = torch.randn(4, 6)
    assert native.applies(h, None)
    for wrong in (h.double(), h.t(), h.bfloat16(), h.to("meta")):
        assert not native.applies(wrong)
        with pytest.raises(ValueError, match="h must be a contiguous"):
            native.topk(wrong, None, 2)
    with pytest.raises(ValueError, match="k must be between 0 and the number of latents, 6, got 7"):
        native.topk(h, None, 7)
    with pytest.raises(ValueError, match=r"gate_norm must have the shape \[6\], got \[5\]"):
        native.topk(h, torch.ones(5), 2)


@pytest.mark.parametrize(
    ("indices", "offsets", "message"),
    [
        ([0, 3], [0, 2], "indices must lie between 0 and 2, got 0 to 3"),
        ([0, -1], [0, 2], "indices must lie between 0 and 2, got -1 to 0"),
        ([0, 1], [0, 3], "offsets must ascend from 0 to the number of entries, 2"),
        ([0, 1], [0, 2, 1, 2], "offsets must ascend"),
        ([0, 1], [1, 2], "offsets must ascend"),
    ],
)
def test_a_pattern_that_would_read_other_memory_is_refused(indices, offsets, message):
    pattern = Pattern(torch.tensor(indices), torch.tensor(offsets), 3)
    with pytest.raises(ValueError, match=message):
        native.gather_sum(pattern, torch.ones(2), torch.ones(3, 4))
    with pytest.raises(ValueError, match=message):
        native.by_latent(pattern)


def test_description_names_what_runs(instruction_set):
    assert native.describe() == f"native kernels for {instruction_set}, on torch's OpenMP threads"


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, "mmx")
    with pytest.raises(ConfigError, match=r"LM_SAES_NATIVE_ISA must be one of auto, .* got 'mmx'"):
        native.available()


@pytest.fixture
def _fresh_library():
    library._opened.cache_clear()
    library._possible.cache_clear()
    yield
    library._opened.cache_clear()
    library._possible.cache_clear()


@pytest.mark.usefixtures("_fresh_library")
def test_kernels_of_other_sources_are_not_used(monkeypatch):
    monkeypatch.setattr(build, "sources_hash", lambda: "of other sources")
    assert not native.available()
    assert "older than its sources" in native.describe()


@pytest.mark.usefixtures("_fresh_library")
def test_without_a_library_there_are_no_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "library_path", lambda name: tmp_path / f"{name}.so")
    assert not native.available()
    assert "is not there" in native.describe()


@pytest.mark.usefixtures("_fresh_library")
def test_the_kernels_start_threads_where_torch_has_none_to_lend(monkeypatch):
    monkeypatch.setattr(library, "_gomp_parallel", lambda: None)
    h = torch.randn(100, 50)
    assert native.describe().endswith("on threads of their own")
    values, _ = same_with_any_number_of_threads(native.topk, h, None, 3)
    assert torch.equal(values.sort().values, h.topk(3).values.clamp(min=0).sort().values)
