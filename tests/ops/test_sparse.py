"""The sparse implementation gives what the reference gives: codes, reconstructions and every gradient; with each set of kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes import ops
from lm_saes.errors import ConfigError
from lm_saes.ops import Encoder, SparseCodes, native, reference, screened, torch_kernels
from lm_saes.ops import sparse as sparse_module
from lm_saes.ops.screened import ScreenedOps
from lm_saes.ops.sparse import SparseOps

quick = settings(max_examples=50, deadline=None, derandomize=True)
DOUBLE = {"rtol": 1e-12, "atol": 1e-12}
SELECTIONS = ["topk", "batchtopk", "relu", "threshold", "jumprelu"]
sparse = SparseOps((torch_kernels,), largest_density=1.0)  # never dense
in_cpp = SparseOps((native, torch_kernels), largest_density=1.0)
by_screening = ScreenedOps((native, torch_kernels), largest_density=1.0)


needs_cpp = pytest.mark.skipif(not native.available(), reason=native.describe())
with_cpp = [pytest.param(in_cpp, marks=needs_cpp), pytest.param(by_screening, marks=needs_cpp)]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Several blocks in a small batch, the last one not full, and a sample that is not the whole batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_module, "ROWS_AT_ONCE", 4)
        patch.setattr(sparse_module, "SAMPLED_ROWS", 3)
        patch.setattr(screened, "FEWEST_ROWS", 1)
        yield


def random(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def problem(N, D, F, glu, norm, seed, dtype=torch.float64):
    """x, W_D and the parts of an encoder."""
    g = torch.Generator().manual_seed(seed)
    x, W_D = random(g, N, D, dtype=dtype), random(g, F, D, dtype=dtype)
    gate_norm = W_D.detach().float().norm(dim=1).to(W_D.dtype) if norm else None
    glu_parts = [random(g, D, F, dtype=dtype), random(g, F, dtype=dtype)] if glu else [None, None]
    return x, W_D, Encoder(random(g, D, F, dtype=dtype), random(g, F, dtype=dtype), *glu_parts, gate_norm)


def select_codes(run, select, x, encoder, k, mask, theta):
    """Codes by the name of the selection; k sets the level of the thresholds."""
    match select:
        case "topk":
            return run.topk_codes(x, encoder, k)
        case "batchtopk":
            return run.batch_topk_codes(x, encoder, k, mask)
        case "relu":
            return run.threshold_codes(x, encoder, 0.0)
        case "threshold":
            return run.threshold_codes(x, encoder, torch.tensor(0.3 * k, dtype=torch.float64))
        case _:
            return run.jumprelu_codes(x, encoder, theta, 0.25 * (k + 1))


def outcome(run, select, x, W_D, encoder, k, mask, fused=False):
    """Dense codes, reconstruction and all gradients of a loss that depends on codes and reconstruction, by name."""
    g = torch.Generator().manual_seed(5)
    F, D = W_D.shape
    theta = (torch.rand(F, generator=g, dtype=torch.float64) * k).to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
    b_D, target = random(g, D, dtype=x.dtype), random(g, len(x), D, dtype=x.dtype)
    codes = select_codes(run, select, x, encoder, k, mask, theta)
    if fused:
        output, error = run.reconstruct(codes, W_D, b_D, target)
        weighted = error @ torch.linspace(0.5, 2, len(x), dtype=error.dtype)
        loss = weighted + (output.float().tanh().sum() if fused == "both" else 0)
    else:
        output = run.decode(codes, W_D)
        loss = output.square().sum()
    dense = ops.to_dense(codes)
    if not fused:  # penalties on the codes: where they are stored is where they have gradient in all forms
        weights = torch.linspace(-1, 2, W_D.shape[0], dtype=dense.dtype)
        loss = loss + ops.row_sums(ops.scale_latents(codes, weights)).sum() if select == "jumprelu" else loss + (dense * weights).sum()
    inputs = {"x": x, "W_D": W_D, "W": encoder.W, "b": encoder.b, "W_glu": encoder.W_glu, "b_glu": encoder.b_glu}
    inputs |= {"theta": theta} if select == "jumprelu" else {}
    inputs |= {"b_D": b_D, "target": target} if fused else {}
    inputs = {name: part for name, part in inputs.items() if part is not None}
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {"codes": dense, "output": output, **dict(zip(inputs, gradients, strict=True))}


def check_agreement(select, x, W_D, encoder, k, mask, fused=False, run=sparse, **tolerance):
    expected = outcome(reference, select, x, W_D, encoder, k, mask, fused)
    got = outcome(run, select, x, W_D, encoder, k, mask, fused)
    for name, value in expected.items():
        scale = value.detach().abs().max().clamp(min=1) if value.numel() else 1  # relative to the largest entry: single ones may cancel
        torch.testing.assert_close(got[name] / scale, value / scale, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("fused", [False, True, "both"])
@pytest.mark.parametrize("select", SELECTIONS)
@quick
@given(st.data())
def test_codes_and_gradients_agree(select, fused, data):
    N, D, F = data.draw(st.integers(0, 11)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    k = data.draw(st.integers(0, F + 1))
    glu, norm, seed = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(0, 1000))
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=N, max_size=N).map(lambda kept: torch.tensor(kept, dtype=torch.bool)))
    check_agreement(select, *problem(N, D, F, glu, norm, seed), k, mask, fused, **DOUBLE)


@pytest.mark.parametrize("fused", [False, True, "both"])
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("run", [sparse, *with_cpp], ids=["torch", "native", "screened"])
def test_float32_agrees(select, glu, fused, run):
    mask = torch.arange(70) % 5 != 0
    check_agreement(select, *problem(70, 32, 128, glu, True, 0, torch.float32), 8, mask, fused, run, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", with_cpp, ids=["native", "screened"])
@pytest.mark.parametrize("fused", [False, True, "both"])
@pytest.mark.parametrize("select", SELECTIONS)
@quick
@given(st.data())
def test_native_codes_and_gradients_agree(run, select, fused, data):
    """Any shape, down to nothing."""
    N, D, F = data.draw(st.integers(0, 11)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    k, norm, seed = data.draw(st.integers(0, min(F + 1, 12))), data.draw(st.booleans()), data.draw(st.integers(0, 1000))
    mask = data.draw(st.none() | st.lists(st.booleans(), min_size=N, max_size=N).map(lambda kept: torch.tensor(kept, dtype=torch.bool)))
    parts = problem(N, D, F, False, norm, seed, torch.float32)
    check_agreement(select, *parts, k, mask, fused, run, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("select", ["relu", "threshold", "jumprelu"])
@pytest.mark.parametrize("bias", [0.0, -4.0])
def test_codes_are_sparse_where_few_latents_fire(select, bias):
    """The form follows the number of entries of some rows; the numbers are those of the reference either way."""
    run = SparseOps((torch_kernels,), largest_density=0.1)
    x, W_D, encoder = problem(50, 8, 64, False, False, 1)
    encoder = encoder._replace(b=torch.full((64,), bias, dtype=torch.float64, requires_grad=True))
    codes = select_codes(run, select, x, encoder, 1, None, torch.full((64,), 0.5, dtype=torch.float64))
    assert isinstance(codes, SparseCodes) == (bias < 0)
    check_agreement(select, x, W_D, encoder, 1, None, run=run, **DOUBLE)


@pytest.mark.parametrize("scale", [0.001, 1.0, 1000.0])
@pytest.mark.parametrize("share", [(1.25, 4.0), (0.3, 0.5), (0.3,), ()])
def test_batch_topk_is_exact_however_wrong_the_guess(monkeypatch, scale, share):
    """Rows of very different size, sampled at the large ones (every fifth): the guess is far too high, and the search has to widen."""
    monkeypatch.setattr(sparse_module, "CANDIDATES", share)
    x, W_D, encoder = problem(20, 4, 30, False, True, 3)
    factors = torch.where(torch.arange(20) % 5 == 0, scale, 1.0).double()[:, None]
    check_agreement("batchtopk", (x * factors).detach().requires_grad_(), W_D, encoder, 4, None, **DOUBLE)


def test_batch_topk_finds_its_candidates_by_the_guess(monkeypatch):
    """Even rows need one look, and few candidates."""
    monkeypatch.setattr(sparse_module, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(sparse_module, "SAMPLED_ROWS", 128)
    looks, entries_above = [], SparseOps.entries_above

    def counting(*arguments):
        looks.append(entries_above(*arguments))
        return looks[-1]

    monkeypatch.setattr(SparseOps, "entries_above", counting)
    x, _, encoder = problem(400, 8, 200, False, False, 4)
    sparse.batch_topk_codes(x, encoder, 10)
    assert len(looks) == 1
    assert 4000 <= looks[0].q.numel() < 8000


@st.composite
def rows_with_ties(draw):
    n = draw(st.integers(0, 9))
    values = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 1.0, 2.0]), min_size=n * 6, max_size=n * 6))
    return torch.tensor(values, dtype=torch.float64).view(n, 6)


@quick
@given(rows_with_ties(), st.integers(0, 6))
def test_ties_fall_either_way_with_the_same_values(h, k):
    eye = Encoder(torch.eye(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
    for select in ("topk_codes", "batch_topk_codes"):
        mine, theirs = (getattr(module, select)(h, eye, k) for module in (sparse, reference))
        assert sorted(mine.values[mine.values > 0].tolist()) == sorted(theirs.values[theirs.values > 0].tolist())
        assert torch.all((mine.to_dense() == 0) | (mine.to_dense() == h))
        if select == "topk_codes":
            assert torch.equal(mine.counts(), theirs.counts())


def test_entries_that_do_not_fire_get_no_gradient():
    x = torch.tensor([[1.0, -1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    encoder = Encoder(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    for k in (1, 2, 3):
        codes = sparse.topk_codes(x, encoder, k)
        assert codes.values.numel() == k
        (gradient,) = torch.autograd.grad(codes.values.sum(), x)
        assert gradient.tolist() == [[1.0, 0.0, 0.0]]


def test_gradients_are_made_only_where_asked_for():
    x, W_D, encoder = problem(6, 3, 5, True, True, 0)
    parts = {"x": x, "W": encoder.W, "b": encoder.b, "W_glu": encoder.W_glu, "b_glu": encoder.b_glu}
    expected = dict(zip(parts, torch.autograd.grad(sparse.topk_codes(x, encoder, 2).values.sum(), list(parts.values())), strict=True))
    for name in parts:
        only = {other: part.detach().requires_grad_(other == name) for other, part in parts.items()}
        values = sparse.topk_codes(only["x"], Encoder(only["W"], only["b"], only["W_glu"], only["b_glu"], encoder.gate_norm), 2).values
        values.sum().backward()
        assert [other for other, part in only.items() if part.grad is not None] == [name]
        torch.testing.assert_close(only[name].grad, expected[name])
    with torch.no_grad():
        assert not sparse.topk_codes(x, encoder, 2).values.requires_grad
    codes = SparseCodes(torch.ones(2, dtype=torch.float64), torch.tensor([1, 0]), torch.tensor([0, 1, 1, 2]), 5)
    assert not sparse.decode(codes, W_D.detach()).requires_grad


@quick
@given(st.lists(st.lists(st.integers(0, 4), unique=True, max_size=5), max_size=6), st.integers(0, 100))
def test_decoding_ragged_rows_agrees(rows, seed):
    """Rows of any length, empty ones at either end, indices in any order."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    indices = torch.tensor([latent for row in rows for latent in row], dtype=torch.int64)
    values, W_D = random(g, len(indices)), random(g, 5, 3)
    target = torch.randn(len(rows), 3, generator=g, dtype=torch.float64)
    results = []
    for module in (reference, sparse):
        output = module.decode(SparseCodes(values, indices, offsets, 5), W_D)
        results.append((output, *torch.autograd.grad((output - target).square().sum(), (values, W_D))))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, **DOUBLE)


@pytest.mark.parametrize("select", ["topk", "batchtopk"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_is_as_good_as_the_references(select, weights):
    """In autocast the same selection, and gradients at least about as close to those in float64: sums are wider here."""
    x, W_D, encoder = problem(40, 16, 32, True, True, 0, weights)
    exact = [part.detach().double().requires_grad_() for part in (x, W_D, *encoder)]
    truth = outcome(reference, select, exact[0], exact[1], Encoder(*exact[2:]), 4, None)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = outcome(reference, select, x, W_D, encoder, 4, None)
        mine = outcome(sparse, select, x, W_D, encoder, 4, None)
    assert torch.equal(mine["codes"] != 0, theirs["codes"] != 0)
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype
        errors = [(v.double() - truth[name]).norm() / truth[name].norm() for v in (value, theirs[name])]
        assert errors[0] < 1.5 * errors[1], name


def test_autocast_is_not_left_with_weights_that_have_no_gradient():
    """Autocast keeps its narrow copies of weights; one made without gradient would cut off those who use the weight next."""
    x, _, encoder = problem(6, 3, 5, False, False, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sparse.topk_codes(x, encoder, 2)
        assert torch.is_autocast_enabled("cpu")
        h = ops.pre_activations(x, encoder)
    assert torch.autograd.grad(h.float().sum(), encoder.W)[0].count_nonzero() > 0


def test_weights_changed_before_backward_are_noticed():
    x, _, encoder = problem(6, 3, 5, False, False, 0)
    values = sparse.topk_codes(x, encoder, 2).values
    with torch.no_grad():
        encoder.W.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


def test_nothing_of_the_size_of_dense_codes_is_kept():
    x, W_D, encoder = problem(64, 4, 256, True, True, 0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        sparse.decode(sparse.topk_codes(x, encoder, 2), W_D)
        sparse.decode(sparse.batch_topk_codes(x, encoder, 2), W_D)
    assert max(saved) <= W_D.numel() < 64 * 256


def test_entries_are_sorted_once():
    x, W_D, encoder = problem(8, 3, 9, False, True, 0)
    codes = sparse.topk_codes(x, encoder, 2)
    _, error = sparse.reconstruct(ops.map_codes(codes, torch.clone), W_D, None, x.detach())
    error.sum().backward()
    assert codes.pattern.by_latent is not None
    assert torch.equal(codes.indices[codes.pattern.by_latent.order], codes.indices.sort(stable=True).values)


def test_choosing(monkeypatch):
    x, W_D, encoder = problem(6, 3, 5, False, False, 0)
    ran = []
    monkeypatch.setattr(reference, "topk_codes", lambda *_: ran.append("reference"))
    names = {id(run): name for name, run in ops._IMPLEMENTATIONS.items()}
    monkeypatch.setattr(SparseOps, "topk_codes", lambda run, *_: ran.append(names[id(run)]))
    monkeypatch.delenv("LM_SAES_OPS", raising=False)
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "screening_pays", lambda: False)
    assert "on CPUs native" in ops.explain()
    assert "LM_SAES_OPS is not set" in ops.explain()
    for name in (None, "auto", "native", "sparse", "reference"):
        if name is not None:
            monkeypatch.setenv("LM_SAES_OPS", name)
            assert name in ops.explain()
        ops.topk_codes(x, encoder, 2)
    assert ran == ["native", "native", "native", "sparse", "reference"]
    monkeypatch.setenv("LM_SAES_OPS", "auto")
    monkeypatch.setattr(native, "screening_pays", lambda: True)
    ops.topk_codes(x, encoder, 2)
    assert ran[-1] == "screened"
    assert "on CPUs screened" in ops.explain()
    ops.topk_codes(x.to("meta"), encoder, 2)
    assert ran[-1] == "reference"
    monkeypatch.setenv("LM_SAES_OPS", "fastest")
    with pytest.raises(ConfigError, match="LM_SAES_OPS must be one of auto, reference, sparse, native, screened, got 'fastest'"):
        ops.decode(torch.zeros(1, 5), W_D)


def test_without_compiled_kernels_torch_serves(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "describe", lambda: "no native kernels: not compiled")
    monkeypatch.setenv("LM_SAES_OPS", "auto")
    assert "sparse, without dense codes, in torch (no native kernels: not compiled)" in ops.explain()
    x, W_D, encoder = problem(6, 3, 5, False, False, 0, torch.float32)
    assert ops.decode(ops.topk_codes(x, encoder, 2), W_D).shape == (6, 3)
    monkeypatch.setenv("LM_SAES_OPS", "native")
    with pytest.raises(ConfigError, match="not compiled; unset it to run in plain torch"):
        ops.topk_codes(x, encoder, 2)
