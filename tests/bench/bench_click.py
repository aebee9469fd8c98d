"""How long a click waits for its acknowledgement, trainer idle, on the real model: ``make bench-click``.

Beside every click, and in turn with it, a synced write of the size of one event to the same disk: what the machine
itself takes for the one thing that an acknowledgement cannot do without.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from deploy.api import Api
from deploy.personas import TRAINING_PROMPTS
from tests.bench import record
from tests.bench.client import running_stack

CLICKS, READING_S = 500, 0.3
EVENT_BYTES = 4000


async def clicks(api: Api, state: Path) -> tuple[list[float], list[float]]:
    """Seconds from click to acknowledgement, ``READING_S`` after the pair came, and of as many synced writes.

    ``skip`` is recorded like every verdict, and teaches nothing.
    """
    acknowledged, synced = [], []
    with (state / "sync-probe").open("ab", buffering=0) as probe:
        for index in range(CLICKS):
            user = f"idle-{index}"
            await api.consent(user)
            prompt = TRAINING_PROMPTS[index % len(TRAINING_PROMPTS)]
            pair = await api.ask(prompt, user=user, pair="always", max_tokens=2)
            await asyncio.sleep(READING_S / 2)
            synced.append(await asyncio.to_thread(_synced_write, probe.fileno()))
            await asyncio.sleep(READING_S / 2)
            start = time.perf_counter()
            await api.click(pair, "skip")
            acknowledged.append(time.perf_counter() - start)
    return acknowledged, synced


def _synced_write(descriptor: int) -> float:
    start = time.perf_counter()
    os.write(descriptor, bytes(EVENT_BYTES))
    os.fdatasync(descriptor)
    return time.perf_counter() - start


async def main() -> None:
    async with running_stack() as (api, state, _):
        acknowledged, synced = await clicks(api, state)
    row = record.row(
        "click acknowledged, trainer idle, p99",
        1000 * record.quantile(acknowledged, 0.99),
        "ms",
        bar=20.0,
        better="lower",
        p50_ms=1000 * record.quantile(acknowledged, 0.5),
        p90_ms=1000 * record.quantile(acknowledged, 0.9),
        worst_ms=1000 * max(acknowledged),
        synced_write_p50_ms=1000 * record.quantile(synced, 0.5),
        synced_write_p99_ms=1000 * record.quantile(synced, 0.99),
        synced_write_worst_ms=1000 * max(synced),
        clicks=CLICKS,
    )
    record.save("click", "make bench-click", [row])


if __name__ == "__main__":
    asyncio.run(main())
