"""Redis commands of many requests in one pipeline, on a real Redis."""

from __future__ import annotations

import asyncio

import pytest
from redis.exceptions import RedisError, ResponseError

from router.gathered import MOST, Gathered
from telemetry.config import TelemetryConfig, redis_client_async
from tests.servers import RedisServer


async def test_each_command_has_its_own_answer_in_the_order_of_asking(telemetry_config: TelemetryConfig) -> None:
    async with redis_client_async(telemetry_config) as redis:
        gathered = Gathered(redis)
        counted = [gathered.ask("INCR", "n") for _ in range(3 * MOST)]
        assert await asyncio.gather(*counted) == list(range(1, 3 * MOST + 1))
        assert await gathered.ask("SET", "k", b"\x00value", "EX", 60) and await gathered.ask("GET", "k") == b"\x00value"
        assert 0 < await gathered.ask("TTL", "k") <= 60


async def test_a_command_that_fails_fails_alone(telemetry_config: TelemetryConfig) -> None:
    async with redis_client_async(telemetry_config) as redis:
        gathered = Gathered(redis)
        await gathered.ask("SET", "text", "no number")
        good, bad, after = gathered.ask("GET", "text"), gathered.ask("INCR", "text"), gathered.ask("GET", "text")
        assert await good == await after == b"no number"
        with pytest.raises(ResponseError, match="integer"):
            await bad


async def test_whoever_leaves_takes_nobody_along(telemetry_config: TelemetryConfig) -> None:
    async with redis_client_async(telemetry_config) as redis:
        gathered = Gathered(redis)
        leaving, staying = gathered.ask("GET", "a"), gathered.ask("INCR", "b")
        leaving.cancel()
        assert await staying == 1


async def test_a_redis_that_is_away_fails_all_and_is_asked_again(redis_server: RedisServer) -> None:
    config = TelemetryConfig(redis_url=redis_server.database(14))
    async with redis_client_async(config) as redis:
        gathered = Gathered(redis)
        assert await gathered.ask("INCR", "n") == 1
        redis_server.kill()
        results = await asyncio.gather(gathered.ask("GET", "n"), gathered.ask("GET", "n"), return_exceptions=True)
        assert [isinstance(result, RedisError | OSError) for result in results] == [True, True]
        redis_server.restart()
        assert int(await gathered.ask("GET", "n")) == 1
        await gathered.ask("DEL", "n")
