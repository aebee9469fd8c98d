"""The stack from outside, by HTTP only: start ``tiebreak up`` on its own state, ask, click, follow receipts."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

START_LIMIT_S = 180.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@asynccontextmanager
async def running_stack(config: str = "deploy/local.toml", **environ: str) -> AsyncIterator[Client]:
    """A whole stack in a subprocess, on a free port and a new state folder, stopped by SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="tiebreak-bench-") as state:
        port = free_port()
        env = os.environ | {"TIEBREAK_PORT": str(port), "TIEBREAK_STATE": state, "HF_HUB_OFFLINE": "1"} | environ
        command = [sys.executable, "-m", "deploy.cli", "up", "--config", config]
        with Path(state, "up.log").open("wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                client = Client(session, Path(state))
                await client.wait_ready(process)
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=90)


class Client:
    """One application back end: speaks for several users."""

    def __init__(self, session: aiohttp.ClientSession, state: Path) -> None:
        self.session = session
        self.state = state

    async def wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the stack stopped at once:\n{(self.state / 'up.log').read_text()}")
            try:
                async with self.session.get("/health/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.3)
        raise TimeoutError(f"not ready after {START_LIMIT_S} s:\n{(self.state / 'up.log').read_text()}")

    async def consent(self, user: str) -> None:
        async with self.session.put(f"/v1/users/{user}/consent", json={"pairing": True}) as response:
            response.raise_for_status()

    async def ask(
        self, prompt: str, *, model: str = "chat", user: str = "", pair: str = "never", **body: Any
    ) -> tuple[dict[str, Any], Any]:
        """(body, headers) of one chat completion; raises on an error status."""
        request = {"model": model, "messages": [{"role": "user", "content": prompt}], "preference": {"pair": pair}}
        if user:
            request["user"] = user
        async with self.session.post("/v1/chat/completions", json=request | body) as response:
            response.raise_for_status()
            return await response.json(), response.headers

    async def click(self, shown: dict[str, Any], choice: str) -> tuple[dict[str, Any], float]:
        """(receipt, seconds until it was acknowledged)"""
        pair = shown["preference"]
        verdict = {"pair_id": pair["pair_id"], "token": pair["token"], "choice": choice}
        start = time.perf_counter()
        async with self.session.post("/v1/preferences", json=verdict) as response:
            receipt = await response.json()
            response.raise_for_status()
        return receipt, time.perf_counter() - start

    async def receipt(self, preference_id: str) -> dict[str, Any]:
        async with self.session.get(f"/v1/preferences/{preference_id}") as response:
            response.raise_for_status()
            answer: dict[str, Any] = await response.json()
            return answer
