"""Screened selection has to be the selection from float32 products, bit by bit, whatever the numbers are."""

from __future__ import annotations

import pytest
import torch

from lm_saes.ops import native, reference, torch_kernels
from lm_saes.ops.native import build, library
from lm_saes.ops.reference import Encoder
from lm_saes.ops.screened import ScreenedOps
from lm_saes.ops.sparse import SparseOps
from lm_saes.ops.sparse_codes import Pattern

INSTRUCTION_SETS = [name for name in build.instruction_sets() if native.available() and name in library._possible()]
pytestmark = pytest.mark.skipif(not native.available(), reason=native.describe())


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, request.param)


@pytest.fixture(params=[native.Bfloat16, native.Integers], ids=lambda kind: kind.__name__)
def rounding(request):
    return request.param


def exact_product(x, W, b):
    """Every pre-activation in float32, by the scalar products that screening makes too."""
    n_rows, n_latents = len(x), W.shape[1]
    everything = Pattern(torch.arange(n_latents).repeat(n_rows), torch.arange(n_rows + 1) * n_latents, n_latents)
    return native.entry_dots(everything, x, W.t().contiguous()).view(n_rows, n_latents) + b


def problem(kind, n_rows=23, width=97, n_latents=515):
    x, W, b = torch.randn(n_rows, width), torch.randn(width, n_latents) / width**0.5, torch.randn(n_latents)
    if kind == "outlier dimensions":
        x[:, :2] = x[:, :2] * 30 + 100
    if kind == "uneven rows":
        x *= torch.exp(5 * torch.randn(n_rows, 1))
    if kind == "uneven latents":
        W *= torch.exp(5 * torch.randn(n_latents))
    if kind == "equal latents":
        W[:, 1::2] = W[:, :1]
        b[1::2] = b[0]
    if kind == "few positive":
        b -= 3
    if kind == "rounding":  # all gate values of a row within what bfloat16 can tell apart
        W = torch.randn(width, 1) + 1e-4 * torch.randn(width, n_latents)
    if kind == "tiny":
        x, b = x * 1e-20, b * 1e-20
    if kind == "huge":
        x = x * 1e19
    if kind == "not finite":
        x[3, 5], x[4, 6], x[5, 7], x[6, 8] = float("nan"), float("inf"), -3.4e38, 1e30
        W[9, 50], W[9, 60], b[70] = float("nan"), float("inf"), float("inf")
    return x, W, b


KINDS = [
    *("normal", "outlier dimensions", "uneven rows", "uneven latents", "equal latents", "few positive", "rounding", "tiny", "huge", "not finite"),
]  # fmt: skip


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_topk_is_that_of_the_float32_product(kind, with_norm, rounding):
    x, W, b = problem(kind)
    norm = torch.rand(W.shape[1]) * 2 if with_norm else None
    h = exact_product(x, W, b)
    screened = native.ScreenedEncoder(W, b, norm, rounding)
    for k in (0, 1, 20, 200, W.shape[1]):
        values, indices, products = screened.topk(x, k)
        wanted_values, wanted_indices = native.topk(h, norm, k)
        done = products >= 0
        assert torch.equal(indices[done], wanted_indices[done])
        assert torch.equal(values[done], wanted_values[done])
        if kind == "normal" and 0 < k <= 20:
            assert done.all()
            assert products.max() < (2 if rounding is native.Bfloat16 else 4) * k + 16  # screening screens
        if kind != "not finite":  # by a matrix product, which adds in another order
            left, wanted_left = (entries[~done].sort(1).values for entries in (values, wanted_values))
            torch.testing.assert_close(left, wanted_left, rtol=1e-4, atol=1e-5 * float(h.abs().max()))


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("floor", [-0.5, 0.0, 3.0, "each"])
@pytest.mark.parametrize("kind", KINDS)
def test_above_is_that_of_the_float32_product(kind, floor, with_norm, rounding):
    x, W, b = problem(kind)
    floor = torch.randn(W.shape[1]) + 1 if floor == "each" else floor
    norm = torch.rand(W.shape[1]) * 2 if with_norm else None
    counts, indices, values, gate, products = native.ScreenedEncoder(W, b, norm, rounding).above(x, floor)
    wanted_counts, *wanted = native.above(exact_product(x, W, b), norm, floor)
    done = products >= 0
    assert len(indices) == counts.sum()
    assert torch.equal(counts[done], wanted_counts[done])
    for entry, wanted_entry in zip((indices, values, gate), wanted, strict=True):
        assert torch.equal(entry[done.repeat_interleave(counts)], wanted_entry[done.repeat_interleave(wanted_counts)])
    if kind == "normal" and not isinstance(floor, torch.Tensor) and floor == 3.0:
        assert done.all()  # screening screens
        assert (products < 3 * counts + 16).all()
    for row in (~done & x.isfinite().all(1)).nonzero().flatten().tolist() if kind not in ("not finite", "huge") else ():
        dense, wanted_dense = torch.zeros(W.shape[1]), torch.zeros(W.shape[1])
        dense[indices.split(counts.tolist())[row]] = values.split(counts.tolist())[row]
        wanted_dense[wanted[0].split(wanted_counts.tolist())[row]] = wanted[1].split(wanted_counts.tolist())[row]
        assert (dense - wanted_dense).norm() <= 0.05 * wanted_dense.norm()  # entries at the floor may differ


def test_more_rows_than_a_block_and_none(monkeypatch, rounding):
    monkeypatch.setattr(rounding, "rows_at_once", 7)
    x, W, b = problem("normal")
    screened = native.ScreenedEncoder(W, b, None, rounding)
    h = exact_product(x, W, b)
    for one, other in zip(screened.topk(x, 9), native.topk(h, None, 9), strict=False):
        assert torch.equal(one, other)
    for one, other in zip(screened.above(x, 2.0), native.above(h, None, 2.0), strict=False):
        assert torch.equal(one, other)
    assert screened.topk(x[:0], 9).indices.shape == (0, 9)
    assert screened.above(x[:0], 2.0).counts.shape == (0,)


def test_threads_change_nothing(rounding):
    x, W, b = problem("outlier dimensions")
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            screened = native.ScreenedEncoder(W, b, None, rounding)
            results.append((*screened.topk(x, 9), *screened.above(x, 2.0)))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(one, another) for one, another in zip(results[0], other, strict=True))


def test_other_weights_in_the_same_memory(rounding):
    x, W, b = problem("normal")
    screened = native.ScreenedEncoder(torch.zeros_like(W), b, None, rounding)
    screened.update(W, b)
    assert torch.equal(screened.topk(x, 9).values, native.ScreenedEncoder(W, b, None, rounding).topk(x, 9).values)
    with pytest.raises(ValueError, match=r"W must have the shape \[97, 515\], got \[97, 5\]"):
        screened.update(W[:, :5].contiguous(), b[:5])


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 31, 64, 97, 768])
def test_bounds_hold_and_are_close(width, outliers, with_norm, rounding):
    n_latents, k = 70, 5 if with_norm else 2
    x, W, b = torch.randn(101, width), torch.randn(width, n_latents), torch.randn(n_latents)
    if outliers:
        x[:, width // 2] *= 300
        W[width // 3] *= 40
    norm = torch.rand(n_latents) * 2 if with_norm else None
    centre, product = x.mean(0), rounding(width, n_latents)
    product.update(W, b, norm, centre)
    (piece,) = product.bounds(x, k)
    assert torch.equal(product.transposed, W.t())
    torch.testing.assert_close(product.centred, centre @ W + b, rtol=1e-4, atol=1e-4 * float(W.abs().max() * centre.norm() + 1))
    h = exact_product(x, W, b)
    gate, scale = (h, 1.0) if norm is None else (h * norm, norm)
    bound = (piece.keys[:, :n_latents].to(torch.int32) << 16).view(torch.float32)
    assert (bound >= gate).all()
    y, w = (x - centre).double().norm(dim=1)[:, None], W.double().norm(dim=0)
    torch.testing.assert_close(piece.norms.double(), y.flatten(), rtol=1e-5, atol=0)
    twice = 2.05 * (piece.errors.double()[:, None] * w + y * product.errors)  # by Cauchy and Schwarz, above and below
    halves = (bound / scale + h.abs() + product.centred.abs()) / 60  # rounded to 8 bits: products, if they are, and keys
    assert (bound / scale - h <= twice + halves + 2e-6 * (width + 40) * (y + centre.norm() + 1) * (w + 1))[gate > 0].all()
    if width > 60:  # rotated, nothing stands out
        assert (piece.errors / piece.norms).median() < 0.03
        assert (product.errors / w).max() < 0.03
    panels = piece.keys.view(len(x), -1, 32)
    assert not panels.flatten(1)[:, n_latents:].any()  # there are no more latents
    sets = piece.maxima.view(len(x), -1, 32)
    each = -(-panels.shape[1] // sets.shape[1])
    for i, group in enumerate(panels.split(each, dim=1)):
        assert torch.equal(group.amax(1), sets[:, i])


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_codes_are_the_same_whatever_pays(integers, bfloat16, monkeypatch):
    monkeypatch.setattr(native, "integers_pay", lambda: integers)
    monkeypatch.setattr(native, "bfloat16_pays", lambda: bfloat16)
    x, W, b = problem("outlier dimensions", n_rows=700)
    encoder = Encoder(W, b, None, None, None)
    screened, plain = (kind((native, torch_kernels), largest_density=0.2) for kind in (ScreenedOps, SparseOps))
    for codes in (lambda run: run.topk_codes(x, encoder, 9), lambda run: run.threshold_codes(x, encoder, 80.0)):
        one, other = codes(screened), codes(plain)
        assert torch.equal(one.indices, other.indices)
        torch.testing.assert_close(one.values, other.values)
    torch.testing.assert_close(screened.topk_codes(x, encoder, 9).to_dense(), reference.topk_codes(x, encoder, 9).to_dense())


def test_integers_serve_only_where_they_tell_enough(monkeypatch):
    monkeypatch.setattr(native, "integers_pay", lambda: True)
    monkeypatch.setattr(native, "bfloat16_pays", lambda: True)
    used = []

    class Watched(native.ScreenedEncoder):
        def __init__(self, W, b, gate_norm, rounding):
            used.append(rounding)
            super().__init__(W, b, gate_norm, rounding)

    monkeypatch.setattr("lm_saes.ops.screened.ScreenedEncoder", Watched)
    run = ScreenedOps((native, torch_kernels), largest_density=0.2)
    for kind, wanted in (("normal", [native.Integers]), ("rounding", [native.Integers, native.Bfloat16])):
        x, W, b = problem(kind, n_rows=600)
        run.topk_codes(x, Encoder(W, b, None, None, None), 9)
        assert used == wanted
        used.clear()
