"""What the router knows of the fleet: the routing and the replica table, read from Redis again and again.

When Redis does not answer, or a table there cannot be read, the last known one keeps serving.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from telemetry.routing import (
    REPLICAS_KEY,
    ROUTING_KEY,
    Replica,
    ReplicaTable,
    RoutingTable,
    decode_replicas,
    decode_routing,
)

log = logging.getLogger(__name__)


class Tables:
    """The last known tables; ``refresh`` reads them, ``poll`` keeps reading, ``changed`` waits for news."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._news = asyncio.Event()
        self.routing = RoutingTable(0, {})
        self.replicas = ReplicaTable(0.0, ())

    async def refresh(self) -> None:
        """Read both tables once; what cannot be read stays as it was."""
        try:
            routing, replicas = cast(list[bytes | None], await self._redis.mget(ROUTING_KEY, REPLICAS_KEY))
            if routing:
                self.routing = decode_routing(routing)
            if replicas:
                self.replicas = decode_replicas(replicas)
        except (RedisError, OSError, msgspec.DecodeError) as error:
            log.warning("kept the last known tables: %s", error, extra={"action": "tables_kept"})
        self._news.set()
        self._news = asyncio.Event()

    async def poll(self, interval_s: float, stop: asyncio.Event) -> None:
        """Refresh until ``stop`` is set. (Cancelling would not do: redis-py can swallow a cancellation.)"""
        while not stop.is_set():
            await self.refresh()
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), interval_s)

    async def changed(self, timeout_s: float) -> bool:
        """Wait for the next refresh; False when there was none in time."""
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def holding(self, base: str, version: str) -> list[Replica]:
        """Ready replicas of ``base`` that hold ``version``."""
        return [
            replica
            for replica in self.replicas.replicas
            if replica.is_ready and replica.base == base and version in replica.versions
        ]

    def has(self, base: str, version: str) -> bool:
        """Whether some ready replica holds ``version``."""
        return bool(self.holding(base, version))

    def takes_tools(self, base: str) -> bool:
        """False when ready replicas of ``base`` say that they render no tools; nobody there is no such word."""
        known = [replica for replica in self.replicas.replicas if replica.is_ready and replica.base == base]
        return not known or any(replica.takes_tools for replica in known)

    def scorers(self, base: str) -> list[Replica]:
        """Ready replicas of ``base`` that score answers."""
        return [r for r in self.replicas.replicas if r.is_ready and r.base == base and r.scores_answers]

    def missing(self) -> tuple[str, ...]:
        """What is not there yet for every policy's first variant to answer; empty when all is well."""
        if not self.routing.policies:
            return ("routing table",)
        firsts = {policy: routes[0] for policy, routes in self.routing.policies.items() if routes}
        return tuple(
            f"replica that holds {policy}@stable"
            for policy, route in firsts.items()
            if not self.has(route.base, route.stable)
        )
