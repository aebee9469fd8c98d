"""Answers kept for a thumb: found before they are written, written together, let go when Redis is away."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.exceptions import ConnectionError as RedisAway

from router.arms import Arm
from router.exchange import Answer, Exchange
from router.gathered import Gathered
from router.ledger import Ledger, found_soon
from router.schema import ChatRequest
from serving.wire import Chunk, Sampling, TokenLogprob
from telemetry.events import COMPLETIONS
from tests.router_stack import PLAIN

ARM = Arm("main", "tiny", "v", "stable", 1.0, 1.0)


class Redis:
    """Takes pipelines of SET, each when ``let_go`` is set."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.let_go = asyncio.Event()
        self.is_away = False

    def pipeline(self, **_: Any) -> Pipeline:
        return Pipeline(self)

    async def get(self, _: str) -> None:
        return None


class Pipeline:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._keys: list[str] = []

    def execute_command(self, _: str, key: str, *value: Any) -> None:
        self._keys.append(key)

    async def execute(self, *, raise_on_error: bool) -> list[bytes]:
        await self._redis.let_go.wait()
        if self._redis.is_away:
            raise RedisAway("away")
        self._redis.batches.append(self._keys)
        return [b"OK"] * len(self._keys)


class Log:
    """An event log that counts."""

    def __init__(self) -> None:
        self.appended = 0
        self.is_closed = False

    def append(self, *_: object) -> Any:
        if self.is_closed:
            raise RuntimeError("the event log was closed; open another")
        self.appended += 1
        return Future()


def answered(ledger: Ledger, name: str, *others: Answer) -> None:
    answer = Answer(name, ARM, Sampling(max_tokens=1), 0.0)
    answer.take(Chunk(0, "v", finish_reason="stop"), 1.0)
    exchange = Exchange(
        request=ChatRequest(model="chat", messages=()),
        request_id="r",
        id=name,
        created=0,
        policy="chat",
        user="",
        caller="",
        prompt=(),
        propensity=1.0,
    )
    exchange.answers = exchange.shown = list(others) or [answer]
    ledger.close_exchange(exchange)


async def test_an_answer_can_be_rated_before_it_is_written_and_those_that_gather_go_together() -> None:
    redis, log = Redis(), Log()
    redis.let_go.set()
    ledger = Ledger(log, redis, Gathered(redis), None, PLAIN, completion_ttl_s=60)  # type: ignore[arg-type]
    answered(ledger, "one")
    answered(ledger, "two")
    for _ in range(10):
        await asyncio.sleep(0)
    assert (log.appended, redis.batches) == (0, []), "they gather"
    found = await ledger.recall_completion("two")
    assert found is not None and found.completion.completion_id == "two"
    await ledger.settled()
    assert [[key.rpartition(":")[2] for key in batch] for batch in redis.batches] == [["one", "two"]]
    assert log.appended == 2
    assert await ledger.recall_completion("two") is None, "from now on Redis knows it"


async def test_what_ends_after_the_end_leaves_at_once_and_a_closed_log_loses_it_with_a_count() -> None:
    redis, log = Redis(), Log()
    redis.let_go.set()
    ledger = Ledger(log, redis, Gathered(redis), None, PLAIN, completion_ttl_s=60)  # type: ignore[arg-type]
    await ledger.settled()
    answered(ledger, "late")
    assert log.appended == 1
    log.is_closed, lost = True, _lost()
    answered(ledger, "too late")
    assert _lost() == lost + 1
    await ledger.settled()
    assert sum(map(len, redis.batches)) == 2, "Redis takes them as ever"


def _lost() -> float:
    return REGISTRY.get_sample_value("tiebreak_events_lost_total", {"topic": COMPLETIONS}) or 0.0


async def test_what_cannot_be_written_is_let_go_and_the_next_answer_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    redis = Redis()
    redis.is_away = True
    redis.let_go.set()
    ledger = Ledger(Log(), redis, Gathered(redis), None, PLAIN, completion_ttl_s=60)  # type: ignore[arg-type]
    answered(ledger, "one")
    await ledger.settled()
    assert "no thumb for 1 answers" in caplog.text
    assert await ledger.recall_completion("one") is None
    redis.is_away = False
    answered(ledger, "two")
    await ledger.settled()
    assert len(redis.batches) == 1


async def test_tokens_cost_what_their_variant_says_and_a_prompt_read_once_counts_once() -> None:
    cheap, dear = (
        Arm("cheap", "tiny", "v1", "stable", 1.0, 1.0, 2.0, 8.0),
        Arm("dear", "big", "v2", "stable", 1.0, 1.0, 20.0, 80.0),
    )
    token = TokenLogprob(" word", 7, -0.5)
    answers = []
    for arm in (cheap, cheap, dear, ARM):
        answer = Answer("x", arm, Sampling(max_tokens=3), 0.0)
        answer.take(Chunk(0, arm.version, tokens=(token,) * 3, finish_reason="stop", prompt_tokens=100), 1.0)
        answers.append(answer)
    redis = Redis()
    redis.let_go.set()
    ledger = Ledger(Log(), redis, Gathered(redis), None, PLAIN, completion_ttl_s=60)  # type: ignore[arg-type]
    answered(ledger, "one", *answers)
    await ledger.settled()
    spent = {name: REGISTRY.get_sample_value("tiebreak_cost_total", {"variant": name, "version": version})
             for name, version in (("cheap", "v1"), ("dear", "v2"), ("main", "v"))}  # fmt: skip
    assert spent == {"cheap": pytest.approx(248e-6), "dear": pytest.approx(2240e-6), "main": None}


async def test_what_another_worker_writes_behind_its_answer_is_found_a_moment_later() -> None:
    tries: list[bytes | None] = [None, b"written meanwhile", b"not asked for"]

    async def find() -> bytes | None:
        return tries.pop(0)

    assert await found_soon(find) == b"written meanwhile"
    assert tries == [b"not asked for"]


async def test_what_nobody_wrote_is_looked_for_twice_and_no_more() -> None:
    tries: list[bytes | None] = [None, None, b"too late"]

    async def find() -> bytes | None:
        return tries.pop(0)

    assert await found_soon(find) is None
    assert tries == [b"too late"]
