"""When the pool refuses before any work is done. Pure but for its connector."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from router.backends import ReplicaPool
from router.errors import Unavailable
from router.tables import Tables


@pytest.fixture
async def pool() -> AsyncIterator[ReplicaPool]:
    made = ReplicaPool(Tables(Redis()), ready_wait_s=1.0, min_in_flight=1, max_in_flight=1, patience_s=0.5)
    yield made
    await made.close()


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
