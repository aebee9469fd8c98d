"""Router, recorder, trainer and a bulk writer as processes, over a real Kafka broker and a real Redis, on a small disk.

Whoever ends is started again, as the launcher does it. What answers is an echo replica in a thread of this process;
the trainer has a model of some hundred kB.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import redis
import tomli_w

from deploy.kafka.broker import Broker, free_port
from deploy.models import prepare_model
from deploy.supervisor import child_setup
from serving.echo_engine import EchoEngine
from telemetry.crashpoints import ENVIRONMENT
from telemetry.routing import REPLICAS_KEY, ROUTING_KEY, ReplicaTable
from tests.router_stack import replica, replica_app, routes, serving_on_loopback
from tests.servers import RedisServer

ROOT = Path(__file__).resolve().parents[2]
DISK_MB = 600
READY_S = 90.0


class Deployment:
    """The processes, and the servers that they need."""

    def __init__(self, folder: Path, broker: Broker, *, writes_per_second: int, recorder: str) -> None:
        self.state, self.broker = folder / "state", broker
        self.points, self.history = folder / "points", folder / "history"
        for path in (self.state, self.points, self.history, folder / "redis"):
            path.mkdir(parents=True, exist_ok=True)
        self.redis = RedisServer(folder / "redis")
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.has_own_disk = _mount(self.state)
        self.config = folder / "config.toml"
        self.config.write_text(tomli_w.dumps(self._document(port, folder)))
        config = ["--config", str(self.config)]
        python = [sys.executable, "-m"]
        history = ["--history", str(self.history), "--per-second", str(writes_per_second)]
        self.commands = {
            "router": [*python, "router", *config],
            "recorder": [*python, recorder, *config],
            "trainer": [*python, "online_trainer", *config],
            "writer": [*python, "tests.chaos.writer", *config, *history],
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.ends: Counter[str] = Counter()
        self._is_watching = False
        self._lock = threading.Lock()

    def _document(self, port: int, folder: Path) -> dict[str, Any]:
        return {
            "stack": {"host": "127.0.0.1", "port": port},
            "telemetry": {
                "state": str(self.state), "redis_url": self.redis.url, "log": "kafka",
                "kafka_bootstrap": self.broker.bootstrap, "kafka_topic_prefix": f"c{os.urandom(4).hex()}.",
                "recorder_flush_s": 0.5, "redis_timeout_s": 2.0,
            },
            "router": {"pair_ratio": 1.0, "pairs_per_minute": 100_000, "cross_variant_ratio": 0.0},
            "trainer": {
                "variant": "chat-main", "base": "echo", "model": str(prepare_model("tiny:7", folder)),
                "layers": 1, "batch_pairs": 16, "flush_s": 1.0, "replay_pairs": 2, "publish_interval_s": 3.0,
                "probe_tokens": 4, "probes": ["Hello?"], "max_passes": 1, "max_pairs_per_cluster": 0,
            },
        }  # fmt: skip

    def start(self) -> None:
        self.redis.start()
        self._serve_replica()
        self._is_watching = True
        for name in self.commands:
            self._start(name)
        threading.Thread(target=self._watch, daemon=True).start()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Until the processes that announce themselves have."""
        for name in ("router", "recorder", "trainer"):
            self._wait(lambda name=name: self._is_ready(name), f"{name} is ready")  # type: ignore[misc]

    def _is_ready(self, name: str) -> bool:
        try:
            said = msgspec.json.decode((self.state / "run" / f"{name}.ready").read_bytes())
        except (OSError, msgspec.MsgspecError):
            return False
        return bool(said["pid"] == self.running[name].pid)

    def _wait(self, is_so: Any, what: str) -> None:
        deadline = time.monotonic() + READY_S
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {READY_S} s\n{self.said()}")
            time.sleep(0.05)

    def said(self) -> str:
        """The end of every process's log."""
        return "\n".join(
            f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in self.history.parent.glob("*.log")
        )

    def _start(self, name: str) -> None:
        environ = os.environ | {ENVIRONMENT: str(self.points), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with (self.history.parent / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                self.commands[name], cwd=ROOT, env=environ, stdout=log, stderr=log, preexec_fn=child_setup()
            )

    def _watch(self) -> None:
        """Thread: start again whoever ended."""
        while self._is_watching:
            with self._lock:
                for name, process in self.running.items():
                    if self._is_watching and process.poll() is not None:
                        self.ends[name] += 1
                        self._start(name)
            time.sleep(0.05)

    def end(self, name: str) -> None:
        """Stop one process gracefully, for good."""
        with self._lock:
            process = self.running.pop(name)
        process.terminate()
        process.wait(60)

    def stop(self) -> None:
        self._is_watching = False
        with self._lock:
            for process in self.running.values():
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(process.pid).resume()
                process.terminate()
            for process in self.running.values():
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._loop.call_soon_threadsafe(self._over.set)
        self._serving.join()
        self.redis.kill()

    def close(self) -> None:
        """After everything was read."""
        if self.has_own_disk:
            subprocess.run(["umount", str(self.state)], check=True)

    def _serve_replica(self) -> None:
        engine, ready = EchoEngine(), threading.Event()

        async def serve() -> None:
            self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
            async with serving_on_loopback(replica_app(engine, self.state)) as url:
                table = ReplicaTable(time.time(), (replica(url, engine.base_version),))
                with redis.Redis.from_url(self.redis.url) as client:
                    client.set(ROUTING_KEY, msgspec.json.encode(routes(engine, stable=engine.base_version)))
                    client.set(REPLICAS_KEY, msgspec.json.encode(table))
                ready.set()
                await self._over.wait()

        self._serving = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self._serving.start()
        ready.wait()


def _mount(folder: Path) -> bool:
    """A small disk of its own for ``folder``, so that it can be filled; False where we may not."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tiebreak-chaos", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def deployed(
    folder: Path, broker: Broker, *, writes_per_second: int, recorder: str = "telemetry.recorder"
) -> Iterator[Deployment]:
    """A deployment that runs; stopped at the end, and its small disk given back."""
    deployment = Deployment(folder, broker, writes_per_second=writes_per_second, recorder=recorder)
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.stop()
        deployment.close()
