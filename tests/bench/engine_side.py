"""What the engine's benches on a processor and on a GPU measure alike: throughput and pairs, asked of it directly."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from serving.transformers_engine import TransformersEngine
from serving.wire import GenerateRequest, Sampling
from telemetry.events import Message
from telemetry.manifest import ADAPTER_FILE
from tests.bench import record

BATCH = 16
PAIR_BARS = {"same version": 1.35, "two versions": 1.5}


class Ours:
    """The engine; ``prompt`` makes the question with a number, ``new`` is how many tokens an answer has."""

    def __init__(self, engine: TransformersEngine, prompt: Callable[[int], str], new: int) -> None:
        self.engine, self._prompt, self.new = engine, prompt, new

    async def ask(
        self,
        number: int,
        version: str,
        *,
        new: int | None = None,
        n: int = 1,
        temperature: float = 0.0,
        endless: bool = False,
    ) -> list[list[int]]:
        """Token ids of each completion; ``endless`` keeps the model from ending it early."""
        bias = dict.fromkeys(self.engine._prompts.end_ids, -100.0) if endless else {}
        sampling = Sampling(
            max_tokens=new or self.new, temperature=temperature, top_p=1.0, seed=number, logit_bias=bias
        )  # fmt: skip
        messages = (Message("user", self._prompt(number)),)
        request = GenerateRequest(f"bench-{number}", version, messages, sampling, n=n, deadline_s=600.0)
        ids: list[list[int]] = [[] for _ in range(n)]
        async for chunk in await self.engine.submit(request):
            assert not chunk.error, chunk.error
            ids[chunk.index] += [token.token_id for token in chunk.tokens]
        return ids

    async def rate(self, count: int, versions: Sequence[str], first: int) -> float:
        """Tokens a second of ``count`` requests at once over ``versions`` in turn."""
        start = time.perf_counter()
        asked = [self.ask(first + i, versions[i % len(versions)]) for i in range(count)]
        answers = await asyncio.gather(*asked)
        return sum(len(side) for answer in answers for side in answer) / (time.perf_counter() - start)


def add_adapter(model: Any, folder: Path, scaling: float) -> Any:
    """``model`` with the adapter in ``folder`` in its weights."""
    tensors = load_file(folder / ADAPTER_FILE)
    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" in tensors:
            weight = module.weight.data
            a, b = (tensors[f"{name}.lora_{side}.weight"].to(weight.device) for side in "AB")
            module.weight.data = (weight.float() + scaling * (b @ a)).to(weight.dtype)
    return model


async def throughput(
    ours: Ours, theirs: Mapping[int, Callable[[int, int], float]], names: Sequence[str], *,
    rounds: int, warm: int, alone: float, mixed: float, where: str = "",
) -> tuple[list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """The rows, whose detail is the dict beside them.

    ``theirs``: by how many at once, (count, first) → tokens a second. ``alone`` and ``mixed`` are the bars; ``warm``
    rounds come first and do not count.
    """
    base = ours.engine.base_version
    rates: dict[str, list[float]] = {}
    for index in range(rounds + warm):
        first = 100 * index
        one = {f"one adapter, {count}": await ours.rate(count, names[:1], first) for count in theirs}
        none = {f"base, {count}": await ours.rate(count, [base], first) for count in theirs}
        several = {"4 versions": await ours.rate(BATCH, names[:4], first)}
        other = {f"transformers, {count}": rate(count, first) for count, rate in theirs.items()}
        for what, rate_of in (one | none | several | other).items() if index >= warm else ():
            rates.setdefault(what, []).append(rate_of)
    middle = {what: statistics.median(values) for what, values in rates.items()}
    detail: dict[str, Any] = {"tokens_per_s": middle, "rounds": rates}
    whom = "against its merged model in transformers' continuous batching, tokens/s"
    rows = [
        record.row(f"one adapter alone {whom}, {count} request{'s' * (count > 1)}{where}",
                   middle[f"one adapter, {count}"] / middle[f"transformers, {count}"], "×", bar=alone, better="higher")
        for count in theirs
    ]  # fmt: skip
    rows.append(
        record.row(f"4 versions mixed in a batch of {BATCH} against one merged model there, tokens/s{where}",
                   middle["4 versions"] / middle[f"transformers, {BATCH}"], "×", bar=mixed, better="higher")
    )  # fmt: skip
    for row in rows:
        row["detail"] = detail
    return rows, detail


async def pairs(
    ours: Ours, names: Sequence[str], *, new: int, rounds: int, warm: int, endless: bool, where: str = ""
) -> list[dict[str, Any]]:
    """Seconds until both answers of a pair are whole, against one answer; all sampled, and none ends early."""
    seconds: dict[str, list[float]] = {"single": [], **{kind: [] for kind in PAIR_BARS}}
    for index in range(rounds + warm):
        first = 1000 + 10 * index
        kinds = {
            "single": [(first, names[0], 1)],
            "same version": [(first + 1, names[0], 2)],
            "two versions": [(first + 2, names[0], 1), (first + 2, names[1], 1)],
        }
        for kind, sides in kinds.items():
            start = time.perf_counter()
            asked = [
                ours.ask(number, name, new=new, n=n, temperature=1.0, endless=endless) for number, name, n in sides
            ]
            answers = [side for sides_of_one in await asyncio.gather(*asked) for side in sides_of_one]
            spent = time.perf_counter() - start
            assert {len(answer) for answer in answers} == {new}
            if index >= warm:
                seconds[kind].append(spent)
    middle = {kind: statistics.median(values) for kind, values in seconds.items()}
    return [
        record.row(f"latency of a pair, {kind}, against one answer{where}", middle[kind] / middle["single"], "×",
                   bar=bar, better="lower", seconds=middle)
        for kind, bar in PAIR_BARS.items()
    ]  # fmt: skip
