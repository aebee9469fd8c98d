"""What the serving tests share: a tiny real model, published adapters over it, requests, whole answers."""

from __future__ import annotations

import hashlib
from contextlib import aclosing
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.engine import Engine
from serving.wire import Chunk, GenerateRequest, Sampling
from telemetry.events import Message
from telemetry.manifest import ADAPTER_FILE, Manifest, base_digest, file_digest, write_version

KEY = b"k" * 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def publish(
    state: Path, model: Path, sequence: int, *, rank: int = 4, key: bytes = KEY, size: float = 0.2, **changes: Any
) -> tuple[str, Path]:
    """A random adapter, strong enough to change greedy answers unless told otherwise, as published: (name, folder)."""
    source = state / f"adapter-{sequence}.safetensors"
    source.parent.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(model, sequence, rank, size), source)
    fields: dict[str, Any] = {
        "variant": "chat-main", "sequence": sequence, "parent": "", "base": "tiny",
        "base_digest": base_digest(model), "created_at": datetime(2026, 1, 1, tzinfo=UTC), "step": sequence,
        "rank": rank,
        "alpha": 2.0 * rank, "target_modules": TARGETS, "files": {ADAPTER_FILE: file_digest(source)},
    }  # fmt: skip
    manifest = Manifest(**(fields | changes))
    return write_version(state / "versions", manifest, {ADAPTER_FILE: source}, key)


def adapter_tensors(model: Path, seed: int, rank: int, size: float = 0.2) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in _shapes(model).items():
        a = torch.randn(rank, inputs, generator=dice)
        b = torch.randn(outputs, rank, generator=dice)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a * size, b * size
    return tensors


@cache
def _shapes(model: Path) -> dict[str, tuple[int, int]]:
    base = AutoModelForCausalLM.from_pretrained(model)
    return {
        name: (module.in_features, module.out_features)
        for name, module in base.named_modules()
        if name.endswith(TARGETS)
    }


class Reference:
    """What transformers itself says, with an adapter merged into the weights."""

    def __init__(self, model: Path, seed: int | None = None, rank: int = 4) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if seed is not None:
            tensors = adapter_tensors(model, seed, rank)
            for name, module in self.model.named_modules():
                if name.endswith(TARGETS):
                    delta = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
                    module.weight.data += 2.0 * delta

    def prompt_ids(self, prompt: str) -> list[int]:
        chat = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def greedy(self, prompt: str, count: int) -> list[int]:
        """Greedy token ids up to the end token, not included."""
        ids = self.prompt_ids(prompt)
        made: list[int] = []
        for _ in range(count):
            token = int(self.logprobs(ids + made)[-1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            made.append(token)
        return made

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(torch.tensor([ids])).logits[0]
        return logits.log_softmax(dim=-1)


def request(
    version: str, prompt: str = "Hello there", *, n: int = 1, deadline_s: float = 60.0, **sampling: Any
) -> GenerateRequest:
    """A request with 12 greedy tokens unless told otherwise."""
    return GenerateRequest(
        request_id=hashlib.sha256(prompt.encode()).hexdigest()[:8],
        version=version,
        messages=(Message("user", prompt),),
        sampling=Sampling(**({"max_tokens": 12, "temperature": 0.0} | sampling)),
        n=n,
        deadline_s=deadline_s,
    )


async def answer(engine: Engine, wanted: GenerateRequest) -> list[Chunk]:
    """Every chunk of one request."""
    stream = await engine.submit(wanted)
    async with aclosing(stream):
        return [chunk async for chunk in stream]


def text_of(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def ids_of(chunks: list[Chunk], index: int = 0) -> list[int]:
    return [token.token_id for chunk in chunks if chunk.index == index for token in chunk.tokens]


def last_of(chunks: list[Chunk], index: int = 0) -> Chunk:
    return [chunk for chunk in chunks if chunk.index == index][-1]
