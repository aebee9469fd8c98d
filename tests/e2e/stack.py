"""``tiebreak up`` in a process of its own, on a new state folder and a free port: what the e2e tests look at."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from deploy.api import Api
from deploy.machine import free_port
from deploy.simulate import Clicks, give_clicks, session
from deploy.status import StackStatus, read_status
from deploy.supervisor import child_setup
from telemetry.store import preferences
from tests.processes import command_line

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).with_name("tiny.toml")
START_LIMIT_S = 320.0
MAX_TOKENS = 6


class RunningStack:
    """One launcher and the deployment it runs."""

    def __init__(self, state: Path, config: Path, environ: dict[str, str]) -> None:
        self.state = state
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = state / "up.log"
        self.environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TIEBREAK_STATE": str(state), **environ}
        self.environ["TIEBREAK_PORT"] = str(self.port)
        command = [sys.executable, "-m", "deploy.cli", "up", "--config", str(config)]
        with self.output.open("wb") as log:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, env=self.environ, stdout=log, stderr=subprocess.STDOUT, preexec_fn=child_setup()
            )

    def status(self) -> StackStatus:
        status = read_status(self.state)
        assert status is not None, self.said()
        return status

    def pid(self, name: str) -> int:
        """The process called ``name``, now."""
        pid = next(process.pid for process in self.status().processes if process.name == name)
        assert pid is not None, f"{name} does not run\n{self.said()}"
        return pid

    def restarts(self, name: str) -> int:
        return next(process.restarts for process in self.status().processes if process.name == name)

    def replicas(self) -> list[int]:
        """Process ids of the serving replicas: descendants of the serving process."""
        family = psutil.Process(self.pid("serving")).children(recursive=True)
        return [process.pid for process in family if "ServeReplica" in command_line(process)]

    def family(self) -> list[psutil.Process]:
        """The launcher and everything it started."""
        launcher = psutil.Process(self.launcher.pid)
        return [launcher, *launcher.children(recursive=True)]

    def said(self) -> str:
        """What the launcher printed, and the end of every log: for failure messages."""
        logs = sorted((self.state / "logs").glob("*.log"))
        ends = [f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs]
        return "\n".join([self.output.read_text(errors="replace"), *ends])

    def wait_for(self, is_so: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert self.launcher.poll() is None, f"the launcher ended\n{self.said()}"
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{self.said()}"
            time.sleep(0.1)

    def is_ready(self) -> bool:
        status = read_status(self.state)
        return status is not None and status.state == "ready"

    def stop(self) -> int:
        """SIGTERM, and wait; the exit status."""
        self.launcher.send_signal(signal.SIGTERM)
        return self.launcher.wait(90)

    def clicks(self, wanted: int, *, users: int = 4, seed: int = 0) -> list[str]:
        """Give verdicts over HTTP; the ids that were acknowledged."""

        async def click() -> list[str]:
            async with session() as http:
                api = Api(http, self.url)
                done = await give_clicks(api, "short", Clicks(wanted), users=users, seed=seed, max_tokens=MAX_TOKENS)
                return done.preference_ids

        return asyncio.run(click())

    def call(self, act: Callable[[Api], Any]) -> Any:
        """What ``act`` returns, given a client of this stack."""

        async def run() -> Any:
            async with session() as http:
                return await act(Api(http, self.url))

        return asyncio.run(run())

    def stored(self) -> Counter[str]:
        """How often each verdict is in the preference store."""
        return Counter(row["preference_id"] for row in preferences(self.state / "store"))

    def stages(self, preference_id: str) -> dict[str, dict[str, Any]]:
        """stage → what its receipt says."""
        receipt = self.call(lambda api: api.receipt(preference_id))
        return {stage["stage"]: stage for stage in receipt["stages"]}


def survivors(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that still run after ``timeout_s``; one that waits to be reaped does not."""
    deadline = time.monotonic() + timeout_s
    while (alive := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def running_stack(config: Path = TINY, **environ: str) -> Iterator[RunningStack]:
    """A stack that is ready; stopped, and its state removed, at the end."""
    with tempfile.TemporaryDirectory(prefix="tiebreak-e2e-") as folder:
        stack = RunningStack(Path(folder), config, environ)
        try:
            stack.wait_for(stack.is_ready, START_LIMIT_S, "ready")
            yield stack
        finally:
            if stack.launcher.poll() is None:
                stack.stop()
