"""The event stream, byte for byte, as ``golden/*.sse`` has it; and both official SDKs read the same from those files.

After a change that is meant, run this file with ``TIEBREAK_RENEW_GOLDEN=1`` and read the difference. Ids, times and
pair tokens are other ones each time and stand there as placeholders.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from serving.echo_engine import EchoEngine
from telemetry.config import TelemetryConfig
from tests.javascript import run_program
from tests.router_stack import STABLE, FaultyEngine, running_stack, serving_on_loopback

pytestmark = pytest.mark.usefixtures("redis_server")
GOLDEN = Path(__file__).with_name("golden")
IS_RENEWED = bool(os.environ.get("TIEBREAK_RENEW_GOLDEN"))
ASK: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "one “zwei”\n三 🎻"}], "stream": True}
# The echo engine ends a pair's second side otherwise than its first.
FIRST, SECOND = f"{STABLE} says: one “zwei”\n三 🎻", f"{STABLE} says (1): one “zwei”\n三 🎻"
# request, (text, finish) of each choice; a call's text is its name and arguments
STREAMS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "plain": ({}, [(FIRST, "stop")]),
    "usage": ({"stream_options": {"include_usage": True}}, [(FIRST, "stop")]),
    "logprobs": ({"logprobs": True, "top_logprobs": 2}, [(FIRST, "stop")]),
    "stop": ({"stop": ["\n三"]}, [(f"{STABLE} says: one “zwei”", "stop")]),
    "length": ({"max_tokens": 3}, [(f"{STABLE} says: one", "length")]),
    "choices": ({"n": 2}, [(FIRST, "stop"), (SECOND, "stop")]),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "look_up"}}], "tool_choice": "required"},
        [(f"look_up{json.dumps({'said': FIRST})}", "tool_calls")],
    ),
    "pair": ({"user": "ann", "preference": {"pair": "always"}}, [(FIRST, "stop"), (SECOND, "stop")]),
    "failure": ({}, [(f"{STABLE} says:", "")]),
}
PLACEHOLDERS = (
    (rb'"id":"chatcmpl-[0-9a-f]{32}"', b'"id":"chatcmpl-0"'),
    (rb'"id":"call_[0-9a-f]{24}"', b'"id":"call_0"'),
    (rb'"created":\d{10}', b'"created":0'),
    (rb'"pair_id":"[0-9a-f-]{36}"', b'"pair_id":"0"'),
    (rb'"token":"[\w.-]+","expires_at":"[^"]+"', b'"token":"0","expires_at":"2026-01-01T00:00:00Z"'),
)


def normalised(stream: bytes) -> bytes:
    """``stream`` with a placeholder for all that is another each time."""
    for pattern, placeholder in PLACEHOLDERS:
        stream = re.sub(pattern, placeholder, stream)
    return stream


async def asked(telemetry: TelemetryConfig, name: str) -> bytes:
    """The bytes of the stream ``name`` as a router sends them now."""
    # Slow, so that the failure comes after the first piece: one that comes with it is a 502.
    engine = FaultyEngine(STABLE, good_chunks=2, token_s=0.2) if name == "failure" else EchoEngine()
    async with running_stack(telemetry, engine=engine) as stack:
        await stack.consent("ann")
        while True:
            async with stack.http.post("/v1/chat/completions", json=ASK | STREAMS[name][0]) as response:
                assert response.content_type == "text/event-stream"
                stream = await response.read()
            if b'"index":0' in stream.partition(b"\n")[0]:  # which side of a pair is which is drawn
                return stream


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_is_byte_for_byte_what_it_was(telemetry_config: TelemetryConfig, name: str) -> None:
    stream = normalised(await asked(telemetry_config, name))
    path = GOLDEN / f"{name}.sse"
    if IS_RENEWED:
        path.write_bytes(stream)
    assert stream == path.read_bytes(), f"{path} differs: TIEBREAK_RENEW_GOLDEN=1 writes it anew"


@pytest.fixture
async def golden_server() -> AsyncIterator[str]:
    """The golden streams as an OpenAI server under ``/NAME/v1`` would send them."""

    async def send(request: Request) -> Response:
        return FileResponse(GOLDEN / f"{request.path_params['name']}.sse", media_type="text/event-stream")

    app = Starlette(routes=[Route("/{name}/v1/chat/completions", send, methods=["POST"])])
    async with serving_on_loopback(app) as url:
        yield url


def read_by_python(url: str) -> dict[str, Any]:
    """What the SDK for Python reads: ``choices`` as (text with calls, finish), and the code of an error."""
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    error: str | None = None
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        try:
            for chunk in client.chat.completions.create(**ASK):
                for piece in chunk.choices:
                    functions = [call.function for call in piece.delta.tool_calls or []]
                    said = [piece.delta.content, *(part for f in functions if f for part in (f.name, f.arguments))]
                    texts[piece.index] = "".join([texts.get(piece.index, ""), *filter(None, said)])
                    finishes[piece.index] = piece.finish_reason or finishes.get(piece.index, "")
        except openai.APIError as failure:
            error = failure.code
    return {"choices": [(texts[index], finishes[index]) for index in sorted(texts)], "error": error}


async def read_by_javascript(url: str) -> dict[str, Any]:
    """The same of the SDK for JavaScript."""
    seen = await asyncio.to_thread(run_program, "judge.mjs", url, "reading")
    choices = [(choice["text"], "".join(choice["finishes"])) for choice in seen["choices"]]
    return {"choices": choices, "error": seen["error"]}


@pytest.mark.parametrize("name", STREAMS)
async def test_the_python_sdk_reads_a_golden_stream(golden_server: str, name: str) -> None:
    read = await asyncio.to_thread(read_by_python, f"{golden_server}/{name}")
    assert read == {"choices": STREAMS[name][1], "error": "engine_failed" if name == "failure" else None}


@pytest.mark.usefixtures("javascript_sdk")
@pytest.mark.parametrize("name", STREAMS)
async def test_the_javascript_sdk_reads_the_same(golden_server: str, name: str) -> None:
    url = f"{golden_server}/{name}"
    assert await read_by_javascript(url) == await asyncio.to_thread(read_by_python, url)
