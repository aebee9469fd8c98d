"""The embedded event log: one Redis stream per topic, one partition each.

``append`` queues; a writer thread sends what has gathered as one pipeline, so that Redis (appendonly yes,
appendfsync always) syncs once for all of it, and resolves the futures on its answer. A Redis id ``ms-seq`` is the
offset ``ms << 20 | seq``. A reader looks, in the same transaction as each read, whether the entry before its
position is still there: streams number by the clock, so nothing else tells a re-created stream from the old one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Final

import redis

from telemetry.append_queue import Append, AppendQueue
from telemetry.event_log import Entry, LogUnavailable, Offsets, Position, PositionLost

Connect = Callable[[float], redis.Redis]  # time-out in seconds → client

log = logging.getLogger(__name__)

SEQUENCE_BITS: Final = 20
MAX_GROUP: Final = 512  # entries in one pipeline
RECONNECT_S: Final = 0.05
BLOCK_S: Final = 0.5  # longest wait inside Redis: how soon a lost connection or a re-created stream is seen
KEY, PAYLOAD = b"k", b"p"

# How many entries follow an id, in pages, so that a long tail does not hold the server.
_COUNT_PAGE = """
local page = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
if #page == 0 then return {0, ''} end
return {#page, page[#page][1]}
"""
COUNT_PAGE_ENTRIES: Final = 2000


def offset_of(redis_id: bytes) -> int:
    """``b"1700000000000-3"`` as one growing 64-bit number."""
    ms, sequence = redis_id.split(b"-")
    if int(sequence) >> SEQUENCE_BITS:
        raise OverflowError(f"stream id {redis_id!r}: over {1 << SEQUENCE_BITS} entries in one millisecond")
    return int(ms) << SEQUENCE_BITS | int(sequence)


def redis_id_of(offset: int) -> str:
    """The inverse of ``offset_of``."""
    return f"{offset >> SEQUENCE_BITS}-{offset & ((1 << SEQUENCE_BITS) - 1)}"


def stream_fields(key: str, payload: bytes) -> dict[Any, Any]:
    """An entry as the stream holds it."""
    return {KEY: key.encode(), PAYLOAD: payload}


class RedisLog:
    """``EventLog`` on Redis Streams. Connects on first use; a lost connection is made again by itself."""

    def __init__(self, connect: Connect, append_timeout_s: float = 1.0) -> None:
        self._connect = connect
        self._append_timeout_s = append_timeout_s
        self._queue = AppendQueue(self._write, append_timeout_s, "redis-log-writer")

    def append(self, topic: str, key: str, payload: bytes) -> Future[Position]:
        return self._queue.put(topic, key, payload)

    def append_all(self, entries: Iterable[tuple[str, str, bytes]]) -> list[Future[Position]]:
        return self._queue.put_all(entries)

    def reader(self, topics: Sequence[str], start: Offsets) -> RedisReader:
        return RedisReader(self._connect(self._append_timeout_s + BLOCK_S), topics, start)

    def close(self) -> None:
        self._queue.close()

    def _write(self) -> None:
        client = self._connect(self._append_timeout_s)
        _warn_unless_durable(client)
        is_last = False
        while not is_last:
            group, is_last = self._queue.get_group(MAX_GROUP)
            group = [item for item in group if not item.future.done()]  # failed with one before them
            while group:
                group = self._send(client, group)
                if group:
                    time.sleep(RECONNECT_S)
        client.close()

    def _send(self, client: redis.Redis, group: list[Append]) -> list[Append]:
        """Send the group and resolve its futures; what is left for another try keeps its order.

        A connection that breaks leaves open what was written: the next try may write an entry twice. Consumers
        deduplicate by event_id.
        """
        pipeline = client.pipeline(transaction=False)
        for item in group:
            pipeline.xadd(item.topic, stream_fields(item.key, item.payload))
        try:
            results = pipeline.execute(raise_on_error=False)
        except (redis.RedisError, OSError) as error:
            results = [error] * len(group)
        if all(isinstance(result, Exception) for result in results):
            return self._while_there_is_time(group, results[0])
        for item, result in zip(group, results, strict=True):
            if isinstance(result, Exception):
                item.future.set_exception(_unavailable(result))
            else:
                item.future.set_result(Position(item.topic, 0, offset_of(result)))
        return []

    def _while_there_is_time(self, group: list[Append], error: Exception) -> list[Append]:
        """The group, for another try; nothing of it once its first entry has waited too long."""
        if group[0].deadline > time.monotonic():
            return group
        self._queue.fail(group[0].future, _unavailable(error))
        return []


def _unavailable(error: Exception) -> LogUnavailable:
    return LogUnavailable(f"Redis did not take the entry: {error}; is the server up, and has its disk space?")


def _warn_unless_durable(client: redis.Redis) -> None:
    try:
        found: Any = client.config_get("append*")
    except (redis.RedisError, OSError):  # away, or a service that does not tell
        return
    if (found.get("appendonly"), found.get("appendfsync")) != ("yes", "always"):
        log.warning(
            "Redis may lose acknowledged events when it dies: set appendonly yes and appendfsync always",
            extra={"action": "log_not_durable"},
        )


class RedisReader:
    """``Reader`` over streams; after LogUnavailable the next poll tries again from the same place."""

    def __init__(self, client: redis.Redis, topics: Sequence[str], start: Offsets) -> None:
        self._client = client
        self._next = {topic: start.get(topic, {}).get(0, 0) for topic in topics}
        self._fetched: deque[Entry] = deque()
        self._seen: dict[str, int] = {}  # topic → entries before what poll will return next

    def poll(self, *, max_entries: int, timeout_s: float) -> list[Entry]:
        deadline = time.monotonic() + timeout_s
        try:
            while not self._fetched:
                self._fetch(max_entries)
                left_s = deadline - time.monotonic()
                if self._fetched or left_s <= 0:
                    break
                self._wait(min(left_s, BLOCK_S))
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            raise LogUnavailable(f"Redis cannot be read: {error}") from error
        entries = [self._fetched.popleft() for _ in range(min(max_entries, len(self._fetched)))]
        for entry in entries:
            if entry.position.topic in self._seen:
                self._seen[entry.position.topic] += 1
        return entries

    def _fetch(self, max_entries: int) -> None:
        """Read what is there, and in the same transaction the entry before each position."""
        started = [topic for topic, offset in self._next.items() if offset > 0]
        transaction = self._client.pipeline(transaction=True)
        for topic in started:
            before = redis_id_of(self._next[topic] - 1)
            transaction.xrange(topic, before, before, count=1)
        transaction.xread(self._after(), count=max_entries)
        *befores, streams = transaction.execute()
        for topic, before in zip(started, befores, strict=True):
            if not before:
                raise PositionLost(
                    f"{topic}: the entry before {redis_id_of(self._next[topic])} is gone, so the stream was trimmed "
                    "or made anew; restore it, or remove the reader's state to read from the beginning"
                )
        for name, rows in _pairs(streams):
            topic = name.decode()
            for redis_id, fields in rows:
                offset = offset_of(redis_id)
                position = Position(topic, 0, offset)
                self._fetched.append(Entry(position, fields[KEY].decode(), fields[PAYLOAD]))
                self._next[topic] = offset + 1

    def _after(self) -> Any:
        return {topic: redis_id_of(max(0, offset - 1)) for topic, offset in self._next.items()}

    def _wait(self, timeout_s: float) -> None:
        """Sleep inside Redis until an entry comes; it is read by ``_fetch``, with its check."""
        self._client.xread(self._after(), count=1, block=max(1, int(timeout_s * 1000)))

    def lag(self) -> int:
        waiting = {topic: 0 for topic in self._next}
        for entry in self._fetched:
            waiting[entry.position.topic] += 1
        try:
            lengths = {topic: int(self._client.xlen(topic)) for topic in self._next}
            for topic in self._next.keys() - self._seen.keys():
                self._seen[topic] = lengths[topic] - self._count_after(topic) - waiting[topic]
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            raise LogUnavailable(f"Redis cannot be read: {error}") from error
        return sum(max(0, lengths[topic] - self._seen[topic]) for topic in self._next)

    def _count_after(self, topic: str) -> int:
        total, cursor = 0, redis_id_of(max(0, self._next[topic] - 1))
        while True:
            count, last = self._client.eval(_COUNT_PAGE, 1, topic, cursor, str(COUNT_PAGE_ENTRIES))
            total += int(count)
            if int(count) < COUNT_PAGE_ENTRIES:
                return total
            cursor = last.decode()

    def close(self) -> None:
        self._client.close()


def _pairs(streams: Any) -> list[tuple[bytes, Any]]:
    """XREAD's answer in both protocol versions: a list of (name, rows), or a map from name to lists of rows."""
    if not streams:
        return []
    if isinstance(streams, dict):
        return [(name, [row for rows in lists for row in rows]) for name, lists in streams.items()]
    return [(name, rows) for name, rows in streams]
