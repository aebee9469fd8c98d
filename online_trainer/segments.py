"""Attention over packed rows on a GPU: all pairs one after the other in one row, no padding and no mask.

Chosen sees prompt and chosen, rejected sees prompt and rejected. Both are causal once the prompt's keys stand before
rejected's, too: keys and values are gathered, queries stay where they are, and a kernel for sequences of any lengths
(``torch.nn.attention.varlen``) takes N such segments. T tokens, H and K heads of queries and of keys, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

ATTENTION = "tiebreak_segments"
# torch before 2.12 needs no word for more heads of queries than of keys
GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


class Segments(NamedTuple):
    """Which keys each stretch of queries sees, causally from its end."""

    keys: Tensor  # index into T of each key, segment by segment
    query_starts: Tensor  # N + 1, int32
    key_starts: Tensor
    longest_query: int
    longest_key: int

    def to(self, device: torch.device) -> Segments:
        """The same segments on ``device``."""
        return self._replace(
            keys=self.keys.to(device), query_starts=self.query_starts.to(device), key_starts=self.key_starts.to(device)
        )


def segments_of(lengths: Sequence[tuple[int, int, int]]) -> Segments:
    """For pairs with so many tokens of prompt, chosen and rejected that lie one after the other."""
    keys: list[Tensor] = []
    queries: list[int] = []
    start = 0
    for prompt, chosen, rejected in lengths:
        second = start + prompt + chosen
        keys.append(torch.arange(start, second))
        queries.append(prompt + chosen)
        if rejected:
            keys.append(torch.cat([torch.arange(start, start + prompt), torch.arange(second, second + rejected)]))
            queries.append(rejected)
        start = second + rejected
    sizes = [len(each) for each in keys]
    return Segments(torch.cat(keys), _starts(queries), _starts(sizes), max(queries), max(sizes))


def _starts(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """[T, H, D], [T, K, D], [T, K, D] → [T, H, D]."""
    key, value = (each.index_select(0, segments.keys) for each in (key, value))
    kernel = _by_kernel if query.is_cuda else _one_by_one
    return kernel(query, key, value, segments, scale, window)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:
    left = window - 1 if window is not None and window < segments.longest_key else -1
    out = varlen_attn(
        query, key, value, segments.query_starts, segments.key_starts, segments.longest_query, segments.longest_key,
        scale=scale, window_size=(left, 0), **GROUPED,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:
    """What the kernel computes, where there is none."""
    outputs = []
    bounds = zip(_stretches(segments.query_starts), _stretches(segments.key_starts), strict=True)
    for queries, keys in bounds:
        count, seen = queries.stop - queries.start, keys.stop - keys.start
        mask = torch.ones(count, seen, dtype=torch.bool, device=query.device).tril(seen - count)
        if window is not None:
            mask = mask.triu(seen - count - window + 1)
        query_1HqD, key_1HkD, value_1HkD = (
            each.transpose(0, 1)[None] for each in (query[queries], key[keys], value[keys])
        )
        out_1HqD = scaled_dot_product_attention(
            query_1HqD, key_1HkD, value_1HkD, attn_mask=mask, scale=scale, enable_gqa=True
        )
        outputs.append(out_1HqD[0].transpose(0, 1))
    return torch.cat(outputs)


def _stretches(starts: Tensor) -> list[slice]:
    bounds = starts.tolist()
    return [slice(*each) for each in pairwise(bounds)]


def takes_segments(model: Any) -> bool:
    """Whether the flash kernels behind ``attend`` compute ``model``, by its GPU, its type and the size of its heads."""
    weight, config = next(model.parameters()), model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_able = weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    return is_able and weight.dtype in (torch.bfloat16, torch.float16) and size <= 256 and size % 8 == 0


def use_segments(model: Any) -> None:
    """Let ``model``, of transformers, take ``segments`` among its keyword arguments; without, it attends as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        *, scaling: float, segments: Segments | None = None, sliding_window: int | None = None, **rest: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """transformers' attention interface: [1, heads, T, D] in, [1, T, heads, D] out."""
        if segments is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
        query_THD, key_TKD, value_TKD = (each[0].transpose(0, 1) for each in (query, key, value))
        return attend(query_THD, key_TKD, value_TKD, segments, scaling, sliding_window)[None], None

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
