"""The sparse form is the dense one written otherwise, for every shape and every gradient."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from lm_saes import ops
from lm_saes.ops import SparseCodes

quick = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def dense_codes(draw):
    """Codes with empty rows, full rows, no rows, no latents on."""
    n, f = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    values = draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5]), min_size=n * f, max_size=n * f))
    return torch.tensor(values, dtype=torch.float64).view(n, f)


@quick
@given(dense_codes())
def test_there_and_back(dense):
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.to_dense(), dense)
    assert codes.n_rows == len(dense)
    assert codes.offsets.tolist() == [0, *(dense != 0).sum(1).cumsum(0).tolist()]
    assert torch.equal(codes.counts(), (dense != 0).sum(1))
    assert torch.equal(ops.counts(dense), codes.counts())
    assert torch.equal(ops.to_dense(codes), ops.to_dense(dense))


@quick
@given(dense_codes())
def test_the_algebra_agrees_with_the_dense_form(dense):
    codes = SparseCodes.from_dense(dense)
    scale, weights = torch.linspace(0.5, 2, dense.shape[1], dtype=torch.float64), torch.linspace(-1, 1, len(dense), dtype=torch.float64)
    torch.testing.assert_close(ops.scale_latents(codes, scale).to_dense(), ops.scale_latents(dense, scale))
    torch.testing.assert_close(ops.map_codes(codes, torch.tanh).to_dense(), ops.map_codes(dense, torch.tanh))
    torch.testing.assert_close(ops.row_sums(codes), ops.row_sums(dense))
    torch.testing.assert_close(ops.latent_sums(codes, weights), ops.latent_sums(dense, weights))


def test_zero_entries_do_not_count():
    codes = SparseCodes(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([1, 0, 2]), torch.tensor([0, 2, 2, 3]), 3)
    assert codes.counts().tolist() == [1, 0, 0]
    assert codes.rows.tolist() == [0, 0, 2]


RAGGED = SparseCodes(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True), torch.tensor([3, 0, 2]), torch.tensor([0, 2, 2, 3]), 4)


def of_values(function):
    return lambda values, *rest: function(SparseCodes(values, RAGGED.indices, RAGGED.offsets, RAGGED.n_latents), *rest)


def test_gradients():
    scale = torch.rand(4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(of_values(lambda c: c.to_dense()), (RAGGED.values,))
    assert gradcheck(of_values(lambda c, s: ops.scale_latents(c, s).values), (RAGGED.values, scale))
    assert gradcheck(of_values(ops.row_sums), (RAGGED.values,))
    assert gradcheck(of_values(ops.latent_sums), (RAGGED.values, weights))


def test_sums_of_half_precision_are_made_in_float32():
    codes = torch.full((3000, 2), 0.001, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for form in (codes, SparseCodes.from_dense(codes)):
            wide = ops.scale_latents(form, torch.ones(2))
            sums = ops.latent_sums(wide, torch.ones(3000))
            assert sums.dtype == torch.float32
            torch.testing.assert_close(sums, codes.float().sum(0), rtol=1e-4, atol=0)
