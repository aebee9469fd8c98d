"""Who has read a conversation's beginning, and when that decides. Pure but for the pool's connector."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from router.affinity import PrefixMemory, prefix_keys
from router.backends import IMBALANCE, ReplicaPool
from router.tables import Tables
from serving.wire import GenerateRequest, Sampling
from telemetry.events import Message
from telemetry.routing import Replica

FIRST, OTHER = "v000001-aaaaaaaa", "v000002-bbbbbbbb"
TURN = (Message("user", "What is tea?"),)
NEXT_TURN = (*TURN, Message("assistant", "A drink."), Message("user", "And coffee?"))
REPLICAS = [Replica(f"r{i}", "small", f"http://r{i}", True, (FIRST, OTHER), 0, 4) for i in range(4)]


def request(messages: tuple[Message, ...], version: str = FIRST) -> GenerateRequest:
    return GenerateRequest("id", version, messages, Sampling(8))


@pytest.fixture
async def pool() -> AsyncIterator[ReplicaPool]:
    made = ReplicaPool(Tables(Redis()), ready_wait_s=1.0, min_in_flight=8, max_in_flight=8, patience_s=0.5)
    yield made
    made.close()


def test_the_reader_of_the_longest_prefix_comes_first() -> None:
    memory = PrefixMemory()
    memory.note(prefix_keys(FIRST, TURN), "short")
    memory.note(prefix_keys(FIRST, NEXT_TURN)[:1], "long")
    assert memory.readers(prefix_keys(FIRST, NEXT_TURN)) == ["long", "short"]


def test_the_least_recently_used_prefix_is_forgotten() -> None:
    memory = PrefixMemory(capacity=2)
    keys = [prefix_keys(FIRST, (Message("user", text),)) for text in "abc"]
    memory.note(keys[0], "r0")
    memory.note(keys[1], "r1")
    memory.note(keys[0], "r0")
    memory.note(keys[2], "r2")
    assert [memory.readers(key) for key in keys] == [["r0"], [], ["r2"]]


async def test_a_conversation_stays_where_it_began(pool: ReplicaPool) -> None:
    for _ in range(20):
        first = pool._best(REPLICAS, request(TURN))
        assert pool._best(REPLICAS, request(NEXT_TURN)) == first


def test_another_version_has_its_own_prefixes() -> None:
    memory = PrefixMemory()
    memory.note(prefix_keys(FIRST, TURN), "r0")
    assert memory.readers(prefix_keys(OTHER, TURN)) == []


async def test_a_reader_that_is_much_busier_is_passed_over(pool: ReplicaPool) -> None:
    home = pool._best(REPLICAS, request(TURN))
    pool._in_flight[home.replica_id] = IMBALANCE
    assert pool._best(REPLICAS, request(TURN)) == home
    pool._in_flight[home.replica_id] = IMBALANCE + 1
    assert pool._best(REPLICAS, request(NEXT_TURN)) != home
