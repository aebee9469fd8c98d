"""A private Kafka broker (KRaft, one node): fetch its jars once, format, start, wait until it answers, stop.

    python -m deploy.kafka.broker --state DIR [--port 9092]

It listens on loopback, without encryption unless a caller sets it up: for tests and trials. Production points
``kafka_bootstrap`` at a cluster.
"""

from __future__ import annotations

import argparse
import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

VERSION = "4.1.0"
POM = Path(__file__).with_name("pom.xml")
HEAP = ("-Xms128m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")


class KafkaNotInstallable(RuntimeError):
    """The broker cannot be had on this machine; the message says what to install."""


def jars() -> Path:
    """The folder of the broker's jars, fetched by Maven on first use into the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "tiebreak" / f"kafka-{VERSION}"
    if not folder.exists():
        _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    maven = _program("mvn", "maven")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".kafka-", dir=folder.parent))
    command = [maven, "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={staging}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not list(staging.glob("kafka_2.13-*.jar")):
        shutil.rmtree(staging)
        raise KafkaNotInstallable(f"Maven could not fetch Kafka {VERSION}: {(done.stdout + done.stderr)[-2000:]}")
    try:
        staging.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(staging)


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise KafkaNotInstallable(f"{name} is not on this machine; on Debian: apt-get install {package}")
    return path


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Broker:
    """One broker process over the data in ``state``; ``start`` again after ``kill`` keeps topics and entries."""

    def __init__(
        self,
        state: Path,
        port: int = 0,
        *,
        protocol: str = "PLAINTEXT",
        settings: Mapping[str, object] = MappingProxyType({}),
        formatting: Sequence[str] = (),
    ) -> None:
        """``protocol``: of its listener; ``settings``: further properties; ``formatting``: of the storage tool."""
        self.state = state
        self._protocol, self._settings, self._formatting = protocol, settings, formatting
        self.port = port or free_port()
        self._controller_port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        """What clients connect to."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The running broker's process id."""
        if self._process is None:
            raise RuntimeError("the broker was not started")
        return self._process.pid

    def start(self, timeout_s: float = 60.0) -> None:
        """Format the state if it is new, start the broker and wait until it accepts connections."""
        self.state.mkdir(parents=True, exist_ok=True)
        self._write_properties()
        if not (self.state / "data" / "meta.properties").exists():
            cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")
            arguments = (
                "kafka.tools.StorageTool",
                "format",
                "-t",
                cluster,
                "-c",
                str(self._properties),
                *self._formatting,
            )
            subprocess.run(self._java(*arguments), check=True, stdout=subprocess.DEVNULL)
        with (self.state / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._java("kafka.Kafka", str(self._properties)), stdout=log, stderr=subprocess.STDOUT
            )
        self._wait(time.monotonic() + timeout_s)

    def stop(self) -> None:
        """Ask the broker to shut down, and wait."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _java(self, *arguments: str) -> list[str]:
        java = _program("java", "default-jre-headless")
        own_death = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        return [*own_death, java, *HEAP, "-cp", f"{jars()}/*", *arguments]

    @property
    def _properties(self) -> Path:
        return self.state / "server.properties"

    def _write_properties(self) -> None:
        controller = f"127.0.0.1:{self._controller_port}"
        self._properties.write_text(
            f"""process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{controller}
listeners={self._protocol}://{self.bootstrap},CONTROLLER://{controller}
advertised.listeners={self._protocol}://{self.bootstrap}
controller.listener.names=CONTROLLER
inter.broker.listener.name={self._protocol}
listener.security.protocol.map={self._protocol}:{self._protocol},CONTROLLER:PLAINTEXT
log.dirs={self.state / "data"}
auto.create.topics.enable=false
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=2000
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
"""
            + "".join(f"{name}={value}\n" for name, value in self._settings.items())
        )

    def _wait(self, deadline: float) -> None:
        assert self._process is not None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.5).close()
                return
            except OSError:
                time.sleep(0.1)
        self.kill()
        tail = (self.state / "broker.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"Kafka did not listen on {self.bootstrap}; the end of its log:\n{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.kafka.broker", description="A private Kafka broker.")
    parser.add_argument("--state", type=Path, required=True, help="folder for its data and log")
    parser.add_argument("--port", type=int, default=9092, help="loopback port, 0 for a free one")
    arguments = parser.parse_args()
    broker = Broker(arguments.state.absolute(), arguments.port)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        broker.start()
        print(f"kafka listens on {broker.bootstrap} (pid {broker.pid})", flush=True)
        while True:
            signal.pause()
    finally:
        broker.stop()


if __name__ == "__main__":
    main()
