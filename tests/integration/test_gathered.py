"""Redis commands of many requests in one pipeline, on a real Redis."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress

import pytest
import uvloop
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from router.gathered import MOST, Gathered, Script
from telemetry.config import TelemetryConfig, redis_client_async
from tests.servers import RedisServer


async def test_each_command_has_its_own_answer_in_the_order_of_asking(telemetry_config: TelemetryConfig) -> None:
    async with redis_client_async(telemetry_config) as redis:
        gathered = Gathered(redis)
        counted = [gathered.ask("INCR", "n") for _ in range(3 * MOST)]
        assert await asyncio.gather(*counted) == list(range(1, 3 * MOST + 1))
        assert await gathered.ask("SET", "k", b"\x00value", "EX", 60) and await gathered.ask("GET", "k") == b"\x00value"
        assert 0 < await gathered.ask("TTL", "k") <= 60


async def test_a_script_is_sent_whole_where_redis_does_not_know_it_any_more(telemetry_config: TelemetryConfig) -> None:
    script = Script("redis.call('INCRBY', KEYS[1], ARGV[1]); return {KEYS[1], redis.call('GET', KEYS[1])}")
    async with redis_client_async(telemetry_config) as redis:
        gathered = Gathered(redis)
        for expected in (b"2", b"4"):
            await redis.script_flush()
            assert await gathered.run(script, ["n"], [2]) == [b"n", expected]
        both = await asyncio.gather(gathered.run(script, ["n"], [1]), gathered.run(script, ["n"], [1]))
        assert both == [[b"n", b"5"], [b"n", b"6"]]


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


class Proxy:
    """TCP before a Redis on a Unix socket; ``reset`` ends every connection as a load balancer does that forgot it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._clients: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.append(writer)
        back_reader, back_writer = await asyncio.open_unix_connection(self._path)
        with suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.gather(self._pump(reader, back_writer), self._pump(back_reader, writer))
        back_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    def reset(self) -> None:
        for writer in self._clients:
            connected: socket.socket = writer.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        self._clients.clear()


def test_a_connection_reset_while_it_idles_is_an_error_and_not_the_end(redis_server: RedisServer) -> None:
    """On the router's own event loop, where such a connection says RuntimeError."""

    async def story() -> None:
        proxy = Proxy(str(redis_server.socket))
        listening = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        async with Redis(host="127.0.0.1", port=port, db=13, retry=Retry(NoBackoff(), 0)) as redis:
            gathered = Gathered(redis)
            assert await gathered.ask("INCR", "n") == 1
            for _ in range(3):
                proxy.reset()
                await asyncio.sleep(0.05)
                with suppress(RedisError, OSError):
                    await asyncio.wait_for(gathered.ask("GET", "n"), 5)
                assert int(await asyncio.wait_for(gathered.ask("GET", "n"), 5)) == 1
            await gathered.ask("DEL", "n")
        listening.close()

    uvloop.run(story())
