"""A verdict's mark follows its acknowledgement: who reads waits for it, and its loss is no error."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisAway

from router import claims as claiming
from router.admission import OPEN_CALLER
from router.claims import Claims
from router.errors import NotFound, Unavailable
from router.gathered import Gathered
from router.ledger import Ledger
from router.receipts import ReceiptBook
from telemetry.events import Completion, PreferenceRecorded, utc_now
from tests.router_stack import PLAIN


class Redis:
    """Hashes, and a pipeline that waits for ``let_go`` and then writes them, or fails."""

    def __init__(self, *, fails: bool = False) -> None:
        self.hashes: dict[str, dict[bytes, bytes]] = {}
        self.let_go = asyncio.Event()
        self.fails = fails
        self._queued: list[tuple[str, str, str]] = []

    def pipeline(self, *, transaction: bool) -> Any:
        return self if transaction else Reads(self)

    async def __aenter__(self) -> Redis:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to close."""

    def hsetnx(self, key: str, field: str, value: str) -> None:
        self._queued.append((key, field, value))

    hset = hsetnx

    def delete(self, _: str) -> None:
        """The lock is no hash."""

    async def execute(self) -> None:
        await self.let_go.wait()
        if self.fails:
            raise RedisAway("away")
        for key, field, value in self._queued:
            self.hashes.setdefault(key, {})[field.encode()] = value.encode()

    async def hgetall(self, key: str) -> dict[bytes, bytes]:
        return self.hashes.get(key, {})

    async def hmget(self, key: str, fields: list[str]) -> list[bytes | None]:
        return [self.hashes.get(key, {}).get(field.encode()) for field in fields]


class Reads:
    """HMGETs that gathered."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._asked: list[tuple[str, ...]] = []

    def execute_command(self, _: str, *words: str) -> None:
        self._asked.append(words)

    async def execute(self, *, raise_on_error: bool) -> list[list[bytes | None]]:
        return [await self._redis.hmget(key, list(fields)) for key, *fields in self._asked]


def book_on(redis: Any) -> tuple[ReceiptBook, Claims]:
    ledger = Ledger(None, redis, Gathered(redis), None, PLAIN, completion_ttl_s=1)  # type: ignore[arg-type]
    claims = Claims(redis, ledger, ttl_s=1, lease_s=1, embedded_log=False)
    return ReceiptBook(redis, ledger, claims), claims


def verdict() -> PreferenceRecorded:
    side = Completion("c", "text", "main", "v", "stable", "stop", 1, 1, 0.1, 0.1, 1.0, 1.0)
    return PreferenceRecorded(
        pair_id="p", policy="chat", user="u", prompt=(), chosen=side, rejected=side, outcome="skip",
        chosen_position="", propensity=1.0, shown_at=utc_now(), decided_s=1.0,
    )  # fmt: skip


async def test_a_receipt_that_is_read_at_once_waits_for_its_mark() -> None:
    redis = Redis()
    (book, claims), event = book_on(redis), verdict()
    claims.mark(event, "log")
    reading = asyncio.create_task(book.read(event.event_id, OPEN_CALLER))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not reading.done()
    redis.let_go.set()
    assert (await reading).status == "accepted"


async def test_a_mark_is_written_again_until_redis_takes_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claiming, "MARK_TRIES", 1000)
    monkeypatch.setattr(claiming, "MARK_AGAIN_S", 0.01)
    monkeypatch.setattr(claiming, "MARK_WAIT_S", 0.02)
    redis = Redis(fails=True)
    (book, claims), event = book_on(redis), verdict()
    redis.let_go.set()
    claims.mark(event, "log")
    with pytest.raises(Unavailable, match="being written"):
        await book.read(event.event_id, OPEN_CALLER)
    assert "verdict not marked" in caplog.text
    redis.fails = False
    assert (await book.read(event.event_id, OPEN_CALLER)).status == "accepted"


async def test_a_mark_that_is_never_written_is_the_recorders_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "MARK_AGAIN_S", 0.0)
    redis = Redis(fails=True)
    (book, claims), event = book_on(redis), verdict()
    redis.let_go.set()
    claims.mark(event, "log")
    with pytest.raises(NotFound):
        await book.read(event.event_id, OPEN_CALLER)
