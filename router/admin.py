"""Releases for operators: what is where, what happened, and orders to the release controller.

The controller alone moves versions. An order is put into its queue in Redis and answered 202; what became of
it shows in the history.
"""

from __future__ import annotations

from typing import Any, Final, Literal, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.errors import InvalidRequest, Unavailable
from router.schema import ReleaseOrder
from telemetry.manifest import VERSION_PATTERN
from telemetry.routing import RoutingTable

HISTORY_KEY: Final = "tiebreak:releases:history"
COMMANDS_KEY: Final = "tiebreak:releases:commands"
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
        if not VERSION_PATTERN.match(version):
            message = "This is no version name; GET /admin/releases lists them."
            raise InvalidRequest(message, param="version", code="invalid_value")
        order = Order(command, version, actor or "operator", body.force, body.reason)
        try:
            await cast(Any, self._redis.rpush(COMMANDS_KEY, msgspec.json.encode(order)))
        except (RedisError, OSError) as error:
            raise _unavailable() from error
        return order


def _unavailable() -> Unavailable:
    message = "The release controller's queue cannot be reached now."
    return Unavailable(message, code="state_unavailable", retry_after_s=1.0)
