"""What the serving benches run: Ray Serve with its direct ports, the router, a Redis that syncs every write."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import redis
import tomli_w

from deploy.config import model_cache
from deploy.machine import free_port
from deploy.models import make_tiny, prepare_model
from deploy.supervisor import child_setup
from telemetry.manifest import base_digest, base_version
from telemetry.process import signing_key
from telemetry.routing import (
    REPLICAS_KEY,
    ROUTING_KEY,
    Replica,
    RoutingTable,
    VariantRoute,
    decode_replicas,
)
from tests.servers import RedisServer
from tests.unit.serving import kit

VERSIONS, RANK = 6, 4
SERVING_CORE, OTHER_CORE = 0, 1
START_S, SETTLE_S = 240.0, 3.0


@dataclass
class Fleet:
    """What runs, by address and by table."""

    url: str
    store: redis.Redis
    base_version: str
    versions: list[str]
    revision: int = 0
    router_pid: int = 0

    async def started(self) -> None:
        """Wait until every replica answers."""
        await until(lambda: self.holds(self.base_version), "serving did not start", START_S)
        await asyncio.sleep(SETTLE_S)

    def route(self, stable: str, previous: str, shadow: str = "") -> None:
        self.revision += 1
        route = VariantRoute("chat-main", "base", self.base_version, stable=stable, previous=previous, shadow=shadow)
        self.store.set(ROUTING_KEY, msgspec.json.encode(RoutingTable(self.revision, {"chat": (route,)})))

    def replicas(self) -> tuple[Replica, ...]:
        payload = self.store.get(REPLICAS_KEY)
        return decode_replicas(payload).replicas if isinstance(payload, bytes) else ()

    def holds(self, version: str) -> bool:
        found = self.replicas()
        return bool(found) and all(replica.is_ready and version in replica.versions for replica in found)

    def is_gone(self, version: str) -> bool:
        return all(version not in (*replica.versions, *replica.draining) for replica in self.replicas())


async def until(condition: Callable[[], bool], what: str, limit_s: float) -> None:
    """Wait for ``condition``, asked in a thread: a wait for Redis must not hold up the clients that are timed here.

    Raises TimeoutError that says ``what``.
    """
    deadline = time.monotonic() + limit_s
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        await asyncio.sleep(0.02)


@contextmanager
def program(module: str, config: Path, log: Path, core: int | None) -> Iterator[int]:
    """``python -m module``, on one core if that is given; its process id."""
    pinned = [] if core is None else ["taskset", "-c", str(core)]
    command = [*pinned, sys.executable, "-m", module, "--config", str(config)]
    with log.open("wb") as out:
        running = subprocess.Popen(
            command, stdout=out, stderr=out, preexec_fn=child_setup(),
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        )  # fmt: skip
    try:
        yield running.pid
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(90)


@contextmanager
def fleet(
    serving: dict[str, Any],
    folder: Path,
    *,
    router: dict[str, Any] | None = None,
    cores: tuple[int | None, int | None] = (None, None),
) -> Iterator[Fleet]:
    """Redis, serving and router; ``VERSIONS`` versions are published, none is loaded.

    ``serving`` is the table of the one base: without a ``model`` the tiny random one answers. ``cores`` are those of
    serving and of the router.
    """
    state, port = folder / "state", free_port()
    if "model" in serving:
        model = prepare_model(serving["model"], model_cache())
    else:
        model = folder / "tiny"
        make_tiny(7, model)
    versions = [
        kit.publish(state, model, number, rank=RANK, key=signing_key(state), size=0.02)[0]
        for number in range(1, VERSIONS + 1)
    ]
    server = RedisServer(folder)
    server.start()
    config = folder / "config.toml"
    document = {
        "stack": {"host": "127.0.0.1", "port": port},
        "telemetry": {"state": str(state), "redis_url": server.url},
        "serving": {"bases": {"base": serving | {"model": str(model)}}},
        "router": router or {},
    }
    config.write_bytes(tomli_w.dumps(document).encode())
    url = f"http://127.0.0.1:{port}"
    with redis.Redis.from_url(server.url) as store:
        running = Fleet(url, store, base_version(base_digest(model)), versions)
        running.route(running.base_version, running.base_version)
        try:
            with (
                program("serving", config, folder / "serving.log", cores[0]),
                program("router", config, folder / "router.log", cores[1]) as router_pid,
            ):
                running.router_pid = router_pid
                yield running
        finally:
            server.kill()
