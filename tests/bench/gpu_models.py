"""What both GPU benches need: the device, and shapes of models whose weights are made up.

A step takes as long whatever they are, and nothing is downloaded.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers import LlamaConfig, Qwen2Config

MODELS: Final[dict[str, Any]] = {
    "Llama-3.2-1B": LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        intermediate_size=8192, vocab_size=128_256, tie_word_embeddings=True, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        vocab_size=151_936, tie_word_embeddings=True, max_position_embeddings=8192,
    ),
    "tiny": LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=41_000, tie_word_embeddings=True, max_position_embeddings=4096,
    ),
}  # fmt: skip


def is_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if is_gpu() else "cpu"


@contextmanager
def freed() -> Iterator[None]:
    """What is made inside is gone afterwards."""
    yield
    gc.collect()
    if is_gpu():
        torch.cuda.empty_cache()
