"""The event log seen by its users: append, and read from a position that the reader keeps itself.

Two implementations, one contract (tests/contract/test_event_log.py): ``kafka_log`` and ``redis_log``
(embedded). There are no consumer-group commits: a reader stores its positions in the same commit as its
data, which is what makes it exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol

import msgspec

MAX_PAYLOAD_BYTES = 1_000_000  # just under Kafka's default message.max.bytes


class LogUnavailable(ConnectionError):
    """The event log does not answer; nothing was acknowledged. Check the broker's address and health."""


class EntryTooLarge(ValueError):
    """The payload is larger than the log takes (MAX_PAYLOAD_BYTES): it can never be appended."""


def too_large(topic: str, payload: bytes) -> EntryTooLarge | None:
    """What the log says to this payload, if it is too large for one entry."""
    if len(payload) <= MAX_PAYLOAD_BYTES:
        return None
    return EntryTooLarge(f"{topic}: an entry of {len(payload)} bytes; the log takes {MAX_PAYLOAD_BYTES}")


class PositionLost(RuntimeError):
    """The stored position is not in the log any more (trimmed, re-created or truncated): halt, never skip."""


class Position(msgspec.Struct, frozen=True, order=True):
    """Where an entry stands: offsets of one (topic, partition) only ever grow."""

    topic: str
    partition: int
    offset: int


class Entry(msgspec.Struct, frozen=True):
    """One entry as read: undecoded, so that a consumer decides what an invalid payload means."""

    position: Position
    key: str
    payload: bytes


Offsets = dict[str, dict[int, int]]  # topic → partition → next offset to read


class EventLog(Protocol):
    """Append and read; safe to share between threads for append, one reader per thread."""

    def append(self, topic: str, key: str, payload: bytes) -> Future[Position]:
        """Queue one entry; the future resolves once it is durable, or raises LogUnavailable or EntryTooLarge."""
        ...

    def append_all(self, entries: Iterable[tuple[str, str, bytes]]) -> list[Future[Position]]:
        """Queue (topic, key, payload) one behind the other: where one is LogUnavailable, so are those after it."""
        ...

    def reader(self, topics: Sequence[str], start: Offsets) -> Reader:
        """Read ``topics`` from ``start``; partitions not named there from their beginning."""
        ...

    def close(self) -> None:
        """Flush what was queued and free the connection."""
        ...


class Reader(Protocol):
    """A cursor over topics. Not thread-safe."""

    def poll(self, *, max_entries: int, timeout_s: float) -> list[Entry]:
        """Up to ``max_entries`` further entries, in order per (topic, partition); empty after the timeout.

        Raises LogUnavailable, or PositionLost when the start is no longer in the log.
        """
        ...

    def lag(self) -> int:
        """Entries appended but not yet polled, over all topics."""
        ...

    def close(self) -> None: ...
