"""Many versions' low-rank deltas in two launches, on a GPU: inputs to ranks, then ranks to outputs, in place.

Each token names its slot; those of slot 0, the base, leave at once, and no other slot is read than those in use.
Sums are in float32. Imported only where Triton is: PyTorch for CUDA brings it.

Dimensions: T tokens, I inputs, O outputs of a group, W its ranks side by side (one member's after the other's), C
chunks of the inputs, each summed by a program of its own.
"""

# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from serving.decode_ops import Delta

CHUNK = 256  # inputs that one program multiplies


def shrink(x_TI: Tensor, a_SIW: Tensor, slots_T: Tensor, ranks_S: Tensor, members: int) -> Tensor:
    """``x @ a[slot]`` for each token, [C, T, W]: the sums of each chunk of inputs; rows of slot 0 are not written."""
    tokens, inputs = x_TI.shape
    width = a_SIW.shape[2]
    chunks = triton.cdiv(inputs, CHUNK)
    low_CTW = torch.empty(chunks, tokens, width, dtype=torch.float32, device=x_TI.device)
    wide = max(16, triton.next_power_of_2(width))
    _shrink[(tokens, chunks)](
        x_TI, a_SIW, low_CTW, slots_T, ranks_S, inputs, width, members, x_TI.stride(0),
        CHUNK=CHUNK, BLOCK=min(CHUNK, max(16, 4096 // wide)), WIDE=wide, num_warps=4,
    )  # fmt: skip
    return low_CTW


def add_deltas(y_TO: Tensor, delta: Delta) -> None:
    """``y += low @ b[slot]`` for each token."""
    sizes, outputs = delta.sizes, y_TO.shape[1]
    block = _block(sizes)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))] + [outputs] * 2
    numbers, constants = launch(delta)
    _expand[(y_TO.shape[0], outputs // block)](
        y_TO, *numbers, y_TO.stride(0), FIRST=ends[0], SECOND=ends[1], BLOCK=block, **constants, num_warps=4
    )


def launch(delta: Delta) -> tuple[tuple[Any, ...], dict[str, int]]:
    """What a kernel is given that adds ``delta`` to what it reads: arguments, and constants."""
    chunks, tokens, width = delta.low_CTW.shape
    numbers = delta.b_SWO, delta.low_CTW, delta.slots_T, delta.ranks_S, tokens, width, delta.b_SWO.shape[2], chunks
    ranks = triton.next_power_of_2(width // len(delta.sizes))
    return numbers, {"CHUNKS": triton.next_power_of_2(chunks), "RANK": ranks}


def _block(sizes: list[int]) -> int:
    """Outputs of one program: none of two members."""
    block = 256
    while any(size % block for size in sizes):
        block //= 2
    return block


@triton.jit
def _shrink(
    x_ptr, a_ptr, low_ptr, slots_ptr, ranks_ptr, inputs, width, members, x_stride,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    chunk = tl.program_id(1)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot == 0:
        return
    used = tl.load(ranks_ptr + slot) * members
    w = tl.arange(0, WIDE)
    total = tl.zeros([WIDE], dtype=tl.float32)
    for start in range(0, CHUNK, BLOCK):
        i = chunk * CHUNK + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * x_stride + i, mask=i < inputs, other=0.0).to(tl.float32)
        is_in = (i[:, None] < inputs) & (w[None, :] < used)
        a = tl.load(a_ptr + slot * inputs * width + i[:, None] * width + w[None, :], mask=is_in, other=0.0)
        total += tl.sum(x[:, None] * a.to(tl.float32), axis=0)
    tl.store(low_ptr + (chunk * tl.num_programs(0) + token) * width + w, total, mask=w < width)


@triton.jit
def added(
    b_ptr, low_ptr, slot, rank, token, tokens, width, outputs, chunks, member, o, is_in,
    CHUNKS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """What the version in ``slot``, which is not 0, adds to one member's outputs ``o`` of a token."""
    r = tl.arange(0, RANK)
    rows = member * rank + r
    c = tl.arange(0, CHUNKS)
    is_part = (c[:, None] < chunks) & (r[None, :] < rank)
    parts = tl.load(low_ptr + (c[:, None] * tokens + token) * width + rows[None, :], mask=is_part, other=0.0)
    low = tl.sum(parts, axis=0)
    at = b_ptr + slot * width * outputs + rows[:, None] * outputs + o[None, :]
    b = tl.load(at, mask=(r[:, None] < rank) & is_in[None, :], other=0.0).to(tl.float32)
    return tl.sum(low[:, None] * b, axis=0)


@triton.jit(do_not_specialize=["tokens", "chunks"])
def _expand(
    y_ptr, b_ptr, low_ptr, slots_ptr, ranks_ptr, tokens, width, outputs, chunks, y_stride,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot == 0:
        return
    rank = tl.load(ranks_ptr + slot)
    member = 0
    if start >= FIRST:
        member = 1
    if start >= SECOND:
        member = 2
    o = start + tl.arange(0, BLOCK)
    delta = added(
        b_ptr, low_ptr, slot, rank, token, tokens, width, outputs, chunks, member, o, o < outputs, CHUNKS, RANK
    )
    y = tl.load(y_ptr + token * y_stride + o).to(tl.float32)
    tl.store(y_ptr + token * y_stride + o, (y + delta).to(y_ptr.dtype.element_ty))
