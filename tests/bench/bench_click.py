"""How long a click waits for its acknowledgement, trainer idle, on the real model: ``make bench-click``.

The figure is the 99th percentile of all clicks; that of each of the ``ROUNDS`` rounds is in its detail. Beside every
click, and in turn with it, a synced write of the size of one event to the same disk, and for every round the share of
the processors' time that the machine's host took away ("steal"): what no acknowledgement can be quicker than here.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from deploy.api import Api
from deploy.personas import TRAINING_PROMPTS
from tests.bench import record
from tests.bench.client import running_stack

ROUNDS, CLICKS, READING_S = 5, 150, 0.3
EVENT_BYTES = 4000


class Round(NamedTuple):
    """``CLICKS`` clicks: seconds until acknowledged, seconds of as many synced writes, share of the time stolen."""

    acknowledged: list[float]
    synced: list[float]
    stolen: float

    def p99_ms(self) -> float:
        """Of the clicks."""
        return 1000 * record.quantile(self.acknowledged, 0.99)


async def clicks(api: Api, state: Path, name: str) -> Round:
    """Clicks, each ``READING_S`` after its pair came; ``skip`` is recorded like every verdict, and teaches nothing."""
    acknowledged, synced = [], []
    before = psutil.cpu_times()
    with (state / "sync-probe").open("ab", buffering=0) as probe:
        for index in range(CLICKS):
            user = f"idle-{name}-{index}"
            await api.consent(user)
            prompt = TRAINING_PROMPTS[index % len(TRAINING_PROMPTS)]
            pair = await api.ask(prompt, user=user, pair="always", max_tokens=2)
            await asyncio.sleep(READING_S / 2)
            synced.append(await asyncio.to_thread(_synced_write, probe.fileno()))
            await asyncio.sleep(READING_S / 2)
            start = time.perf_counter()
            await api.click(pair, "skip")
            acknowledged.append(time.perf_counter() - start)
    after = psutil.cpu_times()
    return Round(acknowledged, synced, (after.steal - before.steal) / (sum(after) - sum(before)))


def _synced_write(descriptor: int) -> float:
    start = time.perf_counter()
    os.write(descriptor, bytes(EVENT_BYTES))
    os.fdatasync(descriptor)
    return time.perf_counter() - start


async def main() -> None:
    async with running_stack() as (api, state, _):
        rounds = [await clicks(api, state, str(number)) for number in range(ROUNDS)]
    acknowledged = [second for one in rounds for second in one.acknowledged]
    synced = [second for one in rounds for second in one.synced]
    detail: dict[str, Any] = dict(
        p99_ms_of_rounds=[one.p99_ms() for one in rounds],
        stolen_of_rounds=[one.stolen for one in rounds],
        **_quantiles("click", acknowledged),
        **_quantiles("synced_write", synced),
        clicks=ROUNDS * CLICKS,
    )
    name, value = "click acknowledged, trainer idle, p99", detail.pop("click_p99_ms")
    record.save("click", "make bench-click", [record.row(name, value, "ms", bar=20.0, better="lower", **detail)])


def _quantiles(name: str, seconds: list[float]) -> dict[str, float]:
    return {f"{name}_p{100 * q:g}_ms": 1000 * record.quantile(seconds, q) for q in (0.5, 0.9, 0.99, 1.0)}


if __name__ == "__main__":
    asyncio.run(main())
