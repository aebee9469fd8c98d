"""Where the controller's knowledge lies: one document in Redis, saved together with the routing table.

One script saves state, routing table and history and takes the commands that were followed, all or nothing,
and only while this process holds the lease: a controller that slept through its lease changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import redis

from deploy.release.state import Change, VariantState
from telemetry.event_log import Offsets
from telemetry.events import ReleaseChanged, utc_now
from telemetry.routing import (
    COMMANDS_KEY,
    HISTORY_KEY,
    REPLICAS_KEY,
    ROUTING_KEY,
    ReplicaTable,
    RoutingTable,
    decode_replicas,
)

STATE_KEY = "tiebreak:releases:state"
LEASE_KEY = "tiebreak:releases:leader"
HISTORY_LENGTH = 200
NEVER = float("-inf")

_HOLD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_SAVE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('SET', KEYS[3], ARGV[3])
redis.call('LTRIM', KEYS[4], ARGV[4], -1)
for i = 6, #ARGV do redis.call('LPUSH', KEYS[5], ARGV[i]) end
redis.call('LTRIM', KEYS[5], 0, ARGV[5])
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class LeaseLost(RuntimeError):
    """Another controller leads now: forget what was decided and stand by."""


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the controller must not forget, its places in the log included."""

    revision: int = 0
    offsets: Offsets = {}
    variants: dict[str, VariantState] = {}
    outbox: tuple[ReleaseChanged, ...] = ()  # decided, perhaps not yet in the log


class HistoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the list of releases that API and CLI show."""

    at: str
    variant: str
    version: str
    state: str
    stable: str
    reason: str
    actor: str
    evidence: dict[str, float] = {}


def history_entry(variant: str, change: Change) -> HistoryEntry:
    """``change`` as the history shows it, dated now."""
    return HistoryEntry(
        at=utc_now().isoformat(timespec="milliseconds"),
        variant=variant,
        version=change.version,
        state=change.state,
        stable=change.stable,
        reason=change.reason,
        actor=change.actor,
        evidence=change.evidence,
    )


class ReleaseStore:
    """The controller's side of Redis. Every call raises redis.RedisError when Redis does not answer."""

    def __init__(self, client: redis.Redis, lease_s: float) -> None:
        self._redis: Any = client
        self._token = f"{os.getpid()}-{os.urandom(8).hex()}"
        self._lease_s = lease_s
        self._renewed_at_s = NEVER

    def hold_lease(self) -> bool:
        """Become or stay the leader; False while another one is. Renewed when a third of it is over."""
        if time.monotonic() - self._renewed_at_s < self._lease_s / 3:
            return True
        asked_at_s = time.monotonic()
        holds = bool(self._redis.eval(_HOLD, 1, LEASE_KEY, self._token, str(int(self._lease_s * 1000))))
        self._renewed_at_s = asked_at_s if holds else NEVER
        return holds

    def release_lease(self) -> None:
        """Let another controller lead at once."""
        self._renewed_at_s = NEVER
        self._redis.eval(_RELEASE, 1, LEASE_KEY, self._token)

    def load(self) -> Saved | None:
        """What the last leader saved; None at the very first start."""
        payload = self._redis.get(STATE_KEY)
        return None if payload is None else msgspec.json.decode(payload, type=Saved)

    def save(self, saved: Saved, table: RoutingTable, *, commands_taken: int, history: Sequence[HistoryEntry]) -> None:
        """All or nothing. Raises LeaseLost when another controller leads."""
        keys = (LEASE_KEY, STATE_KEY, ROUTING_KEY, COMMANDS_KEY, HISTORY_KEY)
        lines = [msgspec.json.encode(entry) for entry in history]
        encoded = (msgspec.json.encode(saved), msgspec.json.encode(table))
        arguments = (self._token, *encoded, str(commands_taken), str(HISTORY_LENGTH - 1), *lines)
        if not self._redis.eval(_SAVE, len(keys), *keys, *arguments):
            self._renewed_at_s = NEVER
            raise LeaseLost("another release controller holds the lease")

    def commands(self, limit: int = 20) -> list[bytes]:
        """The oldest commands, left in place until ``save`` takes them."""
        return list(self._redis.lrange(COMMANDS_KEY, 0, limit - 1))

    def replicas(self) -> ReplicaTable | None:
        """What serving's control loop last reported."""
        payload = self._redis.get(REPLICAS_KEY)
        return None if payload is None else decode_replicas(payload)

    def routing_revision(self) -> int:
        """The revision that readers see; -1 when there is no table."""
        payload = self._redis.get(ROUTING_KEY)
        return -1 if payload is None else msgspec.json.decode(payload, type=RoutingTable).revision
