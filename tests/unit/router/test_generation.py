"""From a client's wishes to what a replica is asked."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from router.arms import Arm, Arms
from router.backends import _headers
from router.exchange import Answer, Exchange
from router.generation import Call, grow, plan_calls, sampling_of
from router.schema import ChatRequest, decode
from serving.wire import GATHER_HEADER, Chunk, GenerateRequest, Sampling

ARM = Arm("chat-main", "tiny", "v000001-aaaaaaaa", "stable", temperature=0.8, top_p=0.95)
ASKED = (
    b'{"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0.0, '
    b'"top_p": 0.5, "stop": ["x"], "seed": 3, "logprobs": true, "top_logprobs": 4, "frequency_penalty": 0.5, '
    b'"presence_penalty": -1.5, "logit_bias": {"7": 2.0}, "response_format": {"type": "json_object"}}'
)


def test_every_wish_of_the_client_reaches_the_replica() -> None:
    asked = sampling_of(decode(ASKED, ChatRequest), ARM)
    assert asked.json_schema
    assert asked == Sampling(
        max_tokens=9,
        temperature=0.0,
        top_p=0.5,
        stop=("x",),
        seed=3,
        top_logprobs=4,
        frequency_penalty=0.5,
        presence_penalty=-1.5,
        logit_bias={7: 2.0},
        json_schema=asked.json_schema,
    )


def test_what_the_client_does_not_say_is_the_variants_default() -> None:
    body = decode(b'{"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}', ChatRequest)
    assert sampling_of(body, ARM) == Sampling(max_tokens=9, temperature=0.8, top_p=0.95)


@pytest.mark.parametrize("is_stream", [True, False])
def test_whether_a_client_reads_along_is_what_it_asked_for(is_stream: bool) -> None:
    body = decode(ASKED.replace(b'"seed"', b'"stream": %b, "seed"' % str(is_stream).lower().encode()), ChatRequest)
    exchange = Exchange(
        request=body, request_id="r", id="c", created=0, policy="chat", user="", caller="", prompt=(), propensity=1.0
    )
    [call] = plan_calls(exchange, Arms((ARM,), 1.0), random.Random(0), 5.0, "")
    assert call.is_read_along is is_stream


class Pool:
    """Answers at once, and remembers how it was asked."""

    def __init__(self) -> None:
        self.read_along: list[bool] = []

    async def generate(
        self, base: str, request: GenerateRequest, *, is_read_along: bool
    ) -> AsyncGenerator[list[Chunk]]:
        self.read_along.append(is_read_along)
        yield [Chunk(0, ARM.version, finish_reason="stop")]


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_replica_is_told_to_gather_what_no_client_reads_along(is_stream: bool) -> None:
    sampling = Sampling(max_tokens=1)
    request = GenerateRequest("r", ARM.version, (), sampling)
    pool: Any = Pool()
    async for _ in grow(pool, [Call("tiny", request, (Answer("c", ARM, sampling, 0.0),), is_stream)]):
        pass
    assert pool.read_along == [is_stream]
    assert (GATHER_HEADER.encode() in _headers(request, pool.read_along[0])) is not is_stream
