"""Kernels against plain PyTorch: on a GPU as they are, elsewhere in Triton's interpreter, if there is Triton.

It has to be told before Triton is imported, as PyTorch does: the tests start themselves once more in a process that is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from serving import decode_ops
from serving.decode_ops import Delta

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, SIZE = 8, 2, 16


IS_RUN_HERE = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(IS_RUN_HERE or not find_spec("triton"), reason="the tests below run, or there is no Triton")
def test_all_of_these_pass_in_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environ = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def kernels() -> Any:
    if not IS_RUN_HERE:
        pytest.skip("in a process of its own")
    from serving import decode_kernels

    return decode_kernels


@pytest.fixture(autouse=True)
def same_dice() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), float((found - expected).abs().max())


def adapters(sizes: list[int], inputs: int, ranks: list[int], rank_max: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of different ranks as ``LoraStack`` lays them: members side by side, zeros beyond."""
    width = len(sizes) * rank_max
    a, b = random(len(ranks), inputs, width) * 0, random(len(ranks), width, sum(sizes)) * 0
    for slot, rank in enumerate(ranks):
        for member, size in enumerate(sizes):
            rows, start = slice(member * rank, (member + 1) * rank), sum(sizes[:member])
            a[slot, :, rows] = random(inputs, rank) / inputs**0.5
            b[slot, rows, start : start + size] = random(rank, size)
    return a, b


def deltas(ops: Any, x: torch.Tensor, sizes: list[int], ranks: list[int], slots: list[int]) -> Delta:
    torch.manual_seed(1)
    a, b = adapters(sizes, x.shape[1], ranks, 8)
    slots_T, ranks_S = torch.tensor(slots, device=DEVICE), torch.tensor(ranks, dtype=torch.int32, device=DEVICE)
    return Delta(ops.shrink(x, a, slots_T, ranks_S, len(sizes)), b, slots_T, ranks_S, sizes)


@pytest.mark.parametrize("ranks", [[0, 4, 8, 3], [0, 8, 1, 5]])
@pytest.mark.parametrize(("sizes", "inputs"), [([96, 32, 32], 300), ([64, 64], 512), ([48], 70)])
def test_each_token_gets_its_own_versions_delta(kernels: Any, sizes: list[int], inputs: int, ranks: list[int]) -> None:
    x, y = random(6, inputs), random(6, sum(sizes))
    found, expected, slots = y.clone(), y.clone(), [0, 1, 3, 2, 0, 1]
    kernels.add_deltas(found, deltas(kernels, x, sizes, ranks, slots))
    decode_ops.add_deltas(expected, deltas(decode_ops, x, sizes, ranks, slots))
    assert_near(found, expected)
    assert torch.equal(found[0], y[0]) and torch.equal(found[4], y[4])


@pytest.mark.parametrize("size", [96, 128])
def test_norms(kernels: Any, size: int) -> None:
    x, delta, weight = random(5, size), random(5, size), random(size)
    assert_near(kernels.norm(x, weight, 1e-5), decode_ops.norm(x, weight, 1e-5))
    mine, plain = x.clone(), x.clone()
    assert_near(kernels.add_norm(delta, mine, weight, 1e-5), decode_ops.add_norm(delta, plain, weight, 1e-5))
    assert_near(mine, plain)


@pytest.mark.parametrize("has_delta", [False, True])
def test_the_gate(kernels: Any, has_delta: bool) -> None:
    gate_up, x = random(4, 2 * 160), random(4, 64)
    found, expected = (
        ops.gated(gate_up.clone(), deltas(ops, x, [160, 160], [0, 4, 8], [1, 0, 2, 1]) if has_delta else None)
        for ops in (kernels, decode_ops)
    )
    assert_near(found, expected)


@pytest.mark.parametrize("has_delta", [False, True])
def test_keys_and_values_are_stored_and_nothing_else(kernels: Any, has_delta: bool) -> None:
    sizes = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    qkv, x, angles = random(4, sum(sizes)), random(4, 64), random(4, SIZE // 2).repeat(1, 2)
    places, memory = torch.tensor([3, 50, 121, 199], device=DEVICE), random(2, 5, 40, KV_HEADS, SIZE)
    found, expected = [], []
    for ops, results in ((kernels, found), (decode_ops, expected)):
        keys, values = memory.clone()
        delta = deltas(ops, x, sizes, [0, 4, 8], [1, 0, 2, 1]) if has_delta else None
        results += [ops.store(qkv.clone(), delta, angles.cos(), angles.sin(), places, keys, values), keys, values]
    for mine, plain in zip(found, expected, strict=True):
        assert_near(mine, plain)


@pytest.mark.parametrize("window", [None, 50, 128])
@pytest.mark.parametrize(("longest", "lengths"), [(512, [1, 64, 65, 512]), (1100, [1, 1100, 700, 129])])
def test_attention_over_rows_of_different_lengths(
    kernels: Any, longest: int, lengths: list[int], window: int | None
) -> None:
    keys, values, query = random(6, 1100, KV_HEADS, SIZE), random(6, 1100, KV_HEADS, SIZE), random(4, HEADS, SIZE)
    lengths_N = torch.tensor(lengths, device=DEVICE)
    found, expected = (
        ops.attend(query, keys, values, lengths_N, scale=0.2, window=window, longest=longest)
        for ops in (kernels, decode_ops)
    )
    assert_near(found, expected)
