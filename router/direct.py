"""HTTP/1.1 straight to a replica: kept-alive connections, one POST at a time on each, the answer's body as it arrives.

Parsed by httptools, the C parser beneath uvicorn. What a general client does besides (redirects, cookies, proxies,
compression, TLS) is not needed between a router and its replicas, and took a fifth of the router's time for a request
(DECISIONS.md). A body must have a length or come in chunks; one that only ends with its connection counts as broken.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import httptools

MOST_BUFFERED_BYTES: Final = 1 << 20
TRUSTED_IDLE_S: Final = 30.0  # one that idled longer is closed: the replica may be about to


class Unreachable(Exception):
    """Nobody takes the connection."""


class ConnectionBroken(Exception):
    """The connection ended, or said what is no HTTP, before the answer was whole."""


class Target(NamedTuple):
    """Where a URL's requests go, and how their heads begin (whole lines)."""

    host: str
    port: int
    head: bytes


class Connection(asyncio.Protocol):
    """One connection to a replica; between ``ask`` and ``let_go`` it belongs to one request."""

    def __init__(self, client: DirectClient, url: str, target: Target) -> None:
        self.idle_since_s = 0.0
        self._client, self._url, self._target = client, url, target
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._is_lost = False
        self._begin()

    def _begin(self) -> None:
        self._status = 0
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._is_paused = self._is_whole = self._may_stay = self._is_late = False
        self._news: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def is_free(self) -> bool:
        """Whether it can take a request."""
        return not self._is_lost and self._parser is None

    def ask(self, headers: bytes, body: bytes, deadline_s: float) -> None:
        """Send a POST; its answer must be whole within ``deadline_s``. ``headers`` are whole lines."""
        assert self._transport is not None
        self._begin()
        self._parser = httptools.HttpResponseParser(self)
        self._deadline = self._loop.call_later(deadline_s, self._pass_deadline)
        self._transport.write(b"%b%bContent-Length: %d\r\n\r\n%b" % (self._target.head, headers, len(body), body))

    async def status(self) -> int:
        """The answer's status code. Raises ConnectionBroken, or TimeoutError at the deadline."""
        while not self._status:
            await self._wait()
        return self._status

    async def read(self) -> bytes:
        """What has come of the body since; empty at its end. Raises as ``status``."""
        while not self._pieces:
            if self._is_whole:
                return b""
            await self._wait()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._buffered = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    def let_go(self) -> None:
        """The request is over, however it went: keep the connection for another if it can be kept."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._parser = None
        if self._may_stay and not self._is_lost and not self._is_paused:
            self._client.keep(self._url, self)
        else:
            self.close()

    def close(self) -> None:
        """Cut it; a replica takes that for the client's leaving."""
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        if self._is_late:
            raise TimeoutError
        if self._is_lost:
            raise ConnectionBroken
        self._news = self._loop.create_future()
        try:
            await self._news
        finally:
            self._news = None

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _pass_deadline(self) -> None:
        self._is_late = True
        self._tell()

    # ---- what the event loop and the parser call ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._is_whole:  # nobody asked for it
            self._spoil()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._spoil()
        if self._buffered > MOST_BUFFERED_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._client.forget(self._url, self)
        self._tell()

    def _spoil(self) -> None:
        """What comes next cannot be told from what came before: nobody is answered from this connection again."""
        self._is_lost = True
        self.close()

    def on_message_begin(self) -> None:
        if self._is_whole:  # a second answer to one question, in the same piece
            self._spoil()

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        if not self._is_whole and (status := self._parser.get_status_code()) >= 200:  # below: the answer is to come
            self._status = status

    def on_body(self, data: bytes) -> None:
        if not self._is_whole:
            self._pieces.append(data)
            self._buffered += len(data)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._status:
            self._is_whole, self._may_stay = True, self._parser.should_keep_alive()


class DirectClient:
    """Connections for POSTs to ``path`` below any URL; any number at once, idle ones used again, the last one first."""

    def __init__(self, path: str, *, connect_s: float) -> None:
        self._path, self._connect_s = path, connect_s
        self._idle: dict[str, list[Connection]] = {}  # by URL, longest idle first
        self._is_closed = False

    async def connect(self, url: str) -> Connection:
        """A connection to the server of ``url``, to be let go. Raises Unreachable."""
        self._close_old(url)
        while idle := self._idle.get(url):
            connection = idle.pop()
            if connection.is_free:
                return connection
        target = self._target(url)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, made = await loop.create_connection(lambda: Connection(self, url, target), target.host, target.port)
        except (OSError, TimeoutError) as error:
            raise Unreachable(url) from error
        return made

    def keep(self, url: str, connection: Connection) -> None:
        """A connection is free again."""
        if self._is_closed:
            connection.close()
            return
        connection.idle_since_s = time.monotonic()
        self._idle.setdefault(url, []).append(connection)
        self._close_old(url)

    def forget(self, url: str, connection: Connection) -> None:
        """A connection is lost."""
        idle = self._idle.get(url, [])
        if connection in idle:
            idle.remove(connection)
        if not idle:
            self._idle.pop(url, None)

    def _close_old(self, url: str) -> None:
        idle, now_s = self._idle.get(url, []), time.monotonic()
        while idle and now_s - idle[0].idle_since_s > TRUSTED_IDLE_S:
            idle.pop(0).close()

    def _target(self, url: str) -> Target:
        parts = urlsplit(url)
        lines = (
            f"POST {parts.path}{self._path} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            "",
        )
        return Target(parts.hostname or "", parts.port or 80, "\r\n".join(lines).encode())

    def close(self) -> None:
        """Cut the idle connections; the others are cut when their requests end."""
        self._is_closed = True
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
