"""The supervisor with real processes: restart, back-off, graceful stop, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.supervisor import Child, Program, Supervisor

ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., Supervisor]


def program(name: str, script: str, ready: Path | None = None, **more: object) -> Program:
    command = (sys.executable, "-c", textwrap.dedent(script))
    is_ready = (lambda _: ready.exists()) if ready else (lambda _: True)
    return Program(name, command, is_ready=is_ready, **more)  # type: ignore[arg-type]


def sleeper(name: str = "sleeper") -> Program:
    return program(name, "import time; time.sleep(600)")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start programs under a supervisor that is stopped at the end."""
    started: list[Supervisor] = []

    def _start(*programs: Program) -> Supervisor:
        supervisor = Supervisor(programs, tmp_path / "logs", lambda _: None)
        started.append(supervisor)
        for each in programs:
            supervisor.start(each.name)
        return supervisor

    yield _start
    for supervisor in started:
        supervisor.stop(5.0)


def tick_until(supervisor: Supervisor, is_so: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, [(child.state, child.log_tail()) for child in supervisor.children]
        supervisor.tick()
        time.sleep(0.02)


def only_child(supervisor: Supervisor) -> Child:
    return supervisor.children[0]


def test_a_program_is_ready_when_it_says_so(start: Start, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    script = f"import pathlib, time; time.sleep(0.3); pathlib.Path({str(flag)!r}).touch(); time.sleep(600)"
    supervisor = start(program("slow", script, flag))
    supervisor.tick()
    assert only_child(supervisor).state == "starting"
    tick_until(supervisor, lambda: only_child(supervisor).state == "ready")
    assert only_child(supervisor).ready_after_s >= 0.3


def test_a_killed_program_comes_back_as_another_process(start: Start) -> None:
    supervisor = start(sleeper())
    child = only_child(supervisor)
    tick_until(supervisor, lambda: child.state == "ready")
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    tick_until(supervisor, lambda: child.state == "backing_off")
    assert child.last_exit == -signal.SIGKILL
    tick_until(supervisor, lambda: child.state == "ready")
    assert child.pid != first
    assert child.lives == 2


def test_a_program_that_keeps_dying_is_started_ever_more_slowly(start: Start) -> None:
    supervisor = start(program("broken", "print('no such luck'); raise SystemExit(3)"))
    child = only_child(supervisor)
    waits = []
    for failures in (1, 2, 3):
        tick_until(supervisor, lambda failures=failures: child.failures == failures)  # type: ignore[misc]
        waits.append(child.due_at - time.monotonic())
    assert waits[0] < 0.6 < waits[1] < 1.1 < waits[2]
    assert child.last_exit == 3
    assert "no such luck" in child.log_tail()


def test_what_a_dead_program_left_running_is_ended_before_its_next_life(start: Start, tmp_path: Path) -> None:
    pid_file = tmp_path / "grandchild"
    script = f"""
        import pathlib, subprocess, sys, time
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        pathlib.Path({str(pid_file)!r}).write_text(str(grandchild.pid))
        time.sleep(600)
    """
    supervisor = start(program("parent", script, pid_file))
    child = only_child(supervisor)
    tick_until(supervisor, lambda: child.state == "ready" and pid_file.read_text() != "")
    grandchild = int(pid_file.read_text())
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    tick_until(supervisor, lambda: child.state == "backing_off")
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE


def test_stop_is_graceful_and_in_reverse_order(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "order"
    script = """
        import signal, sys, time
        def end(*_):
            with open({log!r}, "a") as file:
                file.write({name!r} + "\\n")
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        open({ready!r}, "w").close()
        time.sleep(600)
    """
    programs = [
        program(name, script.format(log=str(log), name=name, ready=str(tmp_path / name)), tmp_path / name)
        for name in ("first", "second")
    ]
    supervisor = start(*programs)
    tick_until(supervisor, lambda: all(child.state == "ready" for child in supervisor.children))
    assert supervisor.stop(5.0) == []
    assert log.read_text().split() == ["second", "first"]


def test_a_program_that_ignores_sigterm_is_killed_and_named(start: Start, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    script = f"""
        import pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(flag)!r}).touch()
        time.sleep(600)
    """
    supervisor = start(program("stubborn", script, flag))
    tick_until(supervisor, lambda: only_child(supervisor).state == "ready")
    assert supervisor.stop(0.5) == ["stubborn"]


def test_children_do_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    script = f"""
        import pathlib, sys, time
        from deploy.supervisor import Program, Supervisor
        command = (sys.executable, "-c", "import time; time.sleep(600)")
        programs = [Program("child", command, lambda _: True)]
        supervisor = Supervisor(programs, pathlib.Path({str(tmp_path)!r}), lambda _: None)
        supervisor.start("child")
        print(supervisor.children[0].pid, flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        assert psutil.pid_exists(pid)
        launcher.kill()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5.0)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
