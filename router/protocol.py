"""HTTP/1.1 beneath the application: uvicorn's parser, with an end to the patience for what a client has begun to send.

A request's head must be here in time and small. After an early answer (413) the rest of the body must come in time too.
A body that the application waits for is its own business (``read_body``): to that an answer can be sent.
An answer's head leaves together with what is written right behind it: one write, and one time that the client wakes.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class HeadAndBody:
    """A transport that holds an answer's head back until the next write, or to the end of the loop's turn.

    uvloop writes at once and uvicorn writes the head alone, so that a client wakes for a head without its body.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        """As a transport's, in the same order."""
        if not self._head and data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self._let_go)
        else:
            head, self._head = self._head, b""
            self._transport.write(head + data)

    def close(self) -> None:
        """As a transport's: what was written before it is sent."""
        self._let_go()
        self._transport.close()

    def forget(self) -> None:
        """The connection is lost: a closed transport must not be written to."""
        self._head = b""

    def _let_go(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    # what else uvicorn asks a transport for; nothing that could overtake the head is among it

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)


class PatientProtocol(HttpToolsProtocol):
    """One connection. Without it, one that sends nothing, or a byte now and then, is kept for ever."""

    patience_s: ClassVar[float] = 10.0
    max_head_bytes: ClassVar[int] = 1 << 16

    _cut: asyncio.TimerHandle | None = None
    _awaits_head = True
    _heads = 0  # that were complete
    _head_bytes = 0  # of the one that is not

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._joined = HeadAndBody(transport, self.loop)
        super().connection_made(self._joined)  # type: ignore[arg-type]
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._joined.forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        heads = self._heads if self._awaits_head else -1
        super().data_received(data)
        if heads != self._heads:
            self._head_bytes = 0
            if self._is_answered:  # the last of a body came after its answer: what comes next is a head again
                self._wait()
        elif not self.transport.is_closing():
            self._wait()
            self._head_bytes += len(data)
            if self._head_bytes > self.max_head_bytes:
                self.send_400_response("The request's head is too large.")

    @property
    def _is_answered(self) -> bool:
        """Nothing is asked that was not answered, and a head is what comes next."""
        is_open = self._awaits_head and not self.transport.is_closing()
        return is_open and self.cycle is not None and self.cycle.response_complete

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of the head, or of the trailers behind a body in chunks, which nobody reads."""
        if self._awaits_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._awaits_head = False
        self._heads += 1
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_waiting()
        self._awaits_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._awaits_head:
            self._wait()

    def _wait(self) -> None:
        if self._cut is None:
            self._cut = self.loop.call_later(self.patience_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None

    def _give_up(self) -> None:
        self._cut = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait()  # an earlier request is still being answered
        else:
            self.transport.close()
