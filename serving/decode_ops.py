"""What a decoding step does between its matrix products, in plain PyTorch: for processors, and to test the kernels by.

``serving.decode_kernels`` has the same functions in one launch each. Dimensions are as there.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu


class Delta(NamedTuple):
    """What adapters add to the outputs of a group of linears, each token by its slot: the sum of low · b[slot]."""

    low_CTW: Tensor  # in parts: their sum over C counts; not written for tokens of slot 0
    b_SWO: Tensor
    slots_T: Tensor
    ranks_S: Tensor
    sizes: list[int]  # outputs of the group's members


FAILURES: tuple[type[Exception], ...] = (RuntimeError,)  # what these functions raise where a device cannot compute them


class DecodeOps(Protocol):
    """The functions of this module, or of ``serving.decode_kernels``."""

    FAILURES: tuple[type[Exception], ...]

    def norm(self, x_NI: Tensor, weight_I: Tensor, eps: float, /) -> Tensor: ...

    def add_norm(self, delta_NI: Tensor, residual_NI: Tensor, weight_I: Tensor, eps: float, /) -> Tensor: ...

    def store(
        self, qkv_NO: Tensor, delta: Delta | None, cos_ND: Tensor, sin_ND: Tensor, places_N: Tensor,
        keys: Tensor, values: Tensor, /,
    ) -> Tensor: ...  # fmt: skip

    def attend(
        self, query_NHD: Tensor, keys: Tensor, values: Tensor, lengths_N: Tensor, /, *,
        scale: float, window: int | None, longest: int,
    ) -> Tensor: ...  # fmt: skip

    def gated(self, gate_up_NJ: Tensor, delta: Delta | None, /) -> Tensor: ...

    def shrink(self, x_TI: Tensor, a_SIW: Tensor, slots_T: Tensor, ranks_S: Tensor, members: int, /) -> Tensor: ...

    def add_deltas(self, y_TO: Tensor, delta: Delta, /) -> None: ...


def norm(x_NI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, rounded as transformers rounds it."""
    wide = x_NI.float()
    return weight_I * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_NI.dtype)


def add_norm(delta_NI: Tensor, residual_NI: Tensor, weight_I: Tensor, eps: float) -> Tensor:
    """The norm of ``residual``, to which ``delta`` is added first, in place."""
    return norm(residual_NI.add_(delta_NI), weight_I, eps)


def store(
    qkv_NO: Tensor, delta: Delta | None, cos_ND: Tensor, sin_ND: Tensor, places_N: Tensor,
    keys_RLKD: Tensor, values_RLKD: Tensor,
) -> Tensor:  # fmt: skip
    """Rotate queries and keys by their positions, keep keys and values at ``places``; the queries [N, H, D].

    ``delta`` is added first.
    """
    if delta is not None:
        add_deltas(qkv_NO, delta)
    heads, size = keys_RLKD.shape[2:]
    parts = qkv_NO.view(qkv_NO.shape[0], -1, size)
    turned, value = parts[:, :-heads], parts[:, -heads:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos_ND[:, None] + torch.cat((-second, first), dim=-1) * sin_ND[:, None]
    keys_RLKD.view(-1, heads, size).index_copy_(0, places_N, turned[:, -heads:])
    values_RLKD.view(-1, heads, size).index_copy_(0, places_N, value)
    return turned[:, :-heads]


def attend(
    query_NHD: Tensor, keys_RLKD: Tensor, values_RLKD: Tensor, lengths_N: Tensor, *,
    scale: float, window: int | None, longest: int,
) -> Tensor:  # fmt: skip
    """[N, H · D]: token n looks at the last ``window`` of the first lengths[n] places of row n.

    No row is longer than ``longest``.
    """
    mask = decode_mask(lengths_N, longest, window, query_NHD.dtype)
    return attend_masked(query_NHD, keys_RLKD[:, :longest], values_RLKD[:, :longest], mask, scale).flatten(1)


def attend_masked(
    query_NHD: Tensor, keys_RLKD: Tensor, values_RLKD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """[N, H, D]: token n looks at row n. The query heads that share keys stand in for query positions."""
    rows, _, size = query_NHD.shape
    output = scaled_dot_product_attention(
        query_NHD.reshape(rows, keys_RLKD.shape[2], -1, size),  # [N, K, G, D]
        keys_RLKD[:rows].transpose(1, 2),
        values_RLKD[:rows].transpose(1, 2),
        attn_mask=mask,
        scale=scale,
    )
    return output.reshape(query_NHD.shape)


def decode_mask(lengths_N: Tensor, longest: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[N, 1, 1, L] additive."""
    places = torch.arange(longest, device=lengths_N.device)
    ends = lengths_N[:, None]
    is_seen = places < ends if window is None else (places < ends) & (places >= ends - window)
    return additive(is_seen, dtype)[:, None, None, :]


def additive(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores: 0 where something is seen."""
    return torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device).masked_fill_(~is_seen, -torch.inf)


def gated(gate_up_NJ: Tensor, delta: Delta | None) -> Tensor:
    """SiLU of the first half times the second half, to which ``delta`` is added first."""
    if delta is not None:
        add_deltas(gate_up_NJ, delta)
    gate, up = gate_up_NJ.chunk(2, dim=-1)
    return silu(gate) * up


def shrink(x_TI: Tensor, a_SIW: Tensor, slots_T: Tensor, ranks_S: Tensor, members: int) -> Tensor:
    """``x @ a[slot]`` for each token, [1, T, W]. What is beyond a slot's rank is zeros, and so is slot 0."""
    return torch.einsum("ti,tiw->tw", x_TI.to(a_SIW.dtype), a_SIW[slots_T])[None]


def add_deltas(y_TO: Tensor, delta: Delta) -> None:
    """``y += low @ b[slot]`` for each token."""
    y_TO += torch.einsum("tw,two->to", delta.low_CTW.sum(dim=0), delta.b_SWO[delta.slots_T])
