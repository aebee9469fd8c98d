"""The trainer as a process: no death loses or doubles a verdict."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import tomli_w

from telemetry.config import TelemetryConfig, open_log
from telemetry.event_log import EventLog
from telemetry.events import (
    TOPIC_OF,
    BatchTrained,
    VersionPublished,
    encode,
    key_of,
    utc_now,
)
from tests.servers import RedisServer
from tests.trainer_bench import read_versions
from tests.unit.online_trainer.kit import CONFIG, verdict


class Process:
    """``python -m online_trainer`` on a state folder."""

    def __init__(self, telemetry: TelemetryConfig, model: Path) -> None:
        self.state, self.telemetry, self.settings = telemetry.state_path, telemetry, dict[str, str | float]()
        (self.state / "run").mkdir(exist_ok=True)
        self.config = self.state / "run" / "config.toml"
        self.configure(model=str(model), publish_interval_s=0.5, flush_s=0.5, batch_pairs=8)
        self.ready = self.state / "run" / "trainer.ready"
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, **settings: str | float) -> None:
        """Settings of ``[trainer]`` from the next start on."""
        self.settings |= settings
        telemetry = {"state": self.telemetry.state, "redis_url": self.telemetry.redis_url}
        trainer = msgspec.to_builtins(CONFIG) | self.settings
        self.config.write_text(tomli_w.dumps({"telemetry": telemetry, "trainer": trainer}))

    def start(self) -> None:
        self.ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "online_trainer", "--config", str(self.config)]
        with (self.state / "trainer.log").open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log)
        wait_for(self.ready.exists, self.text)

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def text(self) -> str:
        return (self.state / "trainer.log").read_text()[-3000:]


@pytest.fixture
def process(telemetry_config: TelemetryConfig, tiny_model: Path) -> Iterator[Process]:
    """Not started yet; dead after the test, whatever happened."""
    found = Process(telemetry_config, tiny_model)
    yield found
    if found.process is not None:
        found.process.kill()
        found.process.wait()


def wait_for(condition: Callable[[], bool], tell: Callable[[], str], timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.05)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_every_verdict_is_trained_on_once(
    telemetry_config: TelemetryConfig, process: Process, processes: int
) -> None:
    process.configure(processes=processes)
    log = open_log(telemetry_config)

    def click() -> None:
        for number in range(150):
            event = msgspec.structs.replace(verdict(number), occurred_at=utc_now())
            log.append(TOPIC_OF[type(event)], key_of(event), encode(event)).result()
            time.sleep(0.05)

    clicking = threading.Thread(target=click)
    process.start()
    clicking.start()
    for pause_s in (0.7, 1.4):
        time.sleep(pause_s)
        process.end(signal.SIGKILL)
        process.start()
    clicking.join()
    given = {f"preference-{n}" for n in range(150)}

    def trained() -> list[str]:
        batches = [event for event in read_versions(log) if isinstance(event, BatchTrained)]
        return [name for batch in batches for name in batch.preference_ids]

    wait_for(lambda: set(trained()) == given, process.text)
    wait_for(lambda: in_versions(log) >= given, process.text)
    assert process.end(signal.SIGTERM) == 0, process.text()
    assert Counter(trained()) == dict.fromkeys(given, 1)
    log.close()


def in_versions(log: EventLog) -> set[str]:
    """Verdicts that the newest version's lineage holds."""
    versions = {e.version: e for e in read_versions(log) if isinstance(e, VersionPublished)}
    names: set[str] = set()
    at = max(versions, default="")
    while at in versions:
        names |= set(versions[at].preference_ids)
        at = versions[at].parent
    return names


def test_a_second_trainer_on_the_folder_ends_with_a_message(process: Process) -> None:
    process.start()
    assert process.process is not None
    command = [sys.executable, "-m", "online_trainer", "--config", str(process.config)]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"another trainer (pid {process.process.pid}) learns on" in second.stderr
    assert process.end(signal.SIGTERM) == 0


def test_the_trainer_outlives_a_redis_that_dies_and_returns(
    telemetry_config: TelemetryConfig, process: Process, redis_server: RedisServer
) -> None:
    process.start()
    redis_server.restart()
    log = open_log(telemetry_config)
    for number in range(4):
        event = verdict(number)
        log.append(TOPIC_OF[type(event)], key_of(event), encode(event)).result()
    wait_for(lambda: in_versions(log) == {f"preference-{n}" for n in range(4)}, process.text)
    assert process.end(signal.SIGTERM) == 0
    log.close()


def test_without_a_base_model_the_process_says_so_and_ends(telemetry_config: TelemetryConfig, tiny_model: Path) -> None:
    process = Process(telemetry_config, tiny_model / "missing")
    command = [sys.executable, "-m", "online_trainer", "--config", str(process.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1 and "missing" in done.stderr
