"""The router's own client for replicas, on real connections: kept, cut, broken, late, slowed down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from router.direct import MOST_BUFFERED_BYTES, Connection, ConnectionBroken, DirectClient, Unreachable

Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Server:
    """Answers every request of every connection with ``answer``; what it saw."""

    def __init__(self, answer: Answering) -> None:
        self._answer = answer
        self.connections = 0
        self.requests: list[bytes] = []
        self.gone = asyncio.Event()  # a client cut its connection

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                await self._answer(reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()


@asynccontextmanager
async def serving(answer: Answering) -> AsyncIterator[tuple[Server, DirectClient, str]]:
    server, client = Server(answer), DirectClient("/v1/generate", connect_s=2.0)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield server, client, f"http://127.0.0.1:{port}/base"
    finally:
        client.close()
        listening.close()


async def ask(connection: Connection, deadline_s: float = 5.0) -> bytes:
    """The whole body of one answer; the connection is let go."""
    try:
        connection.ask(b"X-Request-ID: r1\r\n", b'{"n": 1}', deadline_s)
        assert await connection.status() == 200
        body = b""
        while data := await connection.read():
            body += data
        return body
    finally:
        connection.let_go()


async def answer_two_pieces(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED + chunk(b"one\n"))
    await writer.drain()
    writer.write(chunk(b"two\n") + b"0\r\n\r\n")


async def test_requests_one_after_the_other_share_a_connection() -> None:
    async with serving(answer_two_pieces) as (server, client, url):
        for _ in range(3):
            assert await ask(await client.connect(url)) == b"one\ntwo\n"
        assert (server.connections, len(server.requests)) == (1, 3)
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /base/v1/generate HTTP/1.1\r\nHost: 127.0.0.1:")
        assert b"\r\nX-Request-ID: r1\r\n" in head and body == b'{"n": 1}'


async def test_requests_at_once_have_connections_of_their_own() -> None:
    async with serving(answer_two_pieces) as (server, client, url):
        asked = [await client.connect(url) for _ in range(3)]
        assert await asyncio.gather(*(ask(connection) for connection in asked)) == [b"one\ntwo\n"] * 3
        assert server.connections == 3


async def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    async def answer_and_close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")

    async with serving(answer_and_close) as (server, client, url):
        assert [await ask(await client.connect(url)) for _ in range(2)] == [b"ok", b"ok"]
        assert server.connections == 2


async def test_an_idle_connection_that_was_lost_is_not_used_again() -> None:
    async def answer_then_leave(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()  # though it promised to stay

    async with serving(answer_then_leave) as (server, client, url):
        assert await ask(await client.connect(url)) == b"ok"
        await asyncio.sleep(0.05)
        assert await ask(await client.connect(url)) == b"ok"
        assert server.connections == 2


@pytest.mark.parametrize(
    "answer", [CHUNKED + chunk(b"one\n"), b"", b"HTTP/1.1 200 OK\r\n", b"no HTTP at all\r\n\r\n", CHUNKED + b"zz\r\n"]
)
async def test_an_answer_that_ends_too_soon_or_is_none_is_a_broken_connection(answer: bytes) -> None:
    async def break_off(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    async with serving(break_off) as (_, client, url):
        with pytest.raises(ConnectionBroken):
            await ask(await client.connect(url))


async def test_a_late_answer_is_a_timeout_and_the_server_sees_the_connection_cut() -> None:
    async def answer_half(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + chunk(b"one\n"))

    async with serving(answer_half) as (server, client, url):
        with pytest.raises(TimeoutError):
            await ask(await client.connect(url), deadline_s=0.1)
        await asyncio.wait_for(server.gone.wait(), 2)


async def test_leaving_early_cuts_the_connection() -> None:
    async def answer_half(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + chunk(b"one\n"))

    async with serving(answer_half) as (server, client, url):
        connection = await client.connect(url)
        connection.ask(b"", b"{}", 5.0)
        assert (await connection.status(), await connection.read()) == (200, b"one\n")
        connection.let_go()
        await asyncio.wait_for(server.gone.wait(), 2)
        assert (await client.connect(url)) is not connection


async def test_a_server_is_slowed_down_while_nobody_reads() -> None:
    piece, sent = chunk(b"x" * 65536), 0

    async def answer_much(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(CHUNKED)
        for _ in range(1000):
            writer.write(piece)
            await writer.drain()
            sent += 1
        writer.write(b"0\r\n\r\n")

    async with serving(answer_much) as (_, client, url):
        connection = await client.connect(url)
        connection.ask(b"", b"{}", 30.0)
        assert await connection.status() == 200
        await asyncio.sleep(0.5)
        assert sent < 400, "of 65 MB the client took little more than its buffer and the kernel's"
        first = await connection.read()
        assert MOST_BUFFERED_BYTES < len(first) < 4 * MOST_BUFFERED_BYTES
        total = len(first)
        while data := await connection.read():
            total += len(data)
        assert total == 65_536_000
        connection.let_go()


@pytest.mark.parametrize("second", [CHUNKED + chunk(b"stray") + b"0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-", b"noise"])
async def test_what_comes_behind_an_answer_reaches_nobody(second: bytes) -> None:
    """A replica out of step would otherwise give one user what another asked for."""

    async def answer_too_much(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + second)

    async with serving(answer_too_much) as (server, client, url):
        for _ in range(2):
            assert await ask(await client.connect(url)) == b"ok"
        assert server.connections == 2


async def test_an_interim_answer_is_none() -> None:
    async def answer_twice(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + chunk(b"body") + b"0\r\n\r\n")

    async with serving(answer_twice) as (server, client, url):
        assert [await ask(await client.connect(url)) for _ in range(2)] == [b"body", b"body"]
        assert server.connections == 1


async def test_after_the_end_a_connection_is_cut_when_its_request_is_over() -> None:
    async with serving(answer_two_pieces) as (server, client, url):
        connection = await client.connect(url)
        client.close()
        assert await ask(connection) == b"one\ntwo\n"
        await asyncio.wait_for(server.gone.wait(), 2)


async def test_nobody_there_is_unreachable() -> None:
    client = DirectClient("/v1/generate", connect_s=1.0)
    with pytest.raises(Unreachable):
        await client.connect("http://127.0.0.1:1/base")
