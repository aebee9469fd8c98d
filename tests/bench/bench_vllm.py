"""The engine against a real vLLM on the CPU, the same prompts to both: ``make bench-vllm``.

Base alone and with one LoRA of rank 16, at 1, 2 and 16 requests at once. Both have the same cores and no prefix cache,
and are asked in turn; vLLM's processes are stopped while others compute. Ours has its default type and one thread, as
the default stack gives it; vLLM has the type that this processor multiplies best, and runs twice, with the threads
that it chooses itself (it leaves a core to its front end) and with one on every core; each figure is against the
better of the two. It is asked for text alone, ours computes every token's log-probability, too. Medians over rounds.
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
from online_trainer.policy import native_dtype
from serving.config import BaseConfig
from serving.peft_folder import base_shapes, write_peft
from serving.safety import OutputFilter
from serving.transformers_engine import TransformersEngine
from telemetry.manifest import base_digest, read_version
from tests.bench import record
from tests.bench.bench_engine import ADAPTER_SIZE, MODEL, NEW, RANK, Ours, prompt
from tests.bench.bench_engine import THREADS as OUR_THREADS
from tests.unit.serving import kit
from tests.vllm.server import VllmServer

COUNTS = (1, 2, 16)
ROUNDS = int(os.environ.get("TIEBREAK_BENCH_ROUNDS", "7"))
BARS = {"one LoRA": 1.5, "base": 0.95}
BASE = "smollm2"
CORES = sorted(os.sched_getaffinity(0))
THREADS = {  # how vLLM may spread over the cores
    "its own threads": {},
    "a thread a core": {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, CORES)), "OMP_NUM_THREADS": str(len(CORES))},
}


class Theirs:
    """One vLLM, asked over its own HTTP door with the same token ids; stopped whenever nobody asks."""

    def __init__(self, server: VllmServer, tokenizer: Any) -> None:
        self._server, self._tokenizer = server, tokenizer
        # it may close a kept connection while it is stopped
        self._session = aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(force_close=True))

    async def load(self, version: str, folder: Path) -> None:
        wanted = {"lora_name": version, "lora_path": str(folder)}
        async with self._session.post("/v1/load_lora_adapter", json=wanted) as response:
            assert response.status == 200, await response.text()

    async def close(self) -> None:
        await self._session.close()
        self._server.resume()
        self._server.stop()

    def pause(self) -> None:
        self._server.pause()

    def resume(self) -> None:
        self._server.resume()

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
        self._server.resume()
        start = time.perf_counter()
        answers = await asyncio.gather(*(self.ask(first + i, model) for i in range(count)))
        rate = sum(map(len, answers)) / (time.perf_counter() - start)
        self._server.pause()
        return rate


async def main() -> None:
    model = prepare_model(MODEL, model_cache())
    options = BaseConfig(threads=OUR_THREADS, max_context=512, max_batch=max(COUNTS), slots=1, cache_rows=0)
    engine = TransformersEngine(model, base_digest(model), BASE, options, OutputFilter(()))
    await engine.start()
    dtype = str(native_dtype()).removeprefix("torch.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    sides: dict[str, Theirs] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        version, published = kit.publish(folder, model, 1, rank=RANK, size=ADAPTER_SIZE)
        manifest = read_version(published, kit.KEY)
        await engine.load(version, published, manifest)
        write_peft(published, manifest, folder / "peft", model=model, shapes=base_shapes(model))
        try:
            for side, environ in THREADS.items():
                options_there = ("--no-enable-prefix-caching",)
                server = VllmServer(
                    model, folder / "vllm.log", name=BASE, dtype=dtype, options=options_there, environ=environ
                )
                sides[side] = Theirs(server, tokenizer)
                server.start()
                await sides[side].load(version, folder / "peft")
                sides[side].pause()
            kinds = {"base": (engine.base_version, BASE), "one LoRA": (version, version)}
            rows = await compare(Ours(engine), sides, kinds, dtype=dtype, cores=len(CORES))
        finally:
            for theirs in sides.values():
                await theirs.close()
            await engine.close()
    record.save("vllm", "make bench-vllm", rows)


async def compare(
    ours: Ours, sides: dict[str, Theirs], kinds: dict[str, tuple[str, str]], **setting: Any
) -> list[dict[str, Any]]:
    rates: dict[tuple[str, int], dict[str, list[float]]] = {}
    for index in range(ROUNDS + 1):  # the first one warms up
        for kind, count, first in schedule(index):
            mine, other = kinds[kind]
            now = {"ours": await ours.rate(count, [mine], first)}
            now |= {side: await theirs.rate(count, other, first) for side, theirs in sides.items()}
            for side, rate in now.items() if index else ():
                rates.setdefault((kind, count), {}).setdefault(side, []).append(rate)
    equal = {kind: await equal_answers(ours, next(iter(sides.values())), *names) for kind, names in kinds.items()}
    return [row(kind, count, rates[kind, count], greedy_answers_equal=equal[kind], **setting)
            for kind in BARS for count in COUNTS]  # fmt: skip


def row(kind: str, count: int, rates: dict[str, list[float]], **detail: Any) -> dict[str, Any]:
    """Our median against that of the better vLLM."""
    middle = {side: statistics.median(values) for side, values in rates.items()}
    best = max(middle[side] for side in THREADS)
    return record.row(
        f"{kind} against vLLM on this CPU, {count} request{'s' * (count > 1)}, tokens/s",
        middle["ours"] / best, "×", bar=BARS[kind], better="higher", baseline="vllm-cpu 0.32.0, eager",
        rounds=ROUNDS, tokens_per_s=middle, spread={side: [min(v), max(v)] for side, v in rates.items()}, **detail,
    )  # fmt: skip


def schedule(index: int) -> Iterator[tuple[str, int, int]]:
    """(kind, requests at once, first prompt) of one round; no prompt comes twice."""
    for place, (kind, count) in enumerate((kind, count) for count in COUNTS for kind in BARS):
        yield kind, count, 1000 * index + 100 * place


async def equal_answers(ours: Ours, theirs: Theirs, mine: str, other: str) -> str:
    numbers = range(90_000, 90_008)
    said = [(await ours.ask(number, mine))[0] for number in numbers]
    theirs.resume()
    pairs = [(words, await theirs.ask(number, other)) for words, number in zip(said, numbers, strict=True)]
    theirs.pause()
    return f"{sum(words == wanted for words, wanted in pairs)} of {len(pairs)}"


if __name__ == "__main__":
    asyncio.run(main())
