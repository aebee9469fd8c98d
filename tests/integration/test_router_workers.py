"""Two workers of one router, real processes on one port, behave as one."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import tomli_w
from prometheus_client.multiprocess import MultiProcessCollector

from deploy.machine import free_port
from serving.echo_engine import EchoEngine
from telemetry.config import TelemetryConfig
from telemetry.metrics import SHARED_FOLDER
from tests.router_stack import Stack, running_stack

WORKERS = 2
KEY = "sk-workers-0123456789"
START_S = 30.0


@dataclass
class Workers:
    """The processes, by number, and their address."""

    url: str
    config: Path
    state: Path
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    async def start(self, worker: int) -> None:
        ready = self.state / "run" / ("router.ready" if worker == 1 else f"router-{worker}.ready")
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "router", "--config", str(self.config), "--worker", str(worker)]
        environ = os.environ | {SHARED_FOLDER: str(self.state / "metrics")}
        self.running[worker] = subprocess.Popen(command, env=environ)
        deadline = time.monotonic() + START_S
        while not ready.exists():
            assert self.running[worker].poll() is None and time.monotonic() < deadline
            await asyncio.sleep(0.05)

    def kill(self, worker: int) -> None:
        self.running[worker].kill()
        self.running[worker].wait()

    def client(self) -> aiohttp.ClientSession:
        """One whose every request is a new connection: which worker gets it is the kernel's choice."""
        connector = aiohttp.TCPConnector(force_close=True)
        return aiohttp.ClientSession(self.url, connector=connector, headers={"Authorization": f"Bearer {KEY}"})

    async def answered_by(self, worker: int) -> float:
        """Chat requests that one worker has counted."""
        file = self.state / "metrics" / f"counter_{self.running[worker].pid}.db"
        found = MultiProcessCollector.merge([str(file)])
        return sum(s.value for metric in found for s in metric.samples if s.name == "tiebreak_requests_total")

    async def metric(self, name: str) -> float:
        async with self.client() as http, http.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


@asynccontextmanager
async def running_workers(stack: Stack, folder: Path, **router: Any) -> AsyncIterator[Workers]:
    """Workers before the replicas of ``stack``."""
    keys, port = folder / "keys.toml", free_port()
    keys.write_text(tomli_w.dumps({"keys": [{"name": "app", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]}))
    telemetry = msgspec.structs.replace(stack.telemetry, state=str(folder / "state"))
    (folder / "state" / "metrics").mkdir(parents=True)
    config = folder / "config.toml"
    document = {
        "stack": {"host": "127.0.0.1", "port": port},
        "telemetry": msgspec.to_builtins(telemetry),
        "router": {"key_file": str(keys), "workers": WORKERS, "pairs_per_minute": 1000, **router},
    }
    config.write_text(tomli_w.dumps(document))
    workers = Workers(f"http://127.0.0.1:{port}", config, folder / "state")
    try:
        await asyncio.gather(*(workers.start(worker) for worker in range(1, WORKERS + 1)))
        yield workers
    finally:
        for process in workers.running.values():
            process.send_signal(signal.SIGTERM)
        for process in workers.running.values():
            await asyncio.to_thread(process.wait, 20)


@pytest.fixture
async def stack(telemetry_config: TelemetryConfig) -> AsyncIterator[Stack]:
    async with running_stack(telemetry_config) as running:
        yield running


async def post(http: aiohttp.ClientSession, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with http.post(path, json=body) as response:
        return response.status, await response.json()


def ask(words: str = "Say something") -> dict[str, Any]:
    return {"model": "chat", "messages": [{"role": "user", "content": words}]}


async def test_what_one_worker_showed_any_other_takes_verdicts_and_thumbs_on(stack: Stack, tmp_path: Path) -> None:
    async with running_workers(stack, tmp_path) as workers, workers.client() as http:
        async with http.put("/v1/users/ann/consent", json={"pairing": True}) as response:
            assert response.status == 200
        for _ in range(20):
            status, pair = await post(http, "/v1/chat/completions", **ask(), user="ann", preference={"pair": "always"})
            offer = pair["preference"]
            verdict = {"pair_id": offer["pair_id"], "token": offer["token"], "choice": "a"}
            status, receipt = await post(http, "/v1/preferences", **verdict)
            assert status == 201
            assert (await post(http, "/v1/preferences", **verdict))[0] == 200
            async with http.get(f"/v1/preferences/{receipt['id']}") as response:
                assert response.status == 200
            _, single = await post(http, "/v1/chat/completions", **ask())
            thumb = {"completion_id": single["id"], "rating": 1}
            status, said = await post(http, "/v1/feedback", **thumb)
            assert status == 201, said
        assert await workers.metric("tiebreak_requests_total") == 40
        assert await workers.metric("tiebreak_pairs_shown_total") == 20
        assert [await workers.answered_by(worker) > 0 for worker in workers.running] == [True] * WORKERS


async def test_workers_keep_one_limit_for_a_key(telemetry_config: TelemetryConfig, tmp_path: Path) -> None:
    """Twelve slow answers at once, eight are allowed: a worker that counted alone would let more than eight in."""
    async with (
        running_stack(telemetry_config, engine=EchoEngine(token_s=0.5)) as stack,
        running_workers(stack, tmp_path, max_in_flight_per_key=8) as workers,
        workers.client() as http,
    ):
        asked = []
        for _ in range(12):
            asked.append(asyncio.create_task(post(http, "/v1/chat/completions", **ask("one two three four five six"))))
            await asyncio.sleep(0.05)
        assert await workers.metric("tiebreak_requests_in_flight") == 8
        statuses = sorted([status for status, _ in await asyncio.gather(*asked)])
        assert statuses == [200] * 8 + [429] * 4
        assert await workers.metric("tiebreak_requests_in_flight") == 0


async def test_a_killed_worker_takes_no_place_with_it_and_comes_back(
    telemetry_config: TelemetryConfig, tmp_path: Path
) -> None:
    async with (
        running_stack(telemetry_config, engine=EchoEngine(token_s=0.5)) as stack,
        running_workers(stack, tmp_path, max_in_flight_per_key=8) as workers,
        workers.client() as http,
    ):
        workers.kill(1)
        assert (await post(http, "/v1/chat/completions", **ask("hi")))[0] == 200
        slow = ask("word " * 60)
        asked = [asyncio.create_task(post(http, "/v1/chat/completions", **slow)) for _ in range(8)]
        while await workers.metric("tiebreak_requests_in_flight") < 8:
            await asyncio.sleep(0.05)
        await workers.start(1)
        workers.kill(2)
        ended = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(lost, aiohttp.ClientError) for lost in ended)
        assert (await post(http, "/v1/chat/completions", **ask("hi")))[0] == 200, "its eight places are free"
        await workers.start(2)
        assert await workers.metric("tiebreak_requests_in_flight") == 0
        again = await asyncio.gather(*(post(http, "/v1/chat/completions", **ask("hi")) for _ in range(8)))
        assert [status for status, _ in again] == [200] * 8
        assert await workers.metric("tiebreak_requests_total") == 10, "what it counted stays counted"


async def test_workers_that_would_not_count_together_do_not_start(stack: Stack, tmp_path: Path) -> None:
    async with running_workers(stack, tmp_path) as workers:
        command = [sys.executable, "-m", "router", "--config", str(workers.config), "--worker"]
        bare = {name: value for name, value in os.environ.items() if name != SHARED_FOLDER}
        alone = subprocess.run([*command, "1"], env=bare, capture_output=True, text=True, check=False)
        third = subprocess.run([*command, "3"], env=bare, capture_output=True, text=True, check=False)
    assert (alone.returncode, third.returncode) == (2, 2)
    assert SHARED_FOLDER in alone.stderr and "tiebreak up" in alone.stderr
    assert "workers is 2" in third.stderr
