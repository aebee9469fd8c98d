"""The HTTP edge's small parts: bounded bodies, JSON answers, event streams that notice a client's leaving."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.admission import is_loopback
from router.errors import (
    ClientClosed,
    Forbidden,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RequestTimeout,
    RouterError,
)
from telemetry.events import new_id

MAX_BODY: Final = "max_body_bytes"  # names in the application's state
BODY_S: Final = "body_s"
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")
KEEP_ALIVE: Final = b": keep-alive\n\n"  # a comment: proxies see traffic, clients ignore it
KEEP_ALIVE_S: Final = 15.0
_encode = msgspec.json.Encoder().encode


async def read_body(request: Request) -> bytes:
    """The whole body. Raises PayloadTooLarge as soon as that is known, RequestTimeout, or ClientClosed."""
    limit: int = getattr(request.app.state, MAX_BODY)
    too_large = PayloadTooLarge(f"The body is larger than {limit} bytes.")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    body = b""
    try:
        async with asyncio.timeout(getattr(request.app.state, BODY_S)):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise RequestTimeout() from error
    except ClientDisconnect as error:
        raise ClientClosed() from error
    return body


async def gone_away(receive: Receive) -> None:
    """Return when the client has gone away. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class JsonResponse(Response):
    """A record as JSON."""

    media_type = "application/json"

    def __init__(self, record: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(_encode(record), status_code, headers)


class EventStream(Response):
    """Server-sent events. ``on_close(is_whole)`` is called once, however the stream ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        headers: Mapping[str, str],
        on_close: Callable[[bool], Awaitable[None]],
    ) -> None:
        super().__init__(None, 200, {**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_whole = False
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(gone_away(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
                is_whole = True
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._events.aclose()
            await self._on_close(is_whole)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        following: asyncio.Task[bytes] | None = None
        try:
            while True:
                following = following or asyncio.create_task(anext(self._events, b""))
                done, _ = await asyncio.wait({following}, timeout=KEEP_ALIVE_S)
                data = following.result() if done else KEEP_ALIVE
                if done:
                    following = None
                if not data:
                    break
                await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Edge:
    """What happens to every request: an id in and out; in open mode, strangers' pages are kept away.

    Open mode trusts whoever can reach loopback. A web page can reach it too, through the reader's browser, so
    requests that name another host (DNS rebinding) or come from another origin are refused.
    """

    def __init__(self, app: ASGIApp, *, is_open: bool) -> None:
        self._app = app
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else new_id()
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        if self._is_open and not _is_local(headers):
            refusal = Forbidden("Without keys this gateway answers only pages and programs of its own machine.")
            await error_response(refusal)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)


def _is_local(headers: Headers) -> bool:
    origin = headers.get("origin")
    hosts = [headers.get("host", ""), *([origin.partition("://")[2]] if origin else [])]
    return all(map(_is_local_host, hosts))


@lru_cache(maxsize=256)
def _is_local_host(host: str) -> bool:
    """Of a host with or without a port; asked of every request, and nearly always of the same."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:  # no host at all, such as "[::1"
        return False


def error_response(error: RouterError) -> Response:
    """``error`` as OpenAI's clients read it."""
    return JsonResponse(error.body(), error.status, error.headers())


async def _router_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RouterError)
    return error_response(error)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code != 405:
        return error_response(NotFound("There is no such path; GET /docs lists them."))
    answer = error_response(MethodNotAllowed())
    answer.headers["Allow"] = ", ".join(sorted(_methods(request)))
    return answer


def _methods(request: Request) -> set[str]:
    """What the path takes: Starlette itself names only the first of its routes."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in routes for method in route.methods}


async def _unexpected(request: Request, error: Exception) -> Response:
    """The server logs the error and its trace; the client learns nothing of it."""
    return error_response(RouterError("Something went wrong here; the log has it under this request's id."))


EXCEPTION_HANDLERS: Final = {RouterError: _router_error, HTTPException: _http_exception, Exception: _unexpected}
