"""HTTP/1.1 straight to a replica: kept-alive connections, one POST at a time on each, the answer's body as it arrives.

Parsed by httptools, the C parser beneath uvicorn. What a general client does besides (redirects, cookies, proxies,
compression, TLS) is not needed between a router and its replicas, and took a fifth of the router's time for a request
(DECISIONS.md). A body must have a length or come in chunks; one that only ends with its connection counts as broken.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

import httptools

MOST_BUFFERED_BYTES: Final = 1 << 20
TRUSTED_IDLE_S: Final = 30.0  # a connection that idled longer may be about to be closed by the replica


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
    """One connection to a replica; between ``ask`` and the last of ``read`` it belongs to one request."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: Target, idle: list[Connection]) -> None:
        self.idle_since_s = 0.0
        self._loop, self._target = loop, target
        self._idle = idle
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
            self.idle_since_s = time.monotonic()
            self._idle.append(self)
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
        if self._parser is None:  # nobody asked
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._is_lost = True
            self.close()
        if self._buffered > MOST_BUFFERED_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        if self in self._idle:
            self._idle.remove(self)
        self._tell()

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._buffered += len(data)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        self._is_whole, self._may_stay = True, self._parser.should_keep_alive()


class DirectClient:
    """Connections for POSTs to ``path`` below any URL; any number at once, idle ones used again."""

    def __init__(self, path: str, *, connect_s: float) -> None:
        self._path, self._connect_s = path, connect_s
        self._targets: dict[str, Target] = {}
        self._idle: defaultdict[str, list[Connection]] = defaultdict(list)

    async def connect(self, url: str) -> Connection:
        """A connection to the server of ``url``, to be let go. Raises Unreachable."""
        idle = self._idle[url]
        while idle:
            connection = idle.pop()
            if connection.is_free and time.monotonic() - connection.idle_since_s < TRUSTED_IDLE_S:
                return connection
            connection.close()
        loop, target = asyncio.get_running_loop(), self._target(url)
        try:
            async with asyncio.timeout(self._connect_s):
                _, made = await loop.create_connection(lambda: Connection(loop, target, idle), target.host, target.port)
        except (OSError, TimeoutError) as error:
            raise Unreachable(url) from error
        return made

    def _target(self, url: str) -> Target:
        if url not in self._targets:
            parts = urlsplit(url)
            lines = (
                f"POST {parts.path}{self._path} HTTP/1.1",
                f"Host: {parts.netloc}",
                "Content-Type: application/json",
                "",
            )
            self._targets[url] = Target(parts.hostname or "", parts.port or 80, "\r\n".join(lines).encode())
        return self._targets[url]

    def close(self) -> None:
        """Cut the idle connections; the others end with their requests."""
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
