"""The gateway with everything on against LiteLLM's proxy, before the same mock: ``make bench-gateway``.

Keys, limits, arms, consent, events on a log that syncs every write, metrics: all as in production. Gateways run on
core 0, and the one that is not measured is stopped (SIGSTOP), so that nobody pays for another's work; the mock, Redis
and the load on core 1. Rounds are interleaved, figures are medians. LiteLLM lives in an environment of its own under
``.cache``, made on first use.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import redis
import tomli_w

from deploy.machine import free_port
from telemetry.routing import REPLICAS_KEY, ROUTING_KEY, Replica, ReplicaTable, RoutingTable, VariantRoute
from tests.bench import record
from tests.bench.mock_upstream import VERSION
from tests.bench.raw_http import RawClient, open_loop
from tests.servers import RedisServer

ROOT = Path(__file__).parents[2]
LITELLM = "litellm[proxy]==1.106.2"
KEY = "sk-bench-0123456789abcdef"
ROUNDS, ROUND_S, CONNECTIONS = 5, 4, 16
GATEWAY_CORE, OTHER_CORE = "0", "1"
START_S = 120.0
USERS = 50
LATENCY_S = 10.0
SINGLE = {"model": "chat", "messages": [{"role": "user", "content": "How do I keep basil alive?"}], "max_tokens": 8}
PAIR = SINGLE | {"user": "user-1", "preference": {"pair": "always"}}
STREAM = SINGLE | {"stream": True, "max_tokens": 20}


class Gateway(NamedTuple):
    """One that is measured."""

    url: str
    running: subprocess.Popen[bytes]

    @contextmanager
    def alone(self, other: Gateway) -> Iterator[None]:
        """While ``other`` stands still."""
        other.running.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            other.running.send_signal(signal.SIGCONT)


@contextmanager
def process(command: list[str], core: str, log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program on one core; ended with its children."""
    with log.open("wb") as out:
        running = subprocess.Popen(
            ["taskset", "-c", core, *command], stdout=out, stderr=out, cwd=ROOT, env=os.environ | env
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(15)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


@contextmanager
def mock(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.bench.mock_upstream:app", "--port", str(port)]
    command += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    with process(command, OTHER_CORE, folder / "mock.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def tiebreak(folder: Path, upstream: str) -> Iterator[Gateway]:
    """Our router on its own Redis, told of one replica: the mock."""
    server = RedisServer(folder)
    server.start()
    os.sched_setaffinity(server.pid, {int(OTHER_CORE)})
    route = VariantRoute(variant="chat-main", base="mock", base_version=VERSION, stable=VERSION, previous=VERSION)
    replica = Replica("r0", "mock", upstream, True, (VERSION,), 0, 4)
    with redis.Redis.from_url(server.url) as client:
        client.set(ROUTING_KEY, msgspec.json.encode(RoutingTable(1, {"chat": (route,)})))
        client.set(REPLICAS_KEY, msgspec.json.encode(ReplicaTable(time.time(), (replica,))))
    port = free_port()
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    (folder / "keys.toml").write_text(tomli_w.dumps({"keys": [{"name": "bench", "sha256": digest}]}))
    (folder / "config.toml").write_text(
        tomli_w.dumps(
            {
                "stack": {"host": "127.0.0.1", "port": port},
                "telemetry": {"state": str(folder / "state"), "redis_url": server.url},
                "router": {"key_file": str(folder / "keys.toml"), "pairs_per_minute": 1_000_000},
            }
        )
    )
    command = [sys.executable, "-m", "router", "--config", str(folder / "config.toml")]
    try:
        with process(command, GATEWAY_CORE, folder / "router.log") as running:
            yield Gateway(f"http://127.0.0.1:{port}", running)
    finally:
        server.kill()


@contextmanager
def litellm(folder: Path, upstream: str) -> Iterator[Gateway]:
    """LiteLLM's proxy with its key check, told of one OpenAI-compatible model: the mock."""
    port = free_port()
    model = {"model": "openai/mock", "api_base": f"{upstream}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": "chat", "litellm_params": model}],
        "general_settings": {"master_key": KEY},
    }
    (folder / "litellm.json").write_text(json.dumps(config))
    program = _litellm_program()
    command = [str(program), "--config", str(folder / "litellm.json"), "--port", str(port), "--num_workers", "1"]
    quiet = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    with process(command, GATEWAY_CORE, folder / "litellm.log", **quiet) as running:
        yield Gateway(f"http://127.0.0.1:{port}", running)


def _litellm_program() -> Path:
    home = ROOT / ".cache" / "bench-litellm"
    program = home / "bin" / "litellm"
    if not program.exists():
        uv = shutil.which("uv") or str(ROOT / ".cache" / "uv" / "bin" / "uv")
        subprocess.run([uv, "venv", "-q", "--allow-existing", "--python", sys.executable, str(home)], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--python", str(home / "bin" / "python"), LITELLM], check=True)
    return program


async def wait_for(url: str, body: dict[str, Any]) -> None:
    """Until ``body`` is answered 200."""
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as http:
        while True:
            said = "no connection"
            try:
                async with http.post(f"{url}/v1/chat/completions", json=body) as response:
                    said = await response.text()
                    if response.status == 200:
                        return
            except aiohttp.ClientError as error:
                said = str(error)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} does not answer: {said[:500]}")
            await asyncio.sleep(0.2)


def wrk(url: str, body: dict[str, Any], folder: Path) -> float:
    """Requests answered a second at 16 connections; any answer but 2xx is an error of the bench."""
    script = folder / "load.lua"
    lines = ['wrk.method = "POST"', f"wrk.body = [[{json.dumps(body)}]]"]
    lines += ['wrk.headers["Content-Type"] = "application/json"', f'wrk.headers["Authorization"] = "Bearer {KEY}"']
    script.write_text("\n".join(lines))
    command = ["taskset", "-c", OTHER_CORE, "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{ROUND_S}s", "--timeout", "10s"]
    out = subprocess.run([*command, "-s", str(script), url], capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        raise RuntimeError(f"{url}: {out}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", out)
    assert found, out
    return float(found[1])


async def latencies(url: str, body: dict[str, Any], rate: float) -> list[float]:
    """Seconds of each request of an open loop at ``rate``."""
    client = RawClient(url, "/v1/chat/completions", {"Authorization": f"Bearer {KEY}"})
    answers = await open_loop(client, json.dumps(body).encode(), rate=rate, seconds=LATENCY_S)
    client.close()
    assert {answer.status for answer in answers} == {200}
    seconds = [answer.seconds for answer in answers]
    return seconds[len(seconds) // 10 :]  # connections open in the first tenth


async def main() -> None:
    os.sched_setaffinity(0, {int(OTHER_CORE)})
    with tempfile.TemporaryDirectory(prefix="tiebreak-gateway-") as name:
        folder = Path(name)
        with mock(folder) as upstream, tiebreak(folder, upstream) as ours, litellm(folder, upstream) as theirs:
            await wait_for(ours.url, SINGLE)
            await wait_for(theirs.url, SINGLE)
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as http:
                await http.put(f"{ours.url}/v1/users/user-1/consent", json={"pairing": True})
            await wait_for(ours.url, PAIR)
            record.save("gateway", "make bench-gateway", await measure(ours, theirs, upstream, folder))


async def measure(ours: Gateway, theirs: Gateway, upstream: str, folder: Path) -> list[dict[str, Any]]:
    cases = {
        "ours": (ours, theirs, SINGLE),
        "litellm": (theirs, ours, SINGLE),
        "pair": (ours, theirs, PAIR),
        "our stream": (ours, theirs, STREAM),
        "their stream": (theirs, ours, STREAM),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, (gateway, other, body) in cases.items():
            with gateway.alone(other):
                rates[name].append(wrk(f"{gateway.url}/v1/chat/completions", body, folder))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    half = middle["ours"] / 2
    through, direct = [], []
    with ours.alone(theirs):
        for _ in range(3):
            through += await latencies(ours.url, SINGLE, half)
            direct += await latencies(upstream, SINGLE, half)
    added = {q: 1000 * (record.quantile(through, q) - record.quantile(direct, 0.5)) for q in (0.5, 0.99)}
    detail = {"per_second": middle, "rounds": rates, "connections": CONNECTIONS, "baseline": LITELLM}
    return [
        record.row("gateway with everything on, requests/s against LiteLLM's proxy",
                   middle["ours"] / middle["litellm"], "×", bar=20.0, better="higher", **detail),
        record.row("the same, every answer a pair, against LiteLLM's single answers",
                   middle["pair"] / middle["litellm"], "×", bar=12.0, better="higher"),
        record.row("latency added by the gateway at half load, p50", added[0.5], "ms", bar=1.5, better="lower",
                   requests_per_s=half),
        record.row("latency added by the gateway at half load, p99", added[0.99], "ms", bar=8.0, better="lower"),
    ]  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
