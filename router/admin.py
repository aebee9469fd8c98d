"""Releases for operators: what is where, what happened, and orders to the release controller.

The controller alone moves versions. An order is put into its queue in Redis and answered 202; what became of
it shows in the history.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.errors import InvalidRequest, Unavailable
from router.schema import ReleaseOrder
from telemetry.manifest import VERSION_PATTERN
from telemetry.routing import COMMANDS_KEY, HISTORY_KEY, Replica, ReplicaTable, RoutingTable, VariantRoute

HISTORY_LENGTH: Final = 100
Command = Literal["promote", "rollback"]


class Releases(msgspec.Struct, frozen=True):
    """``GET /admin/releases``: the routing table as it is, and the latest changes, newest first."""

    routing: RoutingTable
    history: tuple[msgspec.Raw, ...]


class Order(msgspec.Struct, frozen=True):
    """What the release controller reads from its queue, and what its sender gets back."""

    command: Command
    version: str
    actor: str
    force: bool
    reason: str


class HeldVersion(msgspec.Struct, frozen=True):
    """One version in one replica."""

    version: str
    state: Literal["ready", "loading", "draining", "failed"]
    in_flight: int
    wanted_by: tuple[str, ...]  # "variant channel" of every route that names it
    reason: str = ""  # of a failure


class ReplicaVersions(msgspec.Struct, frozen=True):
    """One replica; versions of another base are none of its business."""

    replica_id: str
    base: str
    is_ready: bool
    in_flight: int
    free_slots: int
    versions: tuple[HeldVersion, ...]


class HeldVersions(msgspec.Struct, frozen=True):
    """``GET /admin/versions``: the fleet as the control loop last saw it, at unix time ``updated_at_s``."""

    updated_at_s: float
    replicas: tuple[ReplicaVersions, ...]


def held_versions(routing: RoutingTable, table: ReplicaTable) -> HeldVersions:
    """Both tables joined: which version is where, and what it is there for."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for route in (route for routes in routing.policies.values() for route in routes):
        for channel, version in _channels(route):
            wanted.setdefault((route.base, version), []).append(f"{route.variant} {channel}")
    return HeldVersions(table.updated_at_s, tuple(_versions_of(replica, wanted) for replica in table.replicas))


def _channels(route: VariantRoute) -> tuple[tuple[str, str], ...]:
    """(channel, its version, which may be empty)"""
    return (
        ("stable", route.stable),
        ("previous", route.previous),
        ("canary", route.canary),
        ("shadow", route.shadow),
        ("base", route.base_version),
    )


def _versions_of(replica: Replica, wanted: Mapping[tuple[str, str], list[str]]) -> ReplicaVersions:
    states: dict[str, Literal["ready", "loading", "draining", "failed"]] = {
        **dict.fromkeys(replica.failed, "failed"),
        **dict.fromkeys(replica.loading, "loading"),
        **dict.fromkeys(replica.draining, "draining"),
        **dict.fromkeys(replica.versions, "ready"),
    }
    held = tuple(
        HeldVersion(
            version=version,
            state=state,
            in_flight=replica.in_flight_by_version.get(version, 0),
            wanted_by=tuple(dict.fromkeys(wanted.get((replica.base, version), ()))),
            reason=replica.failed.get(version, "") if state == "failed" else "",
        )
        for version, state in sorted(states.items())
    )
    return ReplicaVersions(
        replica.replica_id, replica.base, replica.is_ready, replica.in_flight, replica.free_slots, held
    )


def checked_version(version: str) -> str:
    """A version's name. Raises InvalidRequest."""
    if not VERSION_PATTERN.fullmatch(version):
        message = "This is no version name; GET /admin/releases lists them."
        raise InvalidRequest(message, param="version", code="invalid_value")
    return version


class ReleaseDesk:
    """Reads the history and takes orders."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def read(self, routing: RoutingTable) -> Releases:
        """What is where, and the latest changes."""
        try:
            history = await cast(Any, self._redis.lrange(HISTORY_KEY, 0, HISTORY_LENGTH - 1))
        except (RedisError, OSError) as error:
            raise _unavailable() from error
        return Releases(routing, tuple(msgspec.Raw(entry) for entry in history))

    async def order(self, command: Command, version: str, body: ReleaseOrder, actor: str) -> Order:
        """Queue an order; the controller decides."""
        order = Order(command, version, actor or "operator", body.force, body.reason)
        try:
            await cast(Any, self._redis.rpush(COMMANDS_KEY, msgspec.json.encode(order)))
        except (RedisError, OSError) as error:
            raise _unavailable() from error
        return order


def _unavailable() -> Unavailable:
    message = "The release controller's queue cannot be reached now."
    return Unavailable(message, code="state_unavailable", retry_after_s=1.0)
