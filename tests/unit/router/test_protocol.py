"""What the edge writes to a connection, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from router.protocol import HeadAndBody

HEAD, BODY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", b"{}"


class Recording(asyncio.Transport):
    """Every write to the socket."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.writes.append(b"".join(list_of_data))

    def close(self) -> None:
        self.writes.append(b"closed")

    def is_closing(self) -> bool:
        return b"closed" in self.writes


async def test_a_head_leaves_with_its_body_in_one_write() -> None:
    socket = Recording()
    transport = HeadAndBody(socket, asyncio.get_running_loop())
    transport.write(HEAD)
    transport.write(BODY)
    assert socket.writes == [HEAD + BODY]
    await asyncio.sleep(0)
    assert socket.writes == [HEAD + BODY]


async def test_the_head_of_a_stream_does_not_wait_for_its_first_event() -> None:
    socket = Recording()
    transport = HeadAndBody(socket, asyncio.get_running_loop())
    transport.write(HEAD)
    await asyncio.sleep(0)
    assert socket.writes == [HEAD]
    transport.write(b"data: 1")
    transport.write(b"data: 2")
    assert socket.writes == [HEAD, b"data: 1", b"data: 2"]


async def test_two_answers_on_one_connection_keep_their_order() -> None:
    socket = Recording()
    transport = HeadAndBody(socket, asyncio.get_running_loop())
    for data in (HEAD, BODY, HEAD):
        transport.write(data)
    await asyncio.sleep(0)
    transport.write(BODY)
    assert b"".join(socket.writes) == HEAD + BODY + HEAD + BODY


async def test_closing_sends_what_was_held_back() -> None:
    socket = Recording()
    transport = HeadAndBody(socket, asyncio.get_running_loop())
    transport.write(HEAD)
    transport.close()
    assert socket.writes == [HEAD, b"closed"]
    assert transport.is_closing()
    await asyncio.sleep(0)
    assert socket.writes == [HEAD, b"closed"]
