"""The product with a wide weight: packed where that loses nothing, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from serving.product import FEW_TOKENS, Head, pack_head, packed, product

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
    assert packed(weight(24, 16, dtype), None)


@needs_fbgemm
def test_a_checkpoint_of_four_bytes_is_not() -> None:
    assert not packed(weight(24, 16, torch.float32), None)


@needs_fbgemm
@pytest.mark.parametrize("value", [70_000.0, float("nan")])
def test_one_value_that_is_no_half_keeps_the_weight_as_it_is(value: float) -> None:
    wide = weight(5000, 8)
    wide[4999, 7] = value
    assert not packed(wide, None)


@needs_fbgemm
def test_small_weights_are_judged_by_their_own_size() -> None:
    assert packed(weight(24, 16) * 2**-6, None)
    assert not packed(weight(24, 16) * 2**-16, None)  # all of them below the smallest normal half


def test_weights_of_another_type_are_left_as_they_are() -> None:
    assert not packed(weight(24, 16).bfloat16(), None)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_many_tokens_are_multiplied_in_the_type_for_many(stored: torch.dtype, has_bias: bool) -> None:
    wide, bias = weight(70, 48, stored), torch.randn(70) if has_bias else None
    multiply = product(wide, bias, many=torch.bfloat16)
    for tokens in (1, FEW_TOKENS, FEW_TOKENS + 1, 40):
        x = torch.randn(1, tokens, 48)
        found, exact = multiply(x), linear(x, wide, bias)
        rounded = linear(x.bfloat16(), wide.bfloat16(), None if bias is None else bias.bfloat16()).float()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, atol=0.02, rtol=0.02)
        is_exact = tokens <= FEW_TOKENS and packed(wide, bias) is not None
        torch.testing.assert_close(found, exact if is_exact else rounded, atol=1e-5, rtol=1e-5)


def test_without_a_type_for_many_every_product_is_exact() -> None:
    wide, x = weight(70, 48, torch.float32), torch.randn(1, 40, 48)
    assert torch.equal(product(wide, None)(x), linear(x, wide))


@needs_fbgemm
@pytest.mark.parametrize("tokens", [0, 1, 2, 6, 7, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_products_are_the_float32_ones(tokens: int, has_bias: bool) -> None:
    wide = weight(70, 48)
    bias = torch.randn(70) if has_bias else None
    x = torch.randn(1, tokens, 48)

    multiply = packed(wide, bias)
    assert multiply
    got = multiply(x)

    assert got.shape == (1, tokens, 70)
    torch.testing.assert_close(got, linear(x, wide, bias), rtol=1e-5, atol=1e-5)


class WithHead(torch.nn.Module):
    """As much of a model as ``pack_head`` looks at."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def set_output_embeddings(self, head: torch.nn.Module) -> None:
        self.head = head


@needs_fbgemm
def test_a_packed_head_keeps_its_weight_to_look_at() -> None:
    plain = torch.nn.Linear(16, 24)
    plain.weight.data = weight(24, 16)
    model = WithHead(plain)
    x = torch.randn(1, 2, 16)

    pack_head(model)

    assert isinstance(model.head, Head) and model.head.weight is plain.weight
    torch.testing.assert_close(model.head(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [torch.nn.Linear(16, 24), torch.nn.Sequential(torch.nn.Linear(16, 24))])
def test_a_head_that_cannot_be_packed_stays(head: torch.nn.Module) -> None:
    model = WithHead(head)
    pack_head(model)
    assert model.head is head
