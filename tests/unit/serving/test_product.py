"""The product with a wide weight: packed where that loses nothing, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from serving.product import Head, is_held_by_halves, product

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


@needs_fbgemm
def test_a_checkpoint_of_four_bytes_is_not() -> None:
    assert not is_held_by_halves(weight(24, 16, torch.float32))


@needs_fbgemm
@pytest.mark.parametrize("value", [70_000.0, float("nan")])
def test_one_value_that_is_no_half_keeps_the_weight_as_it_is(value: float) -> None:
    wide = weight(5000, 8)
    wide[4999, 7] = value
    assert not is_held_by_halves(wide)


@needs_fbgemm
def test_small_weights_are_judged_by_their_own_size() -> None:
    assert is_held_by_halves(weight(24, 16) * 2**-6)
    assert not is_held_by_halves(weight(24, 16) * 2**-16)  # all of them below the smallest normal half


def test_weights_of_another_type_are_multiplied_as_they_are() -> None:
    narrow = weight(24, 16).bfloat16()
    x = torch.randn(3, 16).bfloat16()
    assert torch.equal(product(narrow)(x), linear(x, narrow))


@needs_fbgemm
@pytest.mark.parametrize("tokens", [0, 1, 2, 6, 7, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_products_are_the_float32_ones(tokens: int, has_bias: bool) -> None:
    wide = weight(70, 48)
    bias = torch.randn(70) if has_bias else None
    x = torch.randn(1, tokens, 48)

    assert is_held_by_halves(wide)
    got = product(wide, bias)(x)

    assert got.shape == (1, tokens, 70)
    torch.testing.assert_close(got, linear(x, wide, bias), rtol=1e-5, atol=1e-5)


@needs_fbgemm
def test_a_head_with_a_bias_keeps_its_weight_to_look_at() -> None:
    plain = torch.nn.Linear(16, 24)
    plain.weight.data = weight(24, 16)
    x = torch.randn(1, 2, 16)

    head = Head(plain)

    assert head.weight is plain.weight
    torch.testing.assert_close(head(x), plain(x), rtol=1e-5, atol=1e-5)
