"""Eight bits: the bound on the error, and when dimensions are kept apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_saes.activations.quantization import Quantized, dequantize, find_outlier_dimensions, quantize

NONE = torch.tensor([], dtype=torch.int64)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-60000.0, 60000.0, allow_subnormal=False, width=16), min_size=1, max_size=24),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 3),
)
def test_each_entry_is_off_by_at_most_half_a_level(numbers, dtype, n_apart):
    x = torch.tensor(numbers).to(dtype).repeat(3, 1) * torch.tensor([[1.0], [0.0], [-0.5]], dtype=dtype)
    apart = torch.arange(min(n_apart, x.shape[1]))
    quantized = quantize(x, apart)
    error = (dequantize(quantized, apart) - x.float()).abs()
    ordinary = x.float().index_fill(1, apart, 0)
    assert (error <= ordinary.abs().amax(1, keepdim=True) / 254 * 1.0001 + 1e-37).all()
    assert (error[:, apart] == 0).all()


def test_by_hand():
    quantized = quantize(torch.tensor([[127.0, -1.4, 0.6, 1000.0]]), torch.tensor([3]))
    assert quantized.values.tolist() == [[127, -1, 1, 0]]
    assert quantized.scale.tolist() == [1.0]
    assert dequantize(quantized, torch.tensor([3]), torch.float16).tolist() == [[127.0, -1.0, 1.0, 1000.0]]
    assert dequantize(Quantized(*quantize(torch.zeros(1, 3), NONE)), NONE).tolist() == [[0.0, 0.0, 0.0]]


def test_sequences_keep_their_shape():
    x = torch.randn(2, 5, 8)
    quantized = quantize(x, torch.tensor([1, 7]))
    assert (quantized.values.shape, quantized.scale.shape, quantized.outliers.shape) == ((2, 5, 8), (2, 5), (2, 5, 2))
    assert torch.allclose(dequantize(quantized, torch.tensor([1, 7])), x, atol=float(x.abs().max()) / 250)


@pytest.mark.parametrize("loud", [[], [5], [5, 77, 200]])
def test_dimensions_that_are_always_large_are_found(loud):
    x = torch.randn(500, 256)
    x[:, loud] = 60 + torch.randn(500, len(loud))
    assert find_outlier_dimensions(x).tolist() == loud


def test_keeping_them_apart_is_worth_it():
    x = torch.randn(500, 256)
    x[:, 9] *= 100
    together, apart = ((dequantize(quantize(x, dimensions), dimensions) - x).norm() for dimensions in (NONE, torch.tensor([9])))
    assert apart < 0.1 * together


def test_narrow_vectors_keep_nothing_apart():
    assert find_outlier_dimensions(torch.randn(10, 63)).tolist() == []
