"""Status: numbers from metrics pages, and a launcher that has gone is not believed."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from deploy.status import ProcessStatus, StackStatus, numbers, read_ready, read_status, write_status
from telemetry.process import announce_ready


def status(pid: int, state: str = "ready") -> StackStatus:
    process = ProcessStatus(name="router", state="ready", pid=7, restarts=0, ready_after_s=1.5, last_exit=None)
    return StackStatus(
        state=state,
        url="http://127.0.0.1:8000",
        pid=pid,
        config="deploy/local.toml",
        state_folder="/state",
        updated_at="2026-01-02T03:04:05Z",
        processes=(process,),
    )


def test_numbers_are_summed_over_labels() -> None:
    registry = CollectorRegistry()
    steps = Counter("tiebreak_train_steps_total", "steps", ["variant"], registry=registry)
    steps.labels("chat-main").inc(3)
    steps.labels("chat-calm").inc(4)
    Gauge("tiebreak_trainer_lag_entries", "lag", registry=registry).set(2)
    found = numbers({"trainer": generate_latest(registry).decode()})
    assert found == {"train_steps": 7.0, "trainer_lag": 2.0}


def test_a_process_without_metrics_leaves_its_numbers_out() -> None:
    assert numbers({}) == {}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_status(tmp_path / "run", status(os.getpid()))
    assert read_status(tmp_path) == status(os.getpid())


def test_a_stack_whose_launcher_was_killed_is_dead(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    write_status(tmp_path / "run", status(pid))
    found = read_status(tmp_path)
    assert found is not None
    assert found.state == "dead"


def test_no_stack_ever_is_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None


def test_a_ready_file_is_read_and_an_absent_one_is_none(tmp_path: Path) -> None:
    announce_ready(tmp_path, "router", metrics_url="http://127.0.0.1:1/metrics")
    info = read_ready(tmp_path / "run" / "router.ready")
    assert info is not None
    assert (info["pid"], info["metrics_url"]) == (os.getpid(), "http://127.0.0.1:1/metrics")
    assert read_ready(tmp_path / "run" / "trainer.ready") is None
