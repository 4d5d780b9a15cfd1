"""The operations, by each implementation, against NumPy, at ties and at every extreme of k; every gradient by finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lm_saes import ops
from lm_saes.ops import Encoder, SparseCodes, reference

D, F = 4, 6
quick = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(scope="module", autouse=True, params=["reference", "sparse", "auto"])
def implementation(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_SAES_OPS", request.param)
        yield


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def encoder(glu=False, norm=False):
    return Encoder(
        tensor(D, F, seed=1),
        tensor(F, seed=2),
        tensor(D, F, seed=3) if glu else None,
        tensor(F, seed=4) if glu else None,
        tensor(F, seed=5).abs() + 0.2 if norm else None,
    )


def identity(norm=None):
    """An encoder whose pre-activations are its input."""
    return Encoder(torch.eye(F, dtype=torch.float64), torch.zeros(F, dtype=torch.float64), gate_norm=norm)


@st.composite
def rows_with_ties(draw):
    n = draw(st.integers(0, 4))
    values = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 1.0, 2.0]), min_size=n * F, max_size=n * F))
    return torch.tensor(values, dtype=torch.float64).view(n, F)


def check_selection(chosen, candidates, k):
    """What is chosen is positive, at most k, as many as there are, and nothing better is left out. Ties may fall either way."""
    positive = candidates[candidates > 0]
    assert sorted(chosen.tolist(), reverse=True) == sorted(positive.tolist(), reverse=True)[:k]


@quick
@given(rows_with_ties(), st.integers(0, F), st.booleans())
def test_topk_at_ties(h, k, with_norm):
    norm = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 4.0], dtype=torch.float64) if with_norm else None
    codes = ops.topk_codes(h, identity(norm), k)
    assert codes.offsets.tolist() == [k * row for row in range(len(h) + 1)]
    dense, gate = codes.to_dense(), h if norm is None else h * norm
    assert torch.all((dense == 0) | (dense == h))
    for row in range(len(h)):
        check_selection(gate[row][dense[row] != 0], gate[row], k)
        assert len(set(codes.indices[k * row : k * row + k].tolist())) == k


@quick
@given(rows_with_ties(), st.integers(0, F), st.booleans(), st.data())
def test_batch_topk_at_ties(h, k, with_norm, data):
    norm = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 4.0], dtype=torch.float64) if with_norm else None
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(h), max_size=len(h))), dtype=torch.bool)
    for rows in (mask, None):
        codes = ops.batch_topk_codes(h, identity(norm), k, rows)
        keep = torch.ones(len(h), dtype=torch.bool) if rows is None else rows
        dense, gate = codes.to_dense(), h if norm is None else h * norm
        assert torch.all((dense == 0) | (dense == h))
        assert torch.all(dense[~keep] == 0)
        check_selection(gate[keep][dense[keep] != 0], gate[keep], k * int(keep.sum()))
        assert torch.all(codes.offsets.diff() >= 0)
        assert codes.offsets[-1] == codes.values.numel()


def test_extremes_of_k():
    x, e = tensor(5, D), encoder(norm=True)
    h = ops.pre_activations(x, e)
    for select in (ops.topk_codes, ops.batch_topk_codes):
        assert select(x, e, 0).to_dense().count_nonzero() == 0
        assert torch.equal(select(x, e, F).to_dense(), h.relu())
        assert torch.equal(select(x, e, F + 5).to_dense(), h.relu())
        assert select(x[:0], e, 2).to_dense().shape == (0, F)
        assert select(x[:1], e, 2).to_dense().count_nonzero() <= 2
    assert ops.batch_topk_codes(x, e, 3, torch.zeros(5, dtype=torch.bool)).to_dense().count_nonzero() == 0


@pytest.mark.parametrize("glu", [False, True])
def test_pre_activations_of_some_latents(glu):
    x, e, latents = tensor(5, D), encoder(glu, norm=True), torch.tensor([4, 1])
    h = ops.pre_activations(x, e)
    expected = x.detach().numpy() @ e.W.detach().numpy() + e.b.detach().numpy()
    if glu:
        expected = expected / (1 + np.exp(-(x.detach().numpy() @ e.W_glu.detach().numpy() + e.b_glu.detach().numpy())))
    np.testing.assert_allclose(h.detach(), expected, rtol=1e-12)
    torch.testing.assert_close(ops.pre_activations(x, e, latents), h[:, latents])
    torch.testing.assert_close(ops.gate_values(h[:, latents], e, latents), ops.gate_values(h, e)[:, latents])
    torch.testing.assert_close(ops.gate_values(h[:, latents], e.select(latents)), (h * e.gate_norm)[:, latents])
    assert gradcheck(lambda *tensors: ops.pre_activations(tensors[0], Encoder(*tensors[1:]), latents), (x, *[t for t in e[:4] if t is not None]))


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("select", [ops.topk_codes, ops.batch_topk_codes])
@pytest.mark.parametrize("k", [0, 2, F])
def test_gradients_of_selection(select, glu, k):
    x, e = tensor(5, D), encoder(glu, norm=True)
    weights = [t for t in e[:4] if t is not None]
    assert gradcheck(lambda x, *w: select(x, Encoder(*[*w, None, None][:4], e.gate_norm.detach()), k).to_dense(), (x, *weights))


def test_no_gradient_flows_through_gates():
    x = tensor(5, D)
    W_D = tensor(F, D, seed=7)
    e = encoder()._replace(gate_norm=W_D.norm(dim=1))
    h = ops.pre_activations(x, e)
    q = ops.gate_values(h, e)
    results = [ops.topk_codes(x, e, 2).to_dense(), ops.batch_topk_codes(x, e, 2).to_dense(), reference.gated(h, q, 0.1)]
    results.append(reference.jumprelu(h, q, torch.full((F,), 0.1, dtype=torch.float64), 1.0))
    for codes in results:
        assert torch.autograd.grad(codes.sum(), W_D, allow_unused=True, retain_graph=True) == (None,)


def test_gate_by_hand():
    h = torch.tensor([[-1.0, 0.0, 0.5, 2.0]], requires_grad=True)
    codes = reference.gated(h, -h, -3.0)  # gate and sign disagree: both must hold
    assert codes.tolist() == [[0.0, 0.0, 0.5, 2.0]]
    codes.sum().backward()
    assert h.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    assert reference.gated(h, h, torch.tensor(0.5, dtype=torch.float64)).tolist() == [[0.0, 0.0, 0.0, 2.0]]


def test_jumprelu_by_hand():
    """theta 1, window 1: the rectangle reaches from 0.5 to 1.5, and needs h > 0."""
    q = torch.tensor([[0.4, 0.6, 1.2, 1.6, 0.9]])
    h = torch.tensor([[0.2, 0.3, 0.6, 0.8, -0.45]], requires_grad=True)
    theta = torch.ones(5, requires_grad=True)
    codes = reference.jumprelu(h, q, theta, 1.0)
    assert codes.tolist() == [[0.0, 0.0, pytest.approx(0.6), pytest.approx(0.8), 0.0]]
    (codes * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert h.grad.tolist() == [[0.0, 0.0, 3.0, 4.0, 0.0]]
    assert theta.grad.tolist() == [0.0, -2.0, -3.0, 0.0, 0.0]


RAGGED_OFFSETS = torch.tensor([0, 3, 3, 4, 4])


@pytest.mark.parametrize("indices", [[5, 0, 2, 3], [0, 1, 2, 0]])
def test_decode_of_ragged_rows(indices):
    values, W_D = tensor(4), tensor(F, D, seed=8)

    def product(values, W_D):
        return ops.decode(SparseCodes(values, torch.tensor(indices), RAGGED_OFFSETS, F), W_D)

    torch.testing.assert_close(product(values, W_D), SparseCodes(values, torch.tensor(indices), RAGGED_OFFSETS, F).to_dense() @ W_D)
    assert torch.all(product(values, W_D)[[1, 3]] == 0)
    assert gradcheck(product, (values, W_D))
    assert gradcheck(ops.decode, (tensor(3, F), W_D))


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("k", [0, 1, F])
def test_decode_equals_the_dense_product_with_its_gradients(n, k):
    gradients = []
    for dense in (True, False):
        x, W_D = tensor(n, D), tensor(F, D, seed=8)
        e = encoder(norm=True)
        codes = ops.topk_codes(x, e, k)
        output = ops.decode(codes.to_dense() if dense else codes, W_D)
        assert output.shape == (n, D)
        gradients.append((output, *torch.autograd.grad(output.square().sum(), (x, e.W, e.b, W_D))))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision(weights):
    """Under autocast products are made in bfloat16, decisions in float32; bfloat16 weights work too."""
    x, W_D = tensor(8, D).detach().to(weights), tensor(F, D, seed=8).detach().to(weights).requires_grad_()
    e = Encoder(*[None if t is None else t.detach().to(weights).requires_grad_() for t in encoder(glu=True, norm=True)])
    exact = Encoder(*[t.detach().double() for t in e])
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.gate_values(ops.pre_activations(x, e), e).dtype == torch.float32
        for select in (ops.topk_codes, ops.batch_topk_codes):
            codes = select(x, e, 3)
            output = ops.decode(codes, W_D)
            expected = ops.decode(ops.to_dense(select(x.double(), exact, 3)), W_D.detach().double())
            assert (output.double() - expected).norm() < 0.05 * expected.norm()  # 8 bits, a few roundings
            output.float().sum().backward()
    assert all(t.grad.isfinite().all() and t.grad.dtype == weights for t in (*e[:4], W_D))
