"""Streams through router and replica against Ray Serve's own proxy and a handle, a second: ``make bench-proxy``.

Both say twenty pieces, a millisecond apart, and share core 0; the load and our Redis are on core 1. Ours does all that
it does in production (consent, arms, limits, an event on a log that syncs every write); the other only forwards.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from deploy.machine import free_port
from tests.bench import ray_proxy, record
from tests.bench.bench_gateway import CONNECTIONS, GATEWAY_CORE, OTHER_CORE, STREAM, process, wrk
from tests.bench.fleet import START_S, fleet

ROUNDS = 5
ECHO = {"engine": "echo", "echo_token_s": ray_proxy.TOKEN_S, "max_queue": 512}
# the echo engine says the version, "says:" and the last message: twenty words
TWENTY = STREAM | {"messages": [{"role": "user", "content": " ".join(["word"] * 18)}]}


@contextmanager
def theirs(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.ray_proxy", str(port), str(folder / "ray")]
    with process(command, GATEWAY_CORE, folder / "proxy.log"):
        yield f"http://127.0.0.1:{port}"


async def answered(url: str) -> None:
    """Wait for a whole stream of ``url``."""
    deadline = asyncio.get_running_loop().time() + START_S
    async with aiohttp.ClientSession() as http:
        while True:
            try:
                async with http.post(url, json=TWENTY) as response:
                    text = await response.text()
                if response.status == 200:
                    assert text.count('"content"') == TWENTY["max_tokens"], text
                    return
            except aiohttp.ClientError as error:
                text = str(error)
            if asyncio.get_running_loop().time() > deadline:
                raise TimeoutError(f"{url} does not stream: {text[:500]}")
            await asyncio.sleep(0.5)


async def main() -> None:
    core = int(GATEWAY_CORE)
    os.sched_setaffinity(0, {int(OTHER_CORE)})
    with (
        tempfile.TemporaryDirectory(prefix="tb-proxy-") as name,
        fleet(ECHO, Path(name), cores=(core, core)) as running,
        theirs(Path(name)) as proxy,
    ):
        await running.started()
        urls = {"ours": f"{running.url}/v1/chat/completions", "ray": proxy}
        for url in urls.values():
            await answered(url)
        rates: dict[str, list[float]] = {side: [] for side in urls}
        for _ in range(ROUNDS):
            for side, url in urls.items():
                rates[side].append(wrk(url, TWENTY, Path(name)))
    middle = {side: statistics.median(values) for side, values in rates.items()}
    row = record.row(
        "streams of 20 pieces a second, router and replica against Ray Serve's proxy and a handle",
        middle["ours"] / middle["ray"], "×", bar=8.0, better="higher", per_second=middle, rounds=rates,
        connections=CONNECTIONS,
    )  # fmt: skip
    record.save("proxy", "make bench-proxy", [row])


if __name__ == "__main__":
    asyncio.run(main())
