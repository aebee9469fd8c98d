"""Child processes kept alive: start, wait until they serve, restart with back-off, stop in order, leave nothing behind.

Each program gets a process group, a log file and a mark in its environment by which its descendants are known even
when they lost their parent. On Linux a child gets SIGTERM when its supervisor dies, however that dies. One thread,
one ``tick``; nothing here knows what the programs are.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

MARK = "TIEBREAK_SUPERVISED"
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 60.0  # a life this long wipes out earlier failures
REAP_EVERY_S = 2.0
LARGEST_LOG_BYTES = 50_000_000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

State = Literal["waiting", "starting", "ready", "backing_off", "stopped"]
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Program:
    """One process to keep alive."""

    name: str
    command: tuple[str, ...]
    is_ready: Callable[[int], bool]  # given its pid
    environ: Mapping[str, str] = field(default_factory=dict)  # added to ours
    nice: int = 0
    before_start: Callable[[], None] = lambda: None  # clears what an earlier life left


@dataclass
class Child:
    """A program and its present life."""

    program: Program
    log_path: Path
    state: State = "waiting"
    process: subprocess.Popen[bytes] | None = None
    lives: int = 0
    failures: int = 0  # deaths since it last lived long
    started_at: float = 0.0
    ready_after_s: float = 0.0
    due_at: float = 0.0
    last_exit: int | None = None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    @property
    def mark(self) -> str:
        """What the environment of this life's descendants says."""
        return f"{os.getpid()}:{self.program.name}:{self.lives}"

    def log_tail(self, lines: int = 12) -> str:
        """The last lines that the program wrote."""
        with suppress(FileNotFoundError), self.log_path.open("rb") as file:
            file.seek(max(0, self.log_path.stat().st_size - 20_000))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        return ""


def become_reaper() -> None:
    """Orphaned descendants become our children, so that they can be found and ended."""
    if _libc is not None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Supervisor:
    """Keeps ``programs`` alive, in their order; ``on_change`` is told after every change of state."""

    def __init__(self, programs: Sequence[Program], logs: Path, on_change: Callable[[Supervisor], None]) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.children = [Child(program, logs / f"{program.name}.log") for program in programs]
        self._on_change = on_change
        self._reaped_at = 0.0
        become_reaper()

    def start(self, name: str) -> None:
        """Start the program called ``name`` for the first time."""
        self._launch(next(child for child in self.children if child.program.name == name))

    def tick(self) -> None:
        """Look at every child once: notice readiness and deaths, start again who is due."""
        for child in self.children:
            before = child.state
            self._look_at(child)
            if child.state != before:
                self._on_change(self)
        if time.monotonic() - self._reaped_at > REAP_EVERY_S:
            self._reap_orphans()

    def _look_at(self, child: Child) -> None:
        now = time.monotonic()
        if child.process is not None and child.process.poll() is not None:
            self._bury(child, now)
        elif child.state == "starting" and child.process and child.program.is_ready(child.process.pid):
            child.state, child.ready_after_s = "ready", now - child.started_at
        elif child.state == "ready" and child.failures and now - child.started_at > HEALTHY_AFTER_S:
            child.failures = 0
        elif child.state == "backing_off" and now >= child.due_at:
            self._launch(child)

    def _bury(self, child: Child, now: float) -> None:
        """Note a death, end what it left behind, and set the time of its next life."""
        assert child.process is not None
        child.last_exit, child.process = child.process.returncode, None
        _kill(marked(child.mark))
        child.failures += 1
        child.due_at = now + min(FIRST_BACKOFF_S * 2 ** (child.failures - 1), LONGEST_BACKOFF_S)
        child.state = "backing_off"

    def _launch(self, child: Child) -> None:
        program = child.program
        program.before_start()
        child.lives += 1
        if child.log_path.exists() and child.log_path.stat().st_size > LARGEST_LOG_BYTES:
            child.log_path.replace(child.log_path.with_suffix(".log.1"))
        with child.log_path.open("ab") as log:
            child.process = subprocess.Popen(
                program.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **program.environ, MARK: child.mark},
                start_new_session=True,
                preexec_fn=child_setup(program.nice),
            )
        child.started_at, child.state = time.monotonic(), "starting"

    def _reap_orphans(self) -> None:
        """Take note of dead grandchildren, so that they do not stay zombies."""
        self._reaped_at = time.monotonic()
        ours = {child.pid for child in self.children}
        for process in psutil.Process().children():
            if process.pid not in ours:
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)

    def stop(self, timeout_s: float) -> list[str]:
        """Stop every child, last started first, and what they left; the names of those that had to be killed."""
        killed = []
        for child in reversed(self.children):
            if child.process is not None and not _terminate(child.process, timeout_s):
                killed.append(child.program.name)
            child.process, child.state = None, "stopped"
            if child.lives:
                _kill(marked(child.mark))
            self._on_change(self)
        return killed


def child_setup(nice: int = 0) -> Callable[[], None]:
    """What a child does between fork and exec: take its niceness, and promise not to outlive us.

    Call Popen from a thread that lasts: Linux counts the death of the thread that forked as the parent's.
    """
    parent = os.getpid()

    def setup() -> None:
        if nice:
            os.nice(nice)
        if _libc is not None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:  # it died in between
                os._exit(1)

    return setup


def _terminate(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """SIGTERM, then SIGKILL to its group after ``timeout_s``; whether it stopped by itself."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    return True


def marked(mark: str) -> list[psutil.Process]:
    """Our descendants that carry ``mark``; nobody else's process can be among them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=5.0)
