"""The serving process with a real Ray Serve: direct ports, versions by the routing table, kill -9, SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import msgspec
import psutil
import pytest
import redis
import tomli_w

from deploy.models import make_tiny
from serving.wire import Chunk
from telemetry.manifest import base_digest, base_version
from telemetry.process import signing_key
from telemetry.routing import (
    REPLICAS_KEY,
    ROUTING_KEY,
    Replica,
    ReplicaTable,
    RoutingTable,
    VariantRoute,
    decode_replicas,
)
from tests.processes import command_line
from tests.unit.serving.conftest import tiny_model as tiny_model
from tests.unit.serving.kit import Reference, ids_of, publish, request

START_S = 240.0  # a crowded machine; alone it takes a tenth of this

pytestmark = pytest.mark.timeout(600)


class Serving:
    """``python -m serving`` over two tiny models, with its state folder and Redis."""

    def __init__(self, state: Path, model: Path, redis_url: str) -> None:
        self.state, self.model, self.other_model = state, model, state / "other"
        make_tiny(8, self.other_model)
        self.redis = redis.Redis.from_url(redis_url)
        left_over = Replica("last-run", "tiny", "http://127.0.0.1:9", True, (base_version(base_digest(model)),), 0, 4)
        self.redis.set(REPLICAS_KEY, msgspec.json.encode(ReplicaTable(time.time(), (left_over,))))
        config = state / "run" / "config.toml"
        config.parent.mkdir(parents=True)
        base = {"threads": 1, "slots": 3, "max_context": 512, "dtype": "float32"}  # its tokens equal the reference's
        document = {
            "telemetry": {"state": str(state), "redis_url": redis_url},
            "serving": {
                "bases": {"tiny": base | {"model": str(model)}, "other": base | {"model": str(self.other_model)}}
            },
        }
        config.write_bytes(tomli_w.dumps(document).encode())
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with (state / "serving.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving", "--config", str(config)], stdout=log, stderr=log, env=environ
            )

    def want(self, stable: str, previous: str = "") -> None:
        base = base_version(base_digest(self.model))
        route = VariantRoute("chat-main", "tiny", base, stable=stable, previous=previous or base)
        table = RoutingTable(int(time.time() * 1000), {"chat": (route,)})
        self.redis.set(ROUTING_KEY, msgspec.json.encode(table))

    def replicas(self, base: str = "tiny") -> tuple[Replica, ...]:
        payload = self.redis.get(REPLICAS_KEY)
        known = decode_replicas(payload).replicas if isinstance(payload, bytes) else ()
        return tuple(replica for replica in known if replica.base == base)

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> float:
        """Wait for ``condition``; the seconds it took."""
        began = time.monotonic()
        while not condition():
            assert self.process.poll() is None, (self.state / "serving.log").read_text()[-4000:]
            assert time.monotonic() - began < timeout_s, f"{what}\n{(self.state / 'serving.log').read_text()[-4000:]}"
            time.sleep(0.1)
        return time.monotonic() - began

    def holds(self, *versions: str) -> bool:
        replicas = self.replicas()
        return bool(replicas) and all(r.is_ready and set(versions) <= set(r.versions) for r in replicas)

    def ask(self, version: str, prompt: str = "Hello there", base: str = "tiny") -> list[Chunk]:
        return asyncio.run(_ask(self.replicas(base)[0].url, version, prompt))

    def replica_process(self) -> psutil.Process:
        """The one of ``tiny``: Serve names it after application and deployment."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        return next(p for p in tree if "ServeReplica:tiny:" in command_line(p))


async def _ask(url: str, version: str, prompt: str) -> list[Chunk]:
    body = msgspec.json.encode(request(version, prompt))
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/generate", data=body) as response:
        assert response.status == 200, await response.text()
        return [msgspec.json.decode(line, type=Chunk) async for line in response.content]


@pytest.fixture(scope="module")
def serving(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, redis_server: object) -> Iterator[Serving]:
    state = tmp_path_factory.mktemp("serving")
    running = Serving(state, tiny_model, redis_server.database(15))  # type: ignore[attr-defined]
    yield running
    if running.process.poll() is None:
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(60)


def test_the_last_runs_replicas_are_forgotten_and_ready_is_announced_when_the_new_one_answers(serving: Serving) -> None:
    ready = serving.state / "run" / "serving.ready"
    seen = set[int]()

    def is_ready() -> bool:
        seen.add(len(serving.replicas()))
        return ready.exists()

    serving.until(is_ready, "serving.ready never came")
    assert 0 in seen, "while this run's replica started, the last run's was still in the table"
    assert json.loads(ready.read_text())["pid"] == serving.process.pid
    assert serving.holds(base_version(base_digest(serving.model)))


def test_a_wanted_version_is_loaded_and_answers_on_the_replicas_own_port(serving: Serving) -> None:
    version, _ = publish(serving.state, serving.model, 1, key=signing_key(serving.state))
    serving.want(version)
    serving.until(lambda: serving.holds(version), "the version was not loaded", 30)
    assert ids_of(serving.ask(version)) == Reference(serving.model, 1).greedy("Hello there", 12)


def test_two_bases_answer_side_by_side_and_each_holds_its_own_versions_alone(serving: Serving) -> None:
    own, other = serving.replicas()[0].versions, serving.replicas("other")[0].versions
    assert other == (base_version(base_digest(serving.other_model)),)
    assert not set(own) & set(other)
    assert ids_of(serving.ask(other[0], base="other")) == Reference(serving.other_model).greedy("Hello there", 12)
    assert ids_of(serving.ask(own[0])) == Reference(serving.model).greedy("Hello there", 12)


def test_a_killed_replica_comes_back_with_its_versions(serving: Serving) -> None:
    first = serving.replicas()[0]
    version = first.versions[1]
    serving.replica_process().kill()
    serving.until(lambda: not serving.holds(version), "the dead replica was not noticed", 10)
    serving.until(lambda: serving.holds(version), "the replica did not come back")
    assert serving.replicas()[0].replica_id != first.replica_id
    assert ids_of(serving.ask(version)) == Reference(serving.model, 1).greedy("Hello there", 12)


def test_a_version_no_longer_wanted_is_unloaded_after_its_successor_is_ready(serving: Serving) -> None:
    old = serving.replicas()[0].versions[1]
    new, _ = publish(serving.state, serving.model, 2, key=signing_key(serving.state))
    serving.want(new, previous=old)
    serving.until(lambda: serving.holds(old, new), "both should be held", 30)
    serving.want(new, previous=new)
    serving.until(lambda: serving.holds(new) and not serving.holds(old), "the old one should go", 30)
    assert ids_of(serving.ask(new)) == Reference(serving.model, 2).greedy("Hello there", 12)


def test_sigterm_stops_everything_that_was_started(serving: Serving) -> None:
    """Also the agents of a raylet that hangs: Ray kills it, and they would wait a minute for a server that is gone."""
    tree = psutil.Process(serving.process.pid).children(recursive=True)
    next(process for process in tree if process.name() == "raylet").suspend()
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(60) == 0
    assert serving.replicas() == (), "nobody takes them for those of the next start"
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert alive == []
