"""Keys and values of all sequences in dense rows, and the attention over them.

One tensor [layers, rows, L, K, D] each for keys and values; a sequence owns one row. Decoders occupy rows
0…n-1, so their attention is one call over a view, whatever models' versions they belong to. Left out:
paging; a row is as long as the context, and untouched memory is never mapped on a CPU.

Dimensions: R rows, L places in a row, K key-value heads, G query heads per key-value head, D head size,
T tokens of the step, N decoding sequences.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from serving.decode_ops import additive, attend_masked, decode_mask
from serving.scheduler import Copy

ATTENTION = "tiebreak_rows"


class KvRows:
    """The memory: written and read through a StepKv, rows copied for forks, prefixes and moves."""

    def __init__(
        self, *, layers: int, rows: int, length: int, heads: int, head_size: int, dtype: torch.dtype, device: str
    ) -> None:
        # zeroed, here and by copy, because masked places still enter a sum with weight 0, and 0 · NaN is NaN
        shape = (layers, rows, length, heads, head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def store(self, layer: int, places_T: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep [K, T, D] each at ``places``, row · L + position; the layer's keys and values, [R, L, K, D]."""
        size = key.shape[0] * key.shape[2]
        for kept, new in ((self.keys[layer], key), (self.values[layer], value)):
            kept.view(-1, size).index_copy_(0, places_T, new.transpose(0, 1).reshape(-1, size))
        return self.keys[layer], self.values[layer]

    def copy(self, copies: list[Copy]) -> None:
        """Carry out row copies in order."""
        for source, target, length, clears in copies:
            for tensor in (self.keys, self.values):
                if target != source:
                    tensor[:, target, :length] = tensor[:, source, :length]
                if clears:
                    tensor[:, source, :length] = 0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A stretch of one prompt inside the step: tokens first…last, at places start…stop of ``row``."""

    first: int
    last: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Fresh:
    """Prompts that are all read from their starts, on a GPU: one launch instead of several for each of them."""

    ends_S: Tensor  # int32: 0, then where each stretch of the step's tokens ends; a decoder is a stretch of one
    longest: int


@dataclass(slots=True)
class StepKv:
    """Everything attention needs to know about one step; handed through the model's keyword arguments."""

    kv: KvRows
    places_T: Tensor  # row · L + position of each token
    decoding: int
    decode_at: slice | Tensor  # which of the T tokens decode, in row order
    lengths: list[int]  # of the decoders, the new token included
    prompts: list[Prompt]
    masks: dict[Any, Tensor | None]
    fresh: Fresh | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """[H, T, D], [K, T, D], [K, T, D] → [T, H, D]; the step's keys and values are stored first."""
        keys, values = self.kv.store(layer, self.places_T, key, value)
        query = query.transpose(0, 1)  # [T, H, D]
        if not self.prompts and isinstance(self.decode_at, slice):
            return self._decode(query, keys, values, scale, window)
        is_fresh = self.fresh is not None and (window is None or self.fresh.longest <= window)
        if self.fresh is not None and is_fresh:
            output = causal_stretches(query, key.transpose(0, 1), value.transpose(0, 1), self.fresh, scale)
        else:
            output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self.decoding:
            output[self.decode_at] = self._decode(query[self.decode_at], keys, values, scale, window)
        for prompt in () if is_fresh else self.prompts:
            read = self._read(prompt, query[prompt.first : prompt.last], keys, values, scale, window)
            output[prompt.first : prompt.last] = read
        return output

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
        """One query token per row."""
        longest = max(self.lengths)
        mask = self._decode_mask(longest, window, query)
        return attend_masked(query, keys[:, :longest], values[:, :longest], mask, scale)

    def _decode_mask(self, longest: int, window: int | None, like: Tensor) -> Tensor | None:
        """[N, 1, 1, L] additive; None when every row is exactly as long as the view."""
        if ("decode", window) not in self.masks:
            mask = None
            if min(self.lengths) < longest or (window is not None and longest > window):
                mask = decode_mask(torch.tensor(self.lengths, device=like.device), longest, window, like.dtype)
            self.masks["decode", window] = mask
        return self.masks["decode", window]

    def _read(
        self, prompt: Prompt, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """A stretch of a prompt against all of its row so far."""
        tokens, heads, size = query.shape[0], keys.shape[2], keys.shape[3]
        grouped = query.view(tokens, heads, -1, size).permute(1, 2, 0, 3)  # [K, G, T, D]
        output = scaled_dot_product_attention(
            grouped.reshape(1, heads, -1, size),
            keys[prompt.row, : prompt.stop].transpose(0, 1)[None],
            values[prompt.row, : prompt.stop].transpose(0, 1)[None],
            attn_mask=self._prompt_mask(prompt, grouped.shape[1], window, query),
            scale=scale,
        )
        return output.view(heads, -1, tokens, size).permute(2, 0, 1, 3).reshape(query.shape)

    def _prompt_mask(self, prompt: Prompt, groups: int, window: int | None, like: Tensor) -> Tensor:
        """[G · T, L] additive, causal from the stretch's start."""
        if (prompt, window) not in self.masks:
            places = torch.arange(prompt.stop, device=like.device)
            ends = torch.arange(prompt.start, prompt.stop, device=like.device)[:, None]
            is_seen = places <= ends if window is None else (places <= ends) & (places > ends - window)
            self.masks[prompt, window] = additive(is_seen, like.dtype).repeat(groups, 1)
        mask = self.masks[prompt, window]
        assert mask is not None
        return mask


def causal_stretches(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, fresh: Fresh, scale: float) -> Tensor:
    """[T, H, D]: each token looks at its own stretch, up to itself. On a GPU by PyTorch's flash attention."""
    if query_THD.is_cuda:
        ends, longest = fresh.ends_S, fresh.longest
        found: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
            query_THD, key_TKD, value_TKD, ends, ends, longest, longest, 0.0, True, False, scale=scale
        )
        return found[0]
    stretches = []
    for start, end in itertools.pairwise(fresh.ends_S.tolist()):
        query, key, value = (part[start:end].transpose(0, 1)[None] for part in (query_THD, key_TKD, value_TKD))
        read = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        stretches.append(read[0].transpose(0, 1))
    return torch.cat(stretches)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, scaling: float, step_kv: StepKv, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: [1, heads, T, D] in, [1, T, heads, D] out."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    return step_kv.attend(layer, query[0], key[0], value[0], scaling, sliding_window)[None], None


AttentionInterface.register(ATTENTION, _attention)
