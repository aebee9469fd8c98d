"""A whole stack for a bench: ``tiebreak up`` in a subprocess, on a free port and a state folder of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from deploy.api import Api, ApiError
from deploy.machine import free_port
from deploy.simulate import session
from deploy.supervisor import child_setup

START_LIMIT_S = 180.0


@asynccontextmanager
async def running_stack(config: str = "deploy/local.toml") -> AsyncIterator[tuple[Api, Path, str]]:
    """(its API, its state folder, its URL); stopped by SIGTERM at the end."""
    with tempfile.TemporaryDirectory(prefix="tiebreak-bench-") as state:
        port = free_port()
        env = os.environ | {"TIEBREAK_PORT": str(port), "TIEBREAK_STATE": state, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "deploy.cli", "up", "--config", config]
        with Path(state, "up.log").open("wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, preexec_fn=child_setup())
        try:
            async with session() as http:
                url = f"http://127.0.0.1:{port}"
                api = Api(http, url)
                await _wait_ready(api, process, Path(state))
                yield api, Path(state), url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=90)


async def _wait_ready(api: Api, process: subprocess.Popen[bytes], state: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            await api.call("GET", "/health/ready")
        except ApiError:
            await asyncio.sleep(0.3)
        else:
            return
    raise TimeoutError(f"the stack does not answer:\n{(state / 'up.log').read_text()[-2000:]}")
