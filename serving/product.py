"""The product of tokens with a weight, by the quickest way on a processor.

A decoding step waits for the weights to come from memory. MKL's float32 product reads them at full width, and takes
for two tokens nearly twice as long as for one. FBGEMM's reads them in half precision, once for up to six tokens, and
still multiplies and sums in float32. It is used where half precision holds the weights as they are, which those of a
checkpoint in bfloat16 or float16 are, but for the very small. Many tokens (a prompt's) wait for the multiplications
instead, and take two thirds of the time where a processor multiplies bfloat16 (DECISIONS.md has the measurements).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Product = Callable[[Tensor], Tensor]

LOSS = 2.0**-14  # of the largest weight; a float32 made a half would lose up to 2⁻¹¹ of itself, and is left alone
SLICE_ROWS = 4096  # looked at together, so that a vocabulary's width needs no second copy
FEW_TOKENS = 8  # for more of them bfloat16 is quicker than halves, on a processor that multiplies it


def product(weight_OI: Tensor, bias_O: Tensor | None, *, many: torch.dtype | None = None) -> Product:
    """``x[…, I] → x @ weightᵀ + bias``; of more than ``FEW_TOKENS`` tokens in the type ``many``, where one is given."""
    few = packed(weight_OI, bias_O)
    if many is None:
        return few or partial(linear, weight=weight_OI, bias=bias_O)
    weight, bias = weight_OI.to(many), None if bias_O is None else bias_O.to(many)

    def rounded(x: Tensor) -> Tensor:
        return linear(x.to(many), weight, bias).to(x.dtype)

    if few is None:
        return rounded
    limit = FEW_TOKENS * weight_OI.shape[1]
    return lambda x: few(x) if x.numel() <= limit else rounded(x)


def packed(weight_OI: Tensor, bias_O: Tensor | None) -> Product | None:
    """``x[…, I] → x @ weightᵀ + bias`` with its own copy of the weight; None where half precision does not hold it."""
    if not _is_held_by_halves(weight_OI):
        return None
    ops: Any = torch.ops.quantized
    halves = ops.linear_prepack_fp16(weight_OI.contiguous(), bias_O)
    multiply: Callable[[Tensor, Any], Tensor] = ops.linear_dynamic_fp16.default
    return lambda x: multiply(x, halves)


def _is_held_by_halves(weight_OI: Tensor) -> bool:
    """Whether FBGEMM takes this weight, and half precision moves nothing by more than ``LOSS`` of the largest value."""
    if weight_OI.device.type != "cpu" or weight_OI.dtype != torch.float32:
        return False
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    parts = torch.split(weight_OI, SLICE_ROWS)
    largest = max(float(part.abs().max()) for part in parts)
    return all(bool(((part - part.half().float()).abs() <= LOSS * largest).all()) for part in parts)


class Head(nn.Module):
    """Stands where the model's output embedding stood; some models look at its ``weight``."""

    def __init__(self, weight_VI: Tensor, multiply: Product) -> None:
        super().__init__()
        self.weight = weight_VI
        self.forward = multiply


def pack_head(model: Any) -> None:
    """Give ``model`` a packed head where the head is a plain linear that half precision holds."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and (multiply := packed(head.weight.data, head.bias)):
        model.set_output_embeddings(Head(head.weight, multiply))
