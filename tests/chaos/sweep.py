"""Every named crash point with every fault, under load, and then a count: ``python -m tests.chaos.sweep`` (make chaos).

A point is armed; the process that reaches it stops there, and the fault happens while it stands. Then the next one.
At the end all is let run dry, and what clients were told is compared with what is stored (tests/chaos/history.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from deploy.kafka.broker import Broker
from telemetry.config import TelemetryConfig, open_log
from telemetry.configuration import read_table
from telemetry.crashpoints import POINTS
from telemetry.errors import StoreDamaged
from telemetry.event_log import LogUnavailable
from telemetry.events import TOPICS
from telemetry.outbox import OutboxLog
from telemetry.store import Store
from tests.chaos.clients import Clients
from tests.chaos.deployment import Deployment, deployed
from tests.chaos.history import Findings, Verdicts, appended, check

KILL, FREEZE, BROKER_KILL, BROKER_FREEZE, REDIS_KILL, DISK_FULL = FAULTS = (
    "SIGKILL", "freeze", "broker kill", "broker freeze", "Redis kill", "disk full",
)  # fmt: skip
REACH_S: Final = 60.0  # a killed process starts anew within that, on two busy cores


@dataclass
class Settings:
    """How long faults last, and how fast people click."""

    freeze_s: float = 5.0
    broker_down_s: float = 2.0
    broker_freeze_s: float = 30.0
    redis_down_s: float = 1.0
    disk_full_s: float = 3.0
    pause_s: float = 0.5  # of each client between two questions: the trainer shares these cores and has to keep up
    stalled_s: float = 180.0  # at the end: so long nothing more is stored or trained on


@dataclass
class Sweep:
    """What was done."""

    deployment: Deployment
    settings: Settings
    verdicts: Verdicts = field(default_factory=Verdicts)
    done: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)

    def run(self, combinations: Iterable[tuple[str, str]]) -> None:
        """Each (point, fault) once, with a word on standard error."""
        clients = Clients(self.deployment.url, self.verdicts, self.settings.pause_s)
        clients.start()
        try:
            for point, fault in combinations:
                was_reached = self._one(point, fault)
                (self.done if was_reached else self.missed)[fault] += 1
                print(f"{point:28} {fault:14} {'' if was_reached else 'not reached'}", file=sys.stderr, flush=True)
        finally:
            clients.over.set()
            clients.join()

    def _one(self, point: str, fault: str) -> bool:
        """Arm ``point``, and let ``fault`` happen where it is reached; False where it is not in time."""
        if fault == DISK_FULL and not self.deployment.has_own_disk:
            return False
        armed = self.deployment.points / f"{point}.armed"
        armed.touch()
        is_of_outbox = point.startswith("outbox.")
        if is_of_outbox:  # reached only while the broker is away
            self.deployment.broker.kill()
        try:
            pid = self._reached(point, armed, starts_broker=point == "outbox.sent")
            if pid is None:
                return False
            try:
                self._let_happen(fault, pid)
            finally:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            return True
        finally:
            if is_of_outbox:
                self._start_broker()

    def _reached(self, point: str, armed: Path, *, starts_broker: bool) -> int | None:
        """The process that stands at the point."""
        deadline = time.monotonic() + REACH_S
        begun = time.monotonic()
        while time.monotonic() < deadline:
            for path in self.deployment.points.glob(f"{point}.reached.*"):
                path.unlink()
                return int(path.suffix[1:])
            if starts_broker and time.monotonic() - begun > self.settings.broker_down_s:
                self._start_broker()
                starts_broker = False
            time.sleep(0.01)
        armed.unlink(missing_ok=True)
        return None

    def _start_broker(self) -> None:
        broker = self.deployment.broker
        try:
            os.kill(broker.pid, 0)
        except (RuntimeError, ProcessLookupError):
            broker.start()

    def _let_happen(self, fault: str, pid: int) -> None:
        """The process stands still now; it goes on when this returns, unless it was killed."""
        settings, deployment = self.settings, self.deployment
        broker, redis, filler = deployment.broker, deployment.redis, deployment.state / "filler"
        if fault == KILL:
            os.kill(pid, signal.SIGKILL)
            return
        if fault == FREEZE:
            time.sleep(settings.freeze_s)
            return
        begin, lasts_s, end = {
            BROKER_KILL: (broker.kill, settings.broker_down_s, broker.start),
            BROKER_FREEZE: (_to(broker, signal.SIGSTOP), settings.broker_freeze_s, _to(broker, signal.SIGCONT)),
            REDIS_KILL: (redis.kill, settings.redis_down_s, redis.start),
            DISK_FULL: (lambda: _fill(filler), settings.disk_full_s, filler.unlink),
        }[fault]
        begin()
        os.kill(pid, signal.SIGCONT)
        time.sleep(lasts_s)
        end()

    def findings(self) -> Findings:
        """Let everything run dry, and count."""
        deployment, store = self.deployment, self.deployment.state / "store"
        deployment.wait_ready()
        time.sleep(2.0)  # the outbox of the writer's last life
        deployment.end("writer")
        _drain_outbox(deployment)
        least, deadline = None, 0.0
        while True:
            is_read = _is_read(deployment)
            found = check(store, self.verdicts, deployment.history)
            left = len(found.lost) + len(found.untrained)
            if least is None or left < least:
                least, deadline = left, time.monotonic() + self.settings.stalled_s
            if (is_read and not left) or time.monotonic() > deadline:
                return found
            time.sleep(1.0)


def _to(broker: Broker, number: signal.Signals) -> Callable[[], None]:
    def send() -> None:
        with suppress(RuntimeError):  # killed already, for an outbox's point
            os.kill(broker.pid, number)

    return send


def _fill(path: Path) -> None:
    """Write until the disk is full."""
    subprocess.run(["dd", "if=/dev/zero", f"of={path}", "bs=64k"], capture_output=True, check=False)


def _is_read(deployment: Deployment) -> bool:
    """Whether the store holds the log to its end."""
    telemetry = read_table(deployment.config, "telemetry", TelemetryConfig)
    log = open_log(telemetry)
    try:
        reader = log.reader(TOPICS, Store(telemetry.store_root).offsets())
        try:
            return reader.lag() == 0
        finally:
            reader.close()
    except (LogUnavailable, StoreDamaged, OSError):  # it was asked at a bad moment
        return False
    finally:
        log.close()


def _drain_outbox(deployment: Deployment) -> None:
    """What the writer's outbox still holds is sent, as its next start would do it."""
    telemetry = read_table(deployment.config, "telemetry", TelemetryConfig)
    outbox = OutboxLog(open_log(telemetry), telemetry.state_path / "outbox" / "writer")
    deadline = time.monotonic() + REACH_S
    while outbox.pending and time.monotonic() < deadline:
        time.sleep(0.1)
    outbox.close()


def said(sweep: Sweep, found: Findings, seconds: float) -> dict[str, object]:
    """The result as one document."""
    tried, done = appended(sweep.deployment.history)
    return {
        "kills_and_faults": sum(sweep.done.values()), "by_fault": dict(sweep.done), "not_reached": dict(sweep.missed),
        "events": found.events, "acknowledged": found.acknowledged, "appended": len(tried), "of_these_done": len(done),
        "verdicts": len(sweep.verdicts.acknowledged), "ends": dict(sweep.deployment.ends), "seconds": round(seconds),
        **found.faults(), "went_astray": found.went_astray, "is_clean": found.is_clean,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="of all points with all faults")
    parser.add_argument("--kill-rounds", type=int, default=0, help="further ones with SIGKILL alone")
    parser.add_argument("--writes-per-second", type=int, default=300)
    parser.add_argument("--keep", type=Path, help="a folder that does not exist: state and logs, if anything is found")
    options = parser.parse_args(arguments)
    combinations = [(point, fault) for _ in range(options.rounds) for fault in FAULTS for point in POINTS]
    combinations += [(point, KILL) for _ in range(options.kill_rounds) for point in POINTS]
    with tempfile.TemporaryDirectory(prefix="tb-chaos-") as name:
        folder, begun = Path(name), time.monotonic()
        broker = Broker(folder / "kafka")
        broker.start()
        try:
            with deployed(folder, broker, writes_per_second=options.writes_per_second) as deployment:
                sweep = Sweep(deployment, Settings())
                sweep.run(combinations)
                found = sweep.findings()
                document = said(sweep, found, time.monotonic() - begun)
                if options.keep and not found.is_clean:
                    with suppress(shutil.Error):  # of files that went while the others were copied
                        shutil.copytree(folder, options.keep, ignore=shutil.ignore_patterns("kafka", "redis"))
        finally:
            broker.kill()
    print(json.dumps(document))
    for kind in found.faults():
        for each in sorted(getattr(found, kind))[:10]:
            print(f"{kind}: {each}", file=sys.stderr)
    return 0 if found.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
