"""An HTTP/1.1 client that costs the machine little, so that a bench measures the server: keep-alive, bytes in and out.

A tenth of what a full client library takes per request; for answers of our own servers and mocks only.
"""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

HEAD_END, LAST_CHUNK = b"\r\n\r\n", b"0\r\n\r\n"


@dataclass
class Answer:
    """What came back, and when each piece arrived (seconds, ``time.perf_counter``). Status 0: the connection broke."""

    started_s: float
    body: bytearray = field(default_factory=bytearray)  # head included
    arrivals: list[float] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int(self.body[9:12]) if self._is_whole() else 0

    @property
    def seconds(self) -> float:
        return self.arrivals[-1] - self.started_s

    def header(self, name: str) -> str:
        """A response header's value; empty when it is absent."""
        head, _, _ = bytes(self.body).partition(HEAD_END)
        for line in head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b": ")
            if key.decode().lower() == name:
                return value.decode()
        return ""

    def _is_whole(self) -> bool:
        end = self.body.find(HEAD_END)
        if end < 0:
            return False
        if length := self.header("content-length"):
            return len(self.body) >= end + len(HEAD_END) + int(length)
        return self.body.endswith(LAST_CHUNK)


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.is_open = False
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.is_open = transport, True

    async def send(self, request: bytes, started_s: float) -> Answer:
        assert self.transport is not None
        self._answer, self._done = Answer(started_s), asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self._done
        return self._answer

    def data_received(self, data: bytes) -> None:
        assert self._answer is not None and self._done is not None
        self._answer.body += data
        self._answer.arrivals.append(time.perf_counter())
        if self._answer.status and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._done is not None and not self._done.done():
            assert self._answer is not None
            self._answer.arrivals.append(time.perf_counter())
            self._done.set_result(None)

    def abort(self) -> None:
        """Go away without a word, as a client that crashed."""
        assert self.transport is not None
        self.transport.abort()


class RawClient:
    """Posts to one server; opens a connection whenever none is free."""

    def __init__(self, url: str, path: str, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        lines = [f"POST {path} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self._head = "\r\n".join(lines).encode()
        self._free: list[_Connection] = []

    async def post(self, payload: bytes, *, leave_after_s: float | None = None, due_s: float | None = None) -> Answer:
        """The answer; with ``leave_after_s`` the connection is cut then, if the answer is not whole yet.

        Time counts from ``due_s`` (``time.perf_counter``; None: now), so that what waited to be sent has waited too.
        """
        started_s = time.perf_counter() if due_s is None else due_s
        connection = await self._take()
        request = b"%b\r\nContent-Length: %d\r\n\r\n%b" % (self._head, len(payload), payload)
        loop = asyncio.get_running_loop()
        leaving = None if leave_after_s is None else loop.call_later(leave_after_s, connection.abort)
        answer = await connection.send(request, started_s)
        if leaving:
            leaving.cancel()
        if connection.is_open:
            self._free.append(connection)
        return answer

    async def _take(self) -> _Connection:
        while self._free:
            if (connection := self._free.pop()).is_open:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return connection

    def close(self) -> None:
        for connection in self._free:
            connection.abort()


async def open_loop(client: RawClient, payload: bytes, *, rate: float, seconds: float) -> list[Answer]:
    """``rate`` requests a second, each sent on time whether or not the earlier ones are back.

    The client collects no garbage meanwhile: with a hundred thousand answers kept, each collection would be a pause
    that counts as the server's.
    """
    gc.disable()
    try:
        return await _open_loop(client, payload, rate=rate, seconds=seconds)
    finally:
        gc.enable()


async def _open_loop(client: RawClient, payload: bytes, *, rate: float, seconds: float) -> list[Answer]:
    tasks, begun = [], time.perf_counter()
    for number in range(int(rate * seconds)):
        due_s = begun + number / rate
        wait_s = due_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(client.post(payload, due_s=due_s)))
    return list(await asyncio.gather(*tasks))
