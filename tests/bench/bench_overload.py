"""Four times more than the stack can answer, for two minutes: ``make bench-overload``.

Ray Serve over the tiny model on one core; the router, a Redis that syncs every write, and the load on another. First
the most that clients in a circle get answered, then the latency at a quarter of that, then four times that on an open
loop: requests are sent on time whether or not the earlier ones are back.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.bench import record
from tests.bench.fleet import OTHER_CORE, SERVING_CORE, Fleet, fleet
from tests.bench.raw_http import Answer, RawClient, open_loop

SERVING = {"threads": 1, "slots": 2, "max_context": 512, "max_batch": 16}
ROUTER = {"min_in_flight": 16, "patience_s": 0.05}  # little waits for a place in the batch; the defaults let more
CLIENTS, PEAK_S, CALM_S, FLOOD_S = 24, 15.0, 20.0, 120.0
CALM_SHARE, FLOOD_FACTOR = 0.25, 4.0
BODY = {"model": "chat", "messages": [{"role": "user", "content": "How do I keep basil alive?"}], "max_tokens": 16}


async def peak(client: RawClient, payload: bytes) -> float:
    """Answers a second to clients that ask again as soon as they are answered; the best of three stretches."""
    best, end_s = 0.0, 0.0

    async def ask() -> int:
        count = 0
        while time.perf_counter() < end_s:
            count += (await client.post(payload)).status == 200
        return count

    for _ in range(3):
        end_s = time.perf_counter() + PEAK_S
        best = max(best, sum(await asyncio.gather(*(ask() for _ in range(CLIENTS)))) / PEAK_S)
    return best


def seconds(answers: list[Answer], status: int, q: float) -> float:
    """A quantile of the latency of answers with ``status``; inf when there is none."""
    found = [answer.seconds for answer in answers if answer.status == status]
    return record.quantile(found, q) if found else math.inf


async def measure(running: Fleet) -> list[dict[str, Any]]:
    client, payload = RawClient(running.url, "/v1/chat/completions"), json.dumps(BODY).encode()
    router = psutil.Process(running.router_pid)
    best = await peak(client, payload)
    calm = await open_loop(client, payload, rate=CALM_SHARE * best, seconds=CALM_S)
    before = router.memory_info().rss
    flood = await open_loop(client, payload, rate=FLOOD_FACTOR * best, seconds=FLOOD_S)
    growth = router.memory_info().rss - before
    client.close()
    statuses = {code: sum(answer.status == code for answer in flood) for code in sorted({a.status for a in flood})}
    elapsed = max(answer.arrivals[-1] for answer in flood) - min(answer.started_s for answer in flood)
    refused = [answer for answer in flood if answer.status == 503]
    what = f"{FLOOD_FACTOR:.0f}× overload for {FLOOD_S:.0f} s"
    return [
        record.row(f"goodput at {what}, against the peak", statuses.get(200, 0) / elapsed / best, "×", bar=0.9,
                   better="higher", peak_per_s=best, statuses=statuses, seconds=elapsed,
                   offered_per_s=len(flood) / elapsed, router=ROUTER, serving=SERVING),
        record.row(f"p99 of those let in at {what}, against a quarter of the peak",
                   seconds(flood, 200, 0.99) / seconds(calm, 200, 0.99), "×", bar=2.0, better="lower",
                   calm_ms=1000 * seconds(calm, 200, 0.99), flood_ms=1000 * seconds(flood, 200, 0.99)),
        record.row("p99 of a refusal", 1000 * seconds(flood, 503, 0.99), "ms", bar=20.0, better="lower",
                   with_retry_after=sum(bool(a.header("retry-after")) for a in refused), refused=len(refused)),
        record.row(f"the router's memory after {what}", growth / 2**20, "MB more", bar=50.0, better="lower"),
    ]  # fmt: skip


async def main() -> None:
    os.sched_setaffinity(0, {OTHER_CORE})
    with (
        tempfile.TemporaryDirectory(prefix="tiebreak-overload-") as name,
        fleet(SERVING, Path(name), router=ROUTER, cores=(SERVING_CORE, OTHER_CORE)) as running,
    ):
        await running.started()
        record.save("overload", "make bench-overload", await measure(running))


if __name__ == "__main__":
    asyncio.run(main())
