"""A decoding step as a function of static tensors: by a known model's shape in few launches, or by its own forward.

Llama, Mistral and Qwen2 are the same layers with other numbers; between their matrix products a layer takes five
launches instead of forty. Any other model is asked as it is, with its attention and its adapters ours.

Dimensions: N rows, one token each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from serving import decode_ops
from serving.decode_ops import DecodeOps
from serving.kv import KvRows
from serving.lora import FusedLinear, LoraStack, Member

KNOWN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
HEAD_SIZES = (16, 32, 64, 128, 256)  # that a kernel holds in registers


@dataclass(frozen=True, slots=True)
class Step:
    """What a decoding step is given: one token for each of the rows 0…N-1."""

    tokens_N: Tensor
    positions_N: Tensor
    places_N: Tensor  # row · L + position
    lengths_N: Tensor  # the new token included
    slots_N: Tensor | None  # None: all are the base's
    longest: int  # no row is longer


Decoder = Callable[[Step], Tensor]


class _Layer(NamedTuple):
    qkv: FusedLinear
    out: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    after_attention: Tensor  # weights of the norm there
    at_end: Tensor  # of the norm that comes next
    scale: float
    window: int | None


class FusedDecoder:
    """Logits [N, V] of a step, for a model that ``is_known``."""

    def __init__(self, model: Any, kv: KvRows, lora: LoraStack, ops: DecodeOps) -> None:
        self._kv, self._lora, self._ops = kv, lora, ops
        inner = model.model
        self._embed, self._rotary, self._head = inner.embed_tokens, inner.rotary_emb, model.get_output_embeddings()
        self._eps = float(model.config.rms_norm_eps)
        layers = list(inner.layers)
        self._first = layers[0].input_layernorm.weight
        norms = [layer.input_layernorm.weight for layer in layers[1:]] + [inner.norm.weight]
        self._layers = [
            _Layer(
                qkv=layer.self_attn.q_proj.group,
                out=layer.self_attn.o_proj.group,
                gate_up=layer.mlp.gate_proj.group,
                down=layer.mlp.down_proj.group,
                after_attention=layer.post_attention_layernorm.weight,
                at_end=at_end,
                scale=layer.self_attn.scaling,
                window=_window(model, layer.self_attn),
            )
            for layer, at_end in zip(layers, norms, strict=True)
        ]

    def __call__(self, step: Step) -> Tensor:
        ops, eps = self._ops, self._eps
        x = self._embed(step.tokens_N)
        cos, sin = (table[0].contiguous() for table in self._rotary(x, step.positions_N[None]))
        hidden = ops.norm(x, self._first, eps)
        with self._lora.per_token(step.slots_N, ops):
            for index, layer in enumerate(self._layers):
                keys, values = self._kv.keys[index], self._kv.values[index]
                query = ops.store(*layer.qkv.compute_apart(hidden), cos, sin, step.places_N, keys, values)
                seen = ops.attend(
                    query, keys, values, step.lengths_N, scale=layer.scale, window=layer.window, longest=step.longest
                )
                hidden = ops.add_norm(layer.out.compute(seen), x, layer.after_attention, eps)
                wide = ops.gated(*layer.gate_up.compute_apart(hidden))
                hidden = ops.add_norm(layer.down.compute(wide), x, layer.at_end, eps)
            logits: Tensor = self._head(hidden)
        return logits


def is_known(model: Any, head_size: int) -> bool:
    """Whether FusedDecoder computes what this model does."""
    if type(model).__name__ not in KNOWN or not type(model).__module__.startswith("transformers.models."):
        return False
    if model.config.hidden_act != "silu" or head_size not in HEAD_SIZES:
        return False
    groups = (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))
    return all(
        isinstance(getattr(part, name, None), Member)
        for layer in model.model.layers
        for part, names in zip((layer.self_attn, layer.mlp), groups, strict=True)
        for name in names
    )


def _window(model: Any, attention: Any) -> int | None:
    """Mistral's layers look it up in the configuration, Qwen2's know their own, Llama has none."""
    if type(model).__name__ == "MistralForCausalLM":
        window: int | None = getattr(model.config, "sliding_window", None)
        return window
    return getattr(attention, "sliding_window", None)


class ModelDecoder:
    """Logits [N, V] of a step by the model's own forward."""

    def __init__(self, model: Any, kv: KvRows, lora: LoraStack, ops: DecodeOps) -> None:
        self._model, self._kv, self._lora, self._ops = model, kv, lora, ops
        is_held = kv.keys.shape[-1] in HEAD_SIZES
        self._attend = ops.attend if is_held else decode_ops.attend

    def __call__(self, step: Step) -> Tensor:
        with self._lora.per_token(step.slots_N, self._ops):
            output = self._model(
                input_ids=step.tokens_N[None],
                position_ids=step.positions_N[None],
                use_cache=False,
                step_kv=DenseKv(self._kv, step, self._attend),
            )
        logits: Tensor = output.logits[0]
        return logits


class DenseKv(NamedTuple):
    """What attention needs to know about a step of static tensors; stands where ``kv.StepKv`` stands."""

    kv: KvRows
    step: Step
    attend_rows: Callable[..., Tensor]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """[H, N, D], [K, N, D], [K, N, D] → [N, H, D]; the step's keys and values are stored first."""
        keys, values = self.kv.store(layer, self.step.places_N, key, value)
        rows = query.transpose(0, 1).contiguous()
        seen = self.attend_rows(
            rows, keys, values, self.step.lengths_N, scale=scale, window=window, longest=self.step.longest
        )
        return seen.view(rows.shape)
