"""What a decoding step does between its matrix products, each in one launch on a GPU; as in ``serving.decode_ops``.

Sums and powers are in float32. Imported only where Triton is: PyTorch for CUDA brings it.

Dimensions: N rows, one token each, H query heads, K key-value heads, G query heads per key-value head, D head size,
R rows of memory, L places in each, S splits of a row's places.
"""

# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from serving.decode_ops import Delta
from serving.lora_kernels import add_deltas, added, launch, shrink

__all__ = ["FAILURES", "add_deltas", "add_norm", "attend", "gated", "norm", "shrink", "store"]

FAILURES: tuple[type[Exception], ...] = (RuntimeError, TritonError)

PLACES = 64  # read at once
UNSPLIT = 512  # rows up to this long are read by one program each
PROGRAMS = 256  # that longer ones are split into, all together


def norm(x_NI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm."""
    return _launch_norm(x_NI, x_NI, weight_I, eps, adds=False)


def add_norm(delta_NI: Tensor, residual_NI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """The norm of ``residual``, to which ``delta`` is added first, in place."""
    return _launch_norm(delta_NI, residual_NI, weight_I, eps, adds=True)


def _launch_norm(delta_NI: Tensor, residual_NI: Tensor, weight_I: Tensor, eps: float, *, adds: bool) -> Tensor:
    rows, size = residual_NI.shape
    out_NI = torch.empty_like(residual_NI)
    block = triton.next_power_of_2(size)
    warps = min(16, max(4, block // 512))
    _norm[(rows,)](delta_NI, residual_NI, weight_I, out_NI, size, eps, ADDS=adds, BLOCK=block, num_warps=warps)
    return out_NI


@triton.jit
def _norm(delta_ptr, residual_ptr, weight_ptr, out_ptr, size, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    is_in = i < size
    x = tl.load(residual_ptr + row * size + i, mask=is_in, other=0.0)
    kind = x.dtype
    if ADDS:
        delta = tl.load(delta_ptr + row * size + i, mask=is_in, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(kind)
        tl.store(residual_ptr + row * size + i, x, mask=is_in)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / size + eps)
    weight = tl.load(weight_ptr + i, mask=is_in, other=0.0).to(tl.float32)
    out = (wide * scale).to(kind).to(tl.float32) * weight
    tl.store(out_ptr + row * size + i, out.to(kind), mask=is_in)


def store(
    qkv_NO: Tensor, delta: Delta | None, cos_ND: Tensor, sin_ND: Tensor, places_N: Tensor,
    keys_RLKD: Tensor, values_RLKD: Tensor,
) -> Tensor:  # fmt: skip
    """Rotate queries and keys by their positions, keep keys and values at ``places``; the queries [N, H, D].

    ``delta`` is added first.
    """
    rows = qkv_NO.shape[0]
    heads, size = keys_RLKD.shape[2:]
    query_heads = qkv_NO.shape[1] // size - 2 * heads
    query = torch.empty(rows, query_heads, size, dtype=qkv_NO.dtype, device=qkv_NO.device)
    numbers, constants = _nothing(qkv_NO) if delta is None else launch(delta)
    _store[(rows, query_heads + 2 * heads)](
        qkv_NO, cos_ND, sin_ND, places_N, query, keys_RLKD, values_RLKD, *numbers,
        ADDS=delta is not None, HEADS=query_heads, KV_HEADS=heads, HALF=size // 2, **constants, num_warps=1,
    )  # fmt: skip
    return query


def _nothing(any_: Tensor) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Stands for ``launch`` where no delta is added."""
    return (any_, any_, any_, any_, 0, 0, 0, 0), {"CHUNKS": 1, "RANK": 1}


@triton.jit(do_not_specialize=["tokens", "chunks"])
def _store(
    qkv_ptr, cos_ptr, sin_ptr, places_ptr, query_ptr, keys_ptr, values_ptr,
    b_ptr, low_ptr, slots_ptr, ranks_ptr, tokens, width, outputs, chunks,
    ADDS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    CHUNKS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    SIZE: tl.constexpr = 2 * HALF
    d = tl.arange(0, HALF)
    source = qkv_ptr + row * (HEADS + 2 * KV_HEADS) * SIZE + head * SIZE
    x = tl.load(source + d).to(tl.float32)
    y = tl.load(source + HALF + d).to(tl.float32)
    kind = qkv_ptr.dtype.element_ty
    if ADDS:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        if slot > 0:
            rank = tl.load(ranks_ptr + slot)
            member = (head >= HEADS).to(tl.int32) + (head >= HEADS + KV_HEADS).to(tl.int32)
            o = head * SIZE + d
            x += added(
                b_ptr, low_ptr, slot, rank, row, tokens, width, outputs, chunks, member, o, d < HALF, CHUNKS, RANK
            )
            o += HALF
            y += added(
                b_ptr, low_ptr, slot, rank, row, tokens, width, outputs, chunks, member, o, d < HALF, CHUNKS, RANK
            )
            x = x.to(kind).to(tl.float32)
            y = y.to(kind).to(tl.float32)
    place = tl.load(places_ptr + row).to(tl.int64) * KV_HEADS * SIZE
    if head >= HEADS + KV_HEADS:
        target = values_ptr + place + (head - HEADS - KV_HEADS) * SIZE
        tl.store(target + d, x.to(kind))
        tl.store(target + HALF + d, y.to(kind))
    else:
        cos = tl.load(cos_ptr + row * SIZE + d).to(tl.float32)
        sin = tl.load(sin_ptr + row * SIZE + d).to(tl.float32)
        if head < HEADS:
            turned = query_ptr + (row * HEADS + head) * SIZE
            tl.store(turned + d, (x * cos - y * sin).to(kind))
            tl.store(turned + HALF + d, (y * cos + x * sin).to(kind))
        else:
            kept = keys_ptr + place + (head - HEADS) * SIZE
            tl.store(kept + d, (x * cos - y * sin).to(kind))
            tl.store(kept + HALF + d, (y * cos + x * sin).to(kind))


def attend(
    query_NHD: Tensor, keys_RLKD: Tensor, values_RLKD: Tensor, lengths_N: Tensor, *,
    scale: float, window: int | None, longest: int,
) -> Tensor:  # fmt: skip
    """[N, H · D]: token n looks at the last ``window`` of the first lengths[n] places of row n."""
    rows, heads, size = query_NHD.shape
    length, kv_heads = keys_RLKD.shape[1:3]
    splits = _splits(rows * kv_heads, longest)
    out = torch.empty(rows, heads * size, dtype=query_NHD.dtype, device=query_NHD.device)
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(rows, heads, splits, size, dtype=torch.float32, device=out.device)
        sums = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=out.device)
    groups = heads // kv_heads
    _attend[(rows, kv_heads, splits)](
        query_NHD, keys_RLKD, values_RLKD, lengths_N, out, parts, sums, length, scale,
        WINDOW=window or 0, KV_HEADS=kv_heads, GROUPS=groups, WIDE=max(16, triton.next_power_of_2(groups)), SIZE=size,
        SPLITS=splits, PLACES=PLACES, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _join[(rows, heads)](parts, sums, out, SIZE=size, SPLITS=splits, num_warps=1)
    return out


def _splits(programs: int, longest: int) -> int:
    """A power of two: how many programs read one row's places."""
    if longest <= UNSPLIT:
        return 1
    wanted = min(PROGRAMS // programs, longest // (2 * PLACES), 16)
    return triton.next_power_of_2(max(1, wanted // 2 + 1)) if wanted > 1 else 1


@triton.jit
def _attend(
    query_ptr, keys_ptr, values_ptr, lengths_ptr, out_ptr, parts_ptr, sums_ptr, row_places, scale,
    WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    end = tl.load(lengths_ptr + row).to(tl.int32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(end - WINDOW, 0)
    if SPLITS > 1:
        each = tl.cdiv(tl.cdiv(end - first, SPLITS), PLACES) * PLACES
        first = first + split * each
        end = tl.minimum(first + each, end)
    g = tl.arange(0, WIDE)
    d = tl.arange(0, SIZE)
    at = (row * KV_HEADS + head) * GROUPS + g
    query = tl.load(query_ptr + at[:, None] * SIZE + d[None, :], mask=g[:, None] < GROUPS, other=0.0)
    largest = tl.full([WIDE], -1.0e30, dtype=tl.float32)
    total = tl.zeros([WIDE], dtype=tl.float32)
    mixed = tl.zeros([WIDE, SIZE], dtype=tl.float32)
    base = (row * row_places * KV_HEADS + head) * SIZE
    for start in range(first, end, PLACES):
        place = start + tl.arange(0, PLACES)
        is_in = place < end
        offsets = base + place[:, None].to(tl.int64) * (KV_HEADS * SIZE) + d[None, :]
        key = tl.load(keys_ptr + offsets, mask=is_in[:, None], other=0.0)
        value = tl.load(values_ptr + offsets, mask=is_in[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(is_in[None, :], score, -1.0e30)
        new = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.where(is_in[None, :], tl.exp(score - new[:, None]), 0.0)
        fade = tl.exp(largest - new)
        total = total * fade + tl.sum(weight, axis=1)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        largest = new
    is_head = g < GROUPS
    if SPLITS == 1:
        result = mixed / total[:, None]
        target = out_ptr + at[:, None] * SIZE + d[None, :]
        tl.store(target, result.to(out_ptr.dtype.element_ty), mask=is_head[:, None])
    else:
        where = at * SPLITS + split
        tl.store(parts_ptr + where[:, None] * SIZE + d[None, :], mixed, mask=is_head[:, None])
        tl.store(sums_ptr + where * 2, largest, mask=is_head)
        tl.store(sums_ptr + where * 2 + 1, total, mask=is_head)


@triton.jit
def _join(parts_ptr, sums_ptr, out_ptr, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, SIZE)
    largest = tl.load(sums_ptr + (at * SPLITS + s) * 2)
    total = tl.load(sums_ptr + (at * SPLITS + s) * 2 + 1)
    share = tl.exp(largest - tl.max(largest, axis=0))
    parts = tl.load(parts_ptr + (at * SPLITS + s[:, None]) * SIZE + d[None, :])
    mixed = tl.sum(parts * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(out_ptr + at * SIZE + d, mixed.to(out_ptr.dtype.element_ty))


def gated(gate_up_NJ: Tensor, delta: Delta | None) -> Tensor:
    """SiLU of the first half times the second half, to which ``delta`` is added first."""
    rows, size = gate_up_NJ.shape[0], gate_up_NJ.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up_NJ.dtype, device=gate_up_NJ.device)
    numbers, constants = _nothing(gate_up_NJ) if delta is None else launch(delta)
    block = 1024 if delta is None else max(16, min(256, 4096 // constants["RANK"]))
    _gated[(rows, triton.cdiv(size, block))](
        gate_up_NJ, out, size, *numbers, ADDS=delta is not None, BLOCK=block, **constants, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["tokens", "chunks"])
def _gated(
    gate_up_ptr, out_ptr, size, b_ptr, low_ptr, slots_ptr, ranks_ptr, tokens, width, outputs, chunks,
    ADDS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = i < size
    kind = gate_up_ptr.dtype.element_ty
    gate = tl.load(gate_up_ptr + row * 2 * size + i, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + i, mask=is_in, other=0.0).to(tl.float32)
    if ADDS:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        if slot > 0:
            rank = tl.load(ranks_ptr + slot)
            gate += added(b_ptr, low_ptr, slot, rank, row, tokens, width, outputs, chunks, 0, i, is_in, CHUNKS, RANK)
            up += added(
                b_ptr, low_ptr, slot, rank, row, tokens, width, outputs, chunks, 1, i + size, is_in, CHUNKS, RANK
            )
            gate = gate.to(kind).to(tl.float32)
            up = up.to(kind).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out_ptr + row * size + i, (opened * up).to(kind), mask=is_in)
