"""What gateways are measured against: a raw ASGI app that answers at once, as a replica of ours and as OpenAI.

``uvicorn tests.bench.mock_upstream:app``. ``max_tokens`` words are said; a stream sends each in a chunk of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

VERSION = "v000000-ec40ec40"
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
_TOKENS = re.compile(rb'"max_tokens":\s*(\d+)')
_CHOICES = re.compile(rb'"n":\s*(\d+)')


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await _lifespan(receive, send)
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    found, choices = _TOKENS.search(body), _CHOICES.search(body)
    tokens, sides = int(found[1]) if found else 8, int(choices[1]) if choices else 1
    if scope["path"].endswith("/v1/generate"):
        await _send(send, b"application/x-ndjson", _generated(tokens, sides))
    elif b'"stream": true' in body or b'"stream":true' in body:
        await _send(send, b"text/event-stream", _streamed(tokens))
    else:
        await _send(send, b"application/json", _whole(tokens))


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _send(send: Send, media_type: bytes, pieces: tuple[bytes, ...]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", media_type)]})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@cache
def _generated(tokens: int, sides: int) -> tuple[bytes, ...]:
    """Chunks of a replica; the last of each side carries the counts."""
    pieces = []
    for token in range(tokens):
        for index in range(sides):
            chunk: dict[str, Any] = {
                "index": index,
                "version": VERSION,
                "text": " word",
                "tokens": [{"token": " word", "token_id": 7, "logprob": -0.5}],
            }
            if token == tokens - 1:
                chunk |= {"finish_reason": "length", "prompt_tokens": 9, "completion_tokens": tokens}
            pieces.append(json.dumps(chunk).encode() + b"\n")
    return tuple(pieces)


@cache
def _streamed(tokens: int) -> tuple[bytes, ...]:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "mock"}
    deltas: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": " word"}, "finish_reason": None}]
    deltas += [{"delta": {"content": " word"}, "finish_reason": None} for _ in range(tokens - 1)]
    deltas.append({"delta": {}, "finish_reason": "length"})
    lines = [json.dumps(head | {"choices": [{"index": 0} | delta]}) for delta in deltas]
    return (*(f"data: {line}\n\n".encode() for line in lines), b"data: [DONE]\n\n")


@cache
def _whole(tokens: int) -> tuple[bytes, ...]:
    document = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "mock",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": " word" * tokens}, "finish_reason": "length"}
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens},
    }
    return (json.dumps(document).encode(),)
