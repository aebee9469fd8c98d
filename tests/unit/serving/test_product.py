"""The product with a wide weight: packed where that loses nothing, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from serving.product import is_held_by_halves, product

needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this processor has no FBGEMM"
)


def weight(outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Entries as a checkpoint of ``dtype`` has them, read as float32."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    return (torch.randn(outputs, inputs, generator=generator) * 0.02).to(dtype).float()


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_of_two_bytes_is_packed(dtype: torch.dtype) -> None:
    assert is_held_by_halves(weight(24, 16, dtype))


def test_a_checkpoint_of_four_bytes_is_not() -> None:
    assert not is_held_by_halves(weight(24, 16, torch.float32))


def test_one_value_too_large_for_a_half_keeps_the_weight_as_it_is() -> None:
    wide = weight(5000, 8)
    wide[4999, 7] = 70_000.0
    assert not is_held_by_halves(wide)


def test_weights_of_another_type_are_multiplied_as_they_are() -> None:
    narrow = weight(24, 16).bfloat16()
    x = torch.randn(3, 16).bfloat16()
    assert torch.equal(product(narrow)(x), linear(x, narrow))


@needs_fbgemm
@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_products_are_the_float32_ones(tokens: int, has_bias: bool) -> None:
    wide = weight(70, 48)
    bias = torch.randn(70) if has_bias else None
    x = torch.randn(1, tokens, 48)

    got = product(wide, bias)(x)

    assert got.shape == (1, tokens, 70)
    torch.testing.assert_close(got, linear(x, wide, bias), rtol=1e-5, atol=1e-5)


@needs_fbgemm
def test_the_weights_tiny_values_are_lost_by_a_hair_only() -> None:
    tiny = torch.full((8, 8), 1e-8)
    got = product(tiny)(torch.ones(1, 8))
    assert float((got - 8e-8).abs().max()) <= 8 * 2**-25
