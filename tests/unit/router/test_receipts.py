"""A verdict's mark follows its acknowledgement: who reads waits for it, and its loss is no error."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from redis.exceptions import ConnectionError as RedisAway

from router import claims as claiming
from router.admission import OPEN_CALLER
from router.claims import MARK, Claims
from router.errors import NotFound, Unavailable
from router.gathered import Gathered
from router.ledger import Ledger
from router.receipts import ReceiptBook
from telemetry.events import Completion, PreferenceRecorded, utc_now
from telemetry.receipts import receipt_key
from tests.router_stack import PLAIN


class Redis:
    """Hashes that are read at once, and marks that wait for ``let_go`` and then are written, or fail."""

    def __init__(self, *, fails: bool = False) -> None:
        self.hashes: dict[str, dict[bytes, bytes]] = {}
        self.let_go = asyncio.Event()
        self.fails = fails
        self.scripts = 0  # asked for

    def pipeline(self, *, transaction: bool) -> Commands:
        return Commands(self)

    async def hgetall(self, key: str) -> dict[bytes, bytes]:
        return self.hashes.get(key, {})

    async def hget(self, key: str, field: str) -> bytes | None:
        return self.hashes.get(key, {}).get(field.encode())

    async def command(self, name: str, *words: Any) -> Any:
        if name == "HGET":
            return self.hashes.get(words[0], {}).get(words[1].encode())
        assert (name, words[0]) == ("EVALSHA", MARK.digest)
        self.scripts += 1
        await self.let_go.wait()
        if self.fails:
            raise RedisAway("away")
        keys, lines = words[2 : 2 + words[1]], words[2 + words[1] :]
        each = len(lines) * 3 // len(keys)
        for n, (verdict, receipt) in enumerate(zip(keys[::3], keys[2::3], strict=True)):
            own = lines[n * each : (n + 1) * each]
            self.hashes[verdict] = {b"durable": own[-1].encode()}
            self.hashes[receipt] = {
                key.encode(): value.encode() for key, value in zip(own[::2], own[1::2], strict=True)
            }
        return None


class Commands:
    """Those that gathered."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._asked: list[tuple[Any, ...]] = []

    def execute_command(self, *words: Any) -> None:
        self._asked.append(words)

    async def execute(self, *, raise_on_error: bool) -> list[Any]:
        return [await self._redis.command(*words) for words in self._asked]


def book_on(redis: Any) -> tuple[ReceiptBook, Claims]:
    ledger = Ledger(None, redis, Gathered(redis), None, PLAIN, completion_ttl_s=1)  # type: ignore[arg-type]
    claims = Claims(redis, ledger, ttl_s=1, lease_s=1, embedded_log=False)
    return ReceiptBook(redis, ledger, claims), claims


def verdict(pair_id: str = "p") -> PreferenceRecorded:
    side = Completion("c", "text", "main", "v", "stable", "stop", 1, 1, 0.1, 0.1, 1.0, 1.0)
    return PreferenceRecorded(
        pair_id=pair_id, policy="chat", user="u", prompt=(), chosen=side, rejected=side, outcome="skip",
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


async def test_marks_of_the_same_moment_are_one_step_and_never_a_long_one() -> None:
    redis = Redis()
    book, claims = book_on(redis)
    redis.let_go.set()
    events = [verdict(f"p{n}") for n in range(claiming.MOST_MARKS + 1)]
    for event in events:
        claims.mark(event, "outbox" if event is events[-1] else "log")
    assert [(await book.read(event.event_id, OPEN_CALLER)).stages[0].durable for event in events] == [
        *["log"] * claiming.MOST_MARKS, "outbox",
    ]  # fmt: skip
    assert redis.scripts == 2
    late = verdict("late")
    redis.let_go.clear()
    claims.mark(verdict("early"), "log")
    while redis.scripts == 2:
        await asyncio.sleep(0.001)
    claims.mark(late, "log")  # the step before it is under way
    redis.let_go.set()
    assert (await book.read(late.event_id, OPEN_CALLER)).pair_id == "late"
    assert redis.scripts == 4


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
    assert "verdicts not marked, 1: away" in caplog.text
    redis.fails = False
    assert (await book.read(event.event_id, OPEN_CALLER)).status == "accepted"


async def test_a_claim_whose_router_died_before_its_mark_is_being_written_and_not_unknown() -> None:
    redis, event = Redis(), verdict()
    book, _ = book_on(redis)
    claim = msgspec.json.encode(claiming.Claim("a", OPEN_CALLER.name, event))
    redis.hashes[receipt_key(event.event_id)] = {b"pair_id": event.pair_id.encode()}
    redis.hashes[claiming.VERDICT_KEY + event.pair_id] = {b"claim": claim}
    with pytest.raises(Unavailable, match="being written"):
        await book.read(event.event_id, OPEN_CALLER)
    del redis.hashes[claiming.VERDICT_KEY + event.pair_id]
    with pytest.raises(NotFound):
        await book.read(event.event_id, OPEN_CALLER)


async def test_a_mark_that_is_never_written_is_the_recorders_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "MARK_AGAIN_S", 0.0)
    redis = Redis(fails=True)
    (book, claims), event = book_on(redis), verdict()
    redis.let_go.set()
    claims.mark(event, "log")
    with pytest.raises(NotFound):
        await book.read(event.event_id, OPEN_CALLER)
