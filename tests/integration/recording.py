"""A recorder process for tests, and what the store holds afterwards."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
from deltalake import DeltaTable

from telemetry.config import TelemetryConfig
from telemetry.event_log import EventLog
from telemetry.events import TOPIC_OF, AnyEvent, encode, key_of
from telemetry.rows import TABLE_OF


class RecorderProcess:
    """``python -m telemetry.recorder`` with ``config``; its log goes to ``state/recorder.log``."""

    def __init__(self, config: TelemetryConfig) -> None:
        self._config = config
        self._toml = config.state_path / "config.toml"
        values = {k: v for k, v in msgspec.to_builtins(config).items() if v != ""}
        lines = [f"{name} = {msgspec.json.encode(value).decode()}" for name, value in values.items()]
        self._toml.write_text("\n".join(["[telemetry]", *lines]))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RecorderProcess:
        self.ready_path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "telemetry.recorder", "--config", str(self._toml)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def log_path(self) -> Path:
        return self._config.state_path / "recorder.log"

    @property
    def ready_path(self) -> Path:
        return self._config.state_path / "run" / "recorder.ready"

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def loaded(self) -> set[str]:
        """Which of the heavy libraries it has in memory."""
        assert self.process is not None
        mapped = Path(f"/proc/{self.process.pid}/maps").read_text()
        return {name for name in ("pyarrow", "pandas", "_dataset") if f"/{name}" in mapped}

    def stop(self) -> int:
        """SIGTERM once it is ready; the exit status."""
        wait_for(self.ready_path.exists, "ready")
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(20)


def append(log: EventLog, *events: AnyEvent) -> None:
    """Append and wait until all are durable."""
    for future in [log.append(TOPIC_OF[type(event)], key_of(event), encode(event)) for event in events]:
        future.result(timeout=30)


def stored_ids(config: TelemetryConfig) -> Counter[str]:
    """event_id → how many rows of the store have it."""
    found: Counter[str] = Counter()
    for name in TABLE_OF.values():
        uri = f"{config.store_root}/{name}"
        if DeltaTable.is_deltatable(uri):
            found.update(DeltaTable(uri).to_pyarrow_table(columns=["event_id"])["event_id"].to_pylist())
    return found


def wait_for(is_so: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)
