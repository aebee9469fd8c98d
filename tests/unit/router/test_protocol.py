"""What the edge writes to a connection, and when."""

from __future__ import annotations

import asyncio

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from router.http import Edge, JsonResponse
from router.protocol import HeadAndBody, PatientProtocol

HEAD, BODY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", b"{}"
ASK = b"%s / HTTP/1.1\r\nhost: localhost\r\n%s\r\n"


class Recording(asyncio.Transport):
    """Every write to the socket; like uvloop's, it must not be written to once it is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_lost = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_lost:
            raise RuntimeError("the handler is closed")
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.writes.append(b"closed")

    def is_closing(self) -> bool:
        return b"closed" in self.writes

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await JsonResponse({})(scope, receive, send)


async def read_and_answer(scope: Scope, receive: Receive, send: Send) -> None:
    assert (await receive())["body"] == b"{}"
    await JsonResponse({})(scope, receive, send)


def connected(app: object = answer) -> tuple[PatientProtocol, Recording]:
    """The edge over a recording socket, with the middleware that the router has."""
    config = uvicorn.Config(Edge(app, is_open=True), http=PatientProtocol, ws="none", log_config=None)  # type: ignore[arg-type]
    config.load()
    protocol = PatientProtocol(config, ServerState(), {})
    socket = Recording()
    protocol.connection_made(socket)
    return protocol, socket


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def joined() -> tuple[HeadAndBody, Recording]:
    socket = Recording()
    return HeadAndBody(socket, asyncio.get_running_loop()), socket


async def test_an_answer_of_the_application_is_one_write() -> None:
    protocol, socket = connected()
    protocol.data_received(ASK % (b"GET", b""))
    await settle()
    assert len(socket.writes) == 1
    assert socket.writes[0].startswith(b"HTTP/1.1 200 OK\r\n") and socket.writes[0].endswith(b"\r\n\r\n{}")
    protocol.connection_lost(None)


async def test_a_head_that_nobody_waits_for_more_of_is_sent_before_the_close() -> None:
    protocol, socket = connected()
    protocol.data_received(ASK % (b"HEAD", b"connection: close\r\n"))
    await settle()
    assert socket.writes[0].endswith(b"\r\n\r\n") and socket.writes[1] == b"closed"
    protocol.connection_lost(None)


async def test_the_word_to_go_on_is_sent_before_the_body_has_come() -> None:
    protocol, socket = connected(read_and_answer)
    protocol.data_received(ASK % (b"POST", b"content-length: 2\r\nexpect: 100-continue\r\n"))
    await settle()
    assert socket.writes == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    protocol.data_received(b"{}")
    await settle()
    assert len(socket.writes) == 2 and socket.writes[1].endswith(b"\r\n\r\n{}")
    protocol.connection_lost(None)


async def test_what_is_held_when_the_connection_is_lost_is_not_written() -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    protocol, socket = connected()
    protocol.transport.write(HEAD)
    protocol.connection_lost(ConnectionResetError())
    socket.is_lost = True
    await settle()
    assert socket.writes == [] and failures == []


async def test_the_head_of_a_stream_does_not_wait_for_its_first_event(joined: tuple[HeadAndBody, Recording]) -> None:
    transport, socket = joined
    transport.write(HEAD)
    await settle()
    assert socket.writes == [HEAD]
    transport.write(b"data: 1")
    transport.write(b"data: 2")
    assert socket.writes == [HEAD, b"data: 1", b"data: 2"]


async def test_two_answers_on_one_connection_keep_their_order(joined: tuple[HeadAndBody, Recording]) -> None:
    transport, socket = joined
    for data in (HEAD, BODY, HEAD):
        transport.write(data)
    await settle()
    transport.write(BODY)
    assert socket.writes == [HEAD + BODY, HEAD, BODY]
