"""From arms to growing answers: which calls make an exchange's answers, and those calls running.

Sides of one version are one call with n = 2, so that they share the prompt's prefill; sides of different
versions are two calls, whose chunks come out interleaved as they arrive.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from router.arms import Arm, Arms
from router.backends import ReplicaPool
from router.errors import RouterError, UpstreamFailed
from router.exchange import Answer, Exchange
from router.schema import ChatRequest
from serving.wire import Chunk, GenerateRequest, Sampling

Grown = list[tuple[Answer, Chunk | None]]  # what just grew; None: it failed


class Call(msgspec.Struct, frozen=True):
    """One request to one replica; its completion ``i`` becomes ``answers[i]``."""

    base: str
    request: GenerateRequest
    answers: tuple[Answer, ...]
    is_read_along: bool  # the client streams


def plan_calls(exchange: Exchange, arms: Arms, draw: random.Random, deadline_s: float, traceparent: str) -> list[Call]:
    """Fill ``exchange.answers`` (for a pair in random position) and return the calls that make them.

    Sides of one version are one call with n = 2, so that they share the prompt's prefill.
    """
    started_s = time.perf_counter()
    body = exchange.request
    sides = list(arms.sides) if exchange.is_pair else [arms.sides[0]] * (body.n or 1)
    if exchange.is_pair:
        draw.shuffle(sides)
    exchange.answers = [
        Answer(_answer_id(exchange, index), arm, sampling_of(body, arm), started_s) for index, arm in enumerate(sides)
    ]
    exchange.shown = list(exchange.answers)
    groups: dict[Arm, list[Answer]] = {}
    for answer in exchange.answers:
        groups.setdefault(answer.arm, []).append(answer)
    # Not the client's request id: that may come twice, and two generations must never share an id.
    return [
        Call(
            arm.base,
            GenerateRequest(
                request_id=f"{exchange.id}-{number}",
                version=arm.version,
                messages=exchange.prompt,
                sampling=sampling_of(body, arm),
                n=len(answers),
                deadline_s=deadline_s,
                traceparent=traceparent,
                tool_use=body.tool_use,
            ),
            tuple(answers),
            body.is_stream,
        )
        for number, (arm, answers) in enumerate(groups.items())
    ]


def sampling_of(body: ChatRequest, arm: Arm) -> Sampling:
    """The client's wishes over the variant's decoding defaults."""
    assert body.max_tokens is not None, "checked() settles max_tokens"
    return Sampling(
        max_tokens=body.max_tokens,
        temperature=arm.temperature if body.temperature is None else body.temperature,
        top_p=arm.top_p if body.top_p is None else body.top_p,
        stop=body.stops,
        seed=body.seed,
        top_logprobs=body.top_logprobs or 0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias={int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        json_schema=body.response_format.schema_text if body.response_format else "",
    )


def _answer_id(exchange: Exchange, index: int) -> str:
    """A single answer's id is the body's; a pair's sides are told apart, and get no thumbs."""
    if exchange.is_pair:
        return f"{exchange.id}-{'ab'[index]}"
    return f"{exchange.id}-{index}" if index else exchange.id


async def grow(pool: ReplicaPool, calls: list[Call]) -> AsyncGenerator[Grown]:
    """All calls at once; what grew, as it comes."""
    if len(calls) == 1:
        async with aclosing(_run(pool, calls[0])) as batches:
            async for batch in batches:
                yield batch
        return
    queue: asyncio.Queue[Grown | None] = asyncio.Queue()

    async def pump(call: Call) -> None:
        try:
            async with aclosing(_run(pool, call)) as batches:
                async for batch in batches:
                    queue.put_nowait(batch)
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(call)) for call in calls]
    try:
        for _ in calls:
            while (grown := await queue.get()) is not None:
                yield grown
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(pool: ReplicaPool, call: Call) -> AsyncGenerator[Grown]:
    """One call; its failure is its answers' failure."""
    failure: RouterError = UpstreamFailed("The replica ended the stream early.", code="truncated")
    try:
        async with aclosing(pool.generate(call.base, call.request, is_read_along=call.is_read_along)) as stream:
            async for chunks in stream:
                now_s = time.perf_counter()
                grown: Grown = []
                for chunk in chunks:
                    answer = call.answers[chunk.index]
                    answer.take(chunk, now_s)
                    grown.append((answer, chunk))
                yield grown
    except RouterError as error:
        failure = error
    cut = [answer for answer in call.answers if not answer.is_over]
    for answer in cut:
        answer.fail(failure, time.perf_counter())
    if cut:
        yield [(answer, None) for answer in cut]
