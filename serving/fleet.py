"""The control loop: what the routing table wants against what every replica holds, twice a second.

Pure in the middle (``steps_for``): wanted versions and one replica's status in, loads and unloads out. At the
rim: Serve's controller tells the replicas' addresses, their own /v1/status what they hold, Redis what is
wanted; the replica table goes to Redis. What does not answer keeps its last known value.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import aiohttp
import msgspec
from msgspec.structs import replace
from redis.asyncio import Redis
from redis.exceptions import RedisError

from serving.errors import ControlPlaneAway
from serving.wire import ReplicaStatus
from telemetry.metrics import REPLICAS_READY
from telemetry.routing import REPLICAS_KEY, ROUTING_KEY, Replica, ReplicaTable, RoutingTable, decode_routing

log = logging.getLogger(__name__)
LINGER_S = 2.0  # an unwanted version stays this long: routers that have not read the new table yet still ask for it
REPEAT_S = 2.0  # a table in which only load changed is written no more often: every write is synced
RETRY_S = 10.0  # a version that a replica refused is offered again after this
STATUS_S = 2.0
LOAD_S = 120.0

Urls = Callable[[str], Awaitable[list[str]]]


class Step(NamedTuple):
    """One change to one replica."""

    verb: str  # PUT loads, DELETE unloads
    version: str
    path: str


def wanted_versions(routing: RoutingTable, base: str) -> dict[str, str]:
    """version → variant, of every version that replicas of ``base`` must hold."""
    routes = [route for variants in routing.policies.values() for route in variants if route.base == base]
    return {version: route.variant for route in routes for version in route.wanted()}


def steps_for(wanted: Mapping[str, str], status: ReplicaStatus) -> list[Step]:
    """What brings one replica to ``wanted``: unloads first, loads only while there are slots."""
    held = {*status.versions[1:], *status.loading, *status.draining}
    unloads = [version for version in status.versions[1:] if version not in wanted]
    loads = [version for version in sorted(wanted) if version not in held]
    return [
        *(Step("DELETE", version, f"/v1/versions/{version}") for version in unloads),
        *(Step("PUT", v, f"/v1/versions/{wanted[v]}/{v}") for v in loads[: status.free_slots]),
    ]


def replica_record(url: str, status: ReplicaStatus, *, is_ready: bool) -> Replica:
    """How the router sees a replica."""
    return Replica(
        replica_id=status.replica_id,
        base=status.base,
        url=url,
        is_ready=is_ready,
        versions=status.versions,
        in_flight=sum(status.in_flight.values()),
        free_slots=status.free_slots,
        loading=status.loading,
        draining=status.draining,
        failed=status.failed,
        in_flight_by_version=status.in_flight,
        takes_tools=status.takes_tools,
        scores_answers=status.scores_answers,
    )


class Fleet:
    """Keeps the replicas of ``bases`` (name → how many) at what the routing table wants."""

    def __init__(self, bases: Mapping[str, int], urls: Urls, redis: Redis, session: aiohttp.ClientSession) -> None:
        self._unwanted: dict[tuple[str, str], float] = {}  # (url, version) → since when nobody wants it there
        self._bases, self._urls, self._redis, self._session = bases, urls, redis, session
        self._routing = RoutingTable(0, {})
        self._known: dict[str, list[str]] = {base: [] for base in bases}
        self._last: dict[str, ReplicaStatus] = {}  # url → last status
        self._silent: set[str] = set()
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}  # (url, version) → step under way
        self._refused: dict[tuple[str, str], float] = {}  # (url, version) → when to offer it again
        self._published: list[Replica] | None = None  # the last table written, without its load
        self._published_at_s = 0.0
        self._changed = asyncio.Event()
        self.is_settled = False  # all replicas answer and hold what is wanted

    async def run(self, interval_s: float) -> None:
        """Look and act for ever; a finished step brings the next look forward."""
        while True:
            await self.look()
            try:
                await asyncio.wait_for(self._changed.wait(), interval_s)
            except TimeoutError:
                continue
            self._changed.clear()

    async def drain(self, timeout_s: float) -> None:
        """Wait until no replica has a request in flight, but not longer than ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        urls = [url for known in self._known.values() for url in known]
        while time.monotonic() < deadline:
            seen = await asyncio.gather(*(self._status(url) for url in urls))
            if not any(status.in_flight or status.queued for status in seen if status):
                return
            await asyncio.sleep(0.1)

    async def look(self) -> None:
        """One round: read, publish what is seen, begin the steps that are missing."""
        await self._read_routing()
        replicas: list[Replica] = []
        missing = 0
        for base, count in self._bases.items():
            urls = await self._addresses(base)
            seen = await asyncio.gather(*(self._status(url) for url in urls))
            wanted = wanted_versions(self._routing, base)
            ready = 0
            for url, status in zip(urls, seen, strict=True):
                if status is None:
                    if url in self._last:
                        replicas.append(replica_record(url, self._last[url], is_ready=False))
                    continue
                ready += 1
                replicas.append(replica_record(url, status, is_ready=True))
                missing += len(set(wanted) - set(status.versions) - set(status.failed))
                self._begin(url, steps_for(wanted, status))
            REPLICAS_READY.labels(base).set(ready)
            missing += max(0, count - ready)
        self.is_settled = missing == 0
        await self._publish(ReplicaTable(time.time(), tuple(replicas)))

    async def _read_routing(self) -> None:
        try:
            payload = await self._redis.get(ROUTING_KEY)
            if isinstance(payload, bytes):
                self._routing = decode_routing(payload)
        except (RedisError, OSError, msgspec.DecodeError) as error:
            log.warning("routing table kept: %s", error, extra={"action": "routing_kept"})

    async def _publish(self, table: ReplicaTable) -> None:
        """Write what has changed at once, and the load now and then."""
        shape = [replace(replica, in_flight=0, in_flight_by_version={}) for replica in table.replicas]
        if shape == self._published and 0 <= table.updated_at_s - self._published_at_s < REPEAT_S:
            return
        try:
            await self._redis.set(REPLICAS_KEY, msgspec.json.encode(table))
        except (RedisError, OSError) as error:
            log.warning("replica table not written: %s", error, extra={"action": "replicas_not_written"})
            return
        self._published, self._published_at_s = shape, table.updated_at_s

    async def _addresses(self, base: str) -> list[str]:
        try:
            urls = await self._urls(base)
        except ControlPlaneAway as error:
            log.warning("replicas kept: %s", error, extra={"action": "replicas_kept"})
            return self._known[base]
        if set(urls) != set(self._known[base]):
            log.info("replicas of %s: %s", base, urls, extra={"action": "replicas_changed", "base": base, "urls": urls})
        self._known[base] = urls
        return urls

    async def _status(self, url: str) -> ReplicaStatus | None:
        timeout = aiohttp.ClientTimeout(total=STATUS_S)
        try:
            async with self._session.get(f"{url}/v1/status", timeout=timeout) as response:
                response.raise_for_status()
                status = msgspec.json.decode(await response.read(), type=ReplicaStatus)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            if url not in self._silent:
                log.warning("replica does not answer: %s", error, extra={"action": "replica_silent", "url": url})
            self._silent.add(url)
            return None
        self._silent.discard(url)
        self._last[url] = status
        return status

    def _begin(self, url: str, steps: list[Step]) -> None:
        now_s = time.monotonic()
        unwanted = {(url, step.version) for step in steps if step.verb == "DELETE"}
        self._unwanted = {key: at for key, at in self._unwanted.items() if key[0] != url or key in unwanted}
        for step in steps:
            key = (url, step.version)
            if step.verb == "DELETE" and now_s - self._unwanted.setdefault(key, now_s) < LINGER_S:
                continue
            if key not in self._tasks and self._refused.get(key, 0.0) < time.monotonic():
                task = asyncio.create_task(self._carry_out(url, step))
                self._tasks[key] = task
                task.add_done_callback(lambda _, key=key: self._end(key))  # type: ignore[misc]

    def _end(self, key: tuple[str, str]) -> None:
        del self._tasks[key]
        self._changed.set()

    async def _carry_out(self, url: str, step: Step) -> None:
        timeout = aiohttp.ClientTimeout(total=LOAD_S)
        try:
            async with self._session.request(step.verb, url + step.path, timeout=timeout) as response:
                answer = await response.text()
                if response.status < 400:
                    return
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            answer = str(error)
        self._refused[url, step.version] = time.monotonic() + RETRY_S
        details = {"action": "step_failed", "verb": step.verb, "version": step.version, "url": url}
        log.warning("replica refused a step: %s", answer, extra=details)
