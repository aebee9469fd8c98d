"""Which failures are asked again, and when the pool refuses before any work is done. Pure but for its connector."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from router.backends import ReplicaPool, RetryBudget
from router.errors import Unavailable
from router.tables import Tables


@pytest.fixture
async def pool() -> AsyncIterator[ReplicaPool]:
    made = ReplicaPool(Tables(Redis()), ready_wait_s=1.0, min_in_flight=1, max_in_flight=1, patience_s=0.5)
    yield made
    made.close()


def test_a_tenth_of_the_requests_may_be_asked_again_beyond_the_reserve() -> None:
    budget = RetryBudget(ratio=0.125, reserve=4.0)
    retries = 0
    for _ in range(800):
        budget.earn()
        retries += budget.spend()
    assert retries == 4 + 99, "the first request found the reserve full"


def test_quiet_times_save_up_no_more_than_the_reserve() -> None:
    budget = RetryBudget(ratio=0.5, reserve=3.0)
    for _ in range(100):
        budget.earn()
    assert [budget.spend() for _ in range(5)] == [True, True, True, False, False]


async def test_only_when_every_base_is_full_nobody_is_let_in(pool: ReplicaPool) -> None:
    pool._limit("small").enter()
    pool.refuse_if_full(["small", "large"])
    pool.refuse_if_full(["large"])
    pool.refuse_if_full([])
    with pytest.raises(Unavailable) as refused:
        pool.refuse_if_full(["small"])
    assert (refused.value.code, refused.value.retry_after_s) == ("overloaded", 1.0)
    pool._limit("large").enter()
    with pytest.raises(Unavailable):
        pool.refuse_if_full(["small", "large"])
    pool._limit("small").leave()
    pool.refuse_if_full(["small", "large"])
