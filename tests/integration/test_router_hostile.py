"""Clients that are broken or mean ill: too much, too slow, no text, no numbers. Each is refused, the next is served."""

from __future__ import annotations

import asyncio
import json
import logging
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from router.protocol import PatientProtocol
from telemetry.config import TelemetryConfig
from tests.router_stack import STABLE, Stack, fast, running_stack, serving_on_loopback

CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
MIB = 1 << 20


@pytest.fixture
async def stack(telemetry_config: TelemetryConfig) -> AsyncIterator[Stack]:
    async with running_stack(telemetry_config) as running:
        yield running


class Connection:
    """One connection on which bytes are sent as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """(status, body) of the next answer."""
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 10)
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return int(head.split()[1]), await self._reader.readexactly(int(length.partition(b":")[2]))

    async def is_closed_within(self, seconds: float) -> bool:
        try:
            return await asyncio.wait_for(self._reader.read(1), seconds) == b""
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


def code(body: bytes) -> str:
    found: str = json.loads(body)["error"]["code"]
    return found


# too much


async def test_a_body_declared_too_large_is_refused_before_it_is_sent(stack: Stack) -> None:
    async with connection(stack.url) as client:
        await client.send(CHAT + b"Content-Length: 100000000\r\n\r\n")
        status, body = await client.answer()
    assert (status, code(body)) == (413, "request_too_large")


async def test_a_body_of_a_hundred_megabytes_is_refused_without_being_kept(stack: Stack) -> None:
    part = b"%x\r\n" % MIB + b" " * MIB + b"\r\n"
    async with connection(stack.url) as client:
        tracemalloc.start()
        try:
            await client.send(CHAT + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(100):
                await client.send(part)
            await client.send(b"0\r\n\r\n")
            status, body = await client.answer()
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (status, code(body)) == (413, "request_too_large")
        assert peak_bytes < 20 * MIB
        await client.send(LIVE)
        assert (await client.answer())[0] == 200, "the connection is still good"


async def test_what_is_too_long_is_the_clients_error(stack: Stack) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"messages": [{"role": "user", "content": "x" * 262_145}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x"}] * 1025}, "messages"),
        ({"model": "x" * 257}, "model"),
        ({"user": "x" * 257}, "user"),
        ({"stop": ["x"] * 5}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
    ]
    for fields, param in wrong:
        status, answer, _ = await stack.ask(**fields)
        error = answer["error"]
        assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)


async def test_counts_that_make_no_sense_are_the_clients_error(stack: Stack) -> None:
    for param in ("n", "max_tokens", "max_completion_tokens"):
        for value in (-1, 0, 10**6, 2**63, 10**400, 1.5, "1", True, [1]):
            status, answer, _ = await stack.ask(**{param: value})
            assert (status, answer["error"]["param"]) == (400, param), value


async def test_numbers_out_of_range_are_the_clients_error(stack: Stack) -> None:
    wrong: list[tuple[str, float]] = [
        ("temperature", -0.1),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.1),
        ("frequency_penalty", -2.1),
        ("presence_penalty", 1e300),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
    ]
    for param, value in wrong:
        status, answer, _ = await stack.ask(**{param: value, "logprobs": True})
        assert (status, answer["error"]["param"]) == (400, param), value


# not text, not JSON


NO_JSON_TEXT = (
    b"\xff\xfe",
    b'{"model": "chat", "messages": [{"role": "user", "content": "\xff"}]}',
    b'{"\xff": 1}',
    b'{"model": "chat", "messages": [{"role": "user", "content": "\\ud800"}]}',
    '{"model": "chat"}'.encode("utf-16"),
    b'\xef\xbb\xbf{"model": "chat"}',
    b'{"model": "chat", "temperature": NaN}',
    b'{"model": "chat", "temperature": 1e999}',
    b"",
    b"\x00",
    b'{"model": "chat", "tools": ' + b"[" * 200_000,
    b'{"model": "chat", "tools": ' + b'{"a":' * 50_000,
    b'{"model": "chat", "unknown": ' + b"[" * 200_000,
    b'{"model": "chat", "unknown": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
)


async def test_a_body_that_is_no_json_text_is_the_clients_error(stack: Stack) -> None:
    for body in NO_JSON_TEXT:
        async with stack.http.post("/v1/chat/completions", data=body) as response:
            answer = await response.json()
        assert (response.status, answer["error"]["type"]) == (400, "invalid_request_error"), body[:80]


@pytest.mark.parametrize("levels", [65, 700, 960, 30_000])
async def test_a_schema_nested_too_deep_is_the_clients_error(stack: Stack, levels: int) -> None:
    deep = b'{"a":' * levels + b"1" + b"}" * levels
    body = (
        b'{"model": "chat", "messages": [{"role": "user", "content": "x"}], "response_format": '
        b'{"type": "json_schema", "json_schema": {"name": "deep", "schema": ' + deep + b"}}}"
    )
    async with stack.http.post("/v1/chat/completions", data=body) as response:
        answer = await response.json()
    assert (response.status, answer["error"]["code"]) == (400, "invalid_json" if levels > 900 else "invalid_value")


@pytest.mark.parametrize("version", [f"{STABLE}%0A", "v%D9%A0%D9%A0%D9%A0%D9%A0%D9%A0%D9%A1-0000abcd", "..%2F", "%FF"])
async def test_an_order_is_for_a_version_name_exactly(stack: Stack, version: str) -> None:
    async with connection(stack.url) as client:
        await client.send(f"POST /admin/releases/{version}/promote HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        status, _ = await client.answer()
    assert status in (400, 404)
    assert await stack.redis.llen("tiebreak:releases:commands") == 0  # type: ignore[misc]


@pytest.mark.parametrize(
    "request_line",
    [b"GET /\xff HTTP/1.1", b"GET /v1/models/%FF%00 HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET http: HTTP/1.1"],
)
async def test_odd_paths_are_the_clients_error(stack: Stack, request_line: bytes) -> None:
    async with connection(stack.url) as client:
        await client.send(request_line + b"\r\nHost: 127.0.0.1\r\n\r\n")
        status, _ = await client.answer()
    assert 400 <= status < 500


async def test_a_method_that_a_path_does_not_take_names_all_that_it_takes(stack: Stack) -> None:
    async with stack.http.post("/v1/users/ann/consent") as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD, PUT")


# too slow


async def test_a_body_that_does_not_come_is_answered_and_holds_no_place(telemetry_config: TelemetryConfig) -> None:
    async with running_stack(telemetry_config, config=fast(body_s=0.3, max_in_flight=1)) as stack:
        async with connection(stack.url) as slow, connection(stack.url) as slower:
            await slow.send(CHAT + b"Content-Length: 100\r\n\r\n{")
            await slower.send(CHAT + b"Transfer-Encoding: chunked\r\n\r\n")
            assert (await stack.ask())[0] == 200
            for client in (slow, slower):
                status, body = await client.answer()
                assert (status, code(body)) == (408, "request_timeout")
        assert (await stack.ask())[0] == 200


async def test_a_client_that_leaves_within_its_body_is_no_fault_of_ours(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        async with connection(stack.url) as client:
            await client.send(CHAT + b"Content-Length: 100\r\n\r\n{")
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        assert (await stack.ask())[0] == 200
    assert not caplog.records


class Impatient(PatientProtocol):
    patience_s = 0.3
    max_head_bytes = 4096


async def unread(request: Request) -> Response:
    """Answers after a second, or at once where there is a body, which it does not read."""
    if request.method == "GET":
        await asyncio.sleep(1.0)
    return Response(b"done")


@pytest.fixture
async def impatient() -> AsyncIterator[str]:
    app = Starlette(routes=[Route("/", unread, methods=["GET", "POST"])])
    async with serving_on_loopback(app, Impatient) as url:
        yield url


async def nothing(client: Connection) -> None:
    pass


async def half_a_head(client: Connection) -> None:
    await client.send(b"GET / HTTP/1.1\r\nHost: 127")


async def empty_lines(client: Connection) -> None:
    for _ in range(4):
        await client.send(b"\r\n")
        await asyncio.sleep(0.05)


async def half_a_second_head(client: Connection) -> None:
    await client.send(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
    await client.answer()
    await client.send(b"GET / HT")


async def half_a_body_after_the_answer(client: Connection) -> None:
    await client.send(b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    await client.answer()


async def the_rest_of_a_body_after_the_answer(client: Connection) -> None:
    await client.send(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n")
    await client.answer()
    await client.send(b"{}")


SLOW = [
    nothing,
    half_a_head,
    empty_lines,
    half_a_second_head,
    half_a_body_after_the_answer,
    the_rest_of_a_body_after_the_answer,
]


@pytest.mark.parametrize("begin", SLOW)
async def test_a_connection_that_does_not_go_on_is_cut(
    impatient: str, begin: Callable[[Connection], Awaitable[None]]
) -> None:
    async with connection(impatient) as client:
        await begin(client)
        assert await client.is_closed_within(2.0)  # uvicorn's own limit, between two requests, is five seconds


async def test_a_client_that_waits_for_its_answer_is_not_cut(impatient: str) -> None:
    async with connection(impatient) as client:
        await client.send(b"GET / HTTP/1.1\r\n\r\nGET / HT")
        await client.send(b"TP/1.1\r\n")
        assert await client.answer() == (200, b"done")
        await client.send(b"\r\n")
        assert await client.answer() == (200, b"done")


async def test_a_head_without_end_is_refused(impatient: str) -> None:
    async with connection(impatient) as client:
        await client.send(b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 5000)
        assert (await client.answer())[0] == 400
        assert await client.is_closed_within(2.0)
