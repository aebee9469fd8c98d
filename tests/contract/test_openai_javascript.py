"""The official OpenAI SDK for JavaScript is a judge too: what it sees of whole and streamed answers, pairs, errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from telemetry.config import TelemetryConfig
from tests.javascript import run_program
from tests.router_stack import STABLE, Stack, running_stack

pytestmark = pytest.mark.usefixtures("redis_server", "javascript_sdk")
SAID = f"{STABLE} says: one two three"
SECOND = f"{STABLE} says (1): one two three"


@pytest.fixture
async def stack(telemetry_config: TelemetryConfig) -> AsyncIterator[Stack]:
    async with running_stack(telemetry_config) as running:
        yield running


async def seen_by_the_sdk(stack: Stack, scenario: str) -> dict[str, Any]:
    """What the SDK saw in a scenario of ``judge.mjs``."""
    seen: dict[str, Any] = await asyncio.to_thread(run_program, "judge.mjs", stack.url, scenario)
    return seen


async def test_a_whole_answer(stack: Stack) -> None:
    answer = await seen_by_the_sdk(stack, "whole")
    (choice,) = answer["choices"]
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", SAID)
    assert (choice["finish_reason"], answer["object"], answer["model"]) == ("stop", "chat.completion", "chat")
    assert answer["version"] == STABLE
    assert answer["usage"]["completion_tokens"] == 5


async def test_a_streamed_answer_is_the_whole_answer_in_pieces(stack: Stack) -> None:
    seen = await seen_by_the_sdk(stack, "stream")
    assert seen["choices"] == [{"text": SAID, "finishes": ["stop"], "tokens": []}]
    assert len(seen["ids"]) == 1


async def test_usage_comes_last_when_asked_for(stack: Stack) -> None:
    seen = await seen_by_the_sdk(stack, "usage")
    assert seen["choices"][0]["text"] == SAID
    assert (seen["last"]["choices"], seen["last"]["usage"]["completion_tokens"]) == ([], 5)
    assert set(seen["earlier"]) == {None}


async def test_logprobs_of_a_stream_name_every_token(stack: Stack) -> None:
    (choice,) = (await seen_by_the_sdk(stack, "logprobs"))["choices"]
    tokens = choice["tokens"]
    assert "".join(token["token"] for token in tokens) == SAID
    assert all(token["logprob"] < 0 and len(token["top_logprobs"]) == 2 for token in tokens)
    assert bytes(tokens[0]["bytes"]).decode() == tokens[0]["token"]


async def test_two_choices_are_both_there_whole_and_streamed(stack: Stack) -> None:
    seen = await seen_by_the_sdk(stack, "choices")
    assert seen["whole"] == [SAID, SECOND]
    assert [(choice["text"], choice["finishes"]) for choice in seen["streamed"]] == [
        (SAID, ["stop"]),
        (SECOND, ["stop"]),
    ]


async def test_a_streamed_pair_carries_both_choices_and_the_offer_first(stack: Stack) -> None:
    await stack.consent("ann")
    seen = await seen_by_the_sdk(stack, "pair")
    assert all(choice["text"].startswith(f"{STABLE} says") for choice in seen["choices"])
    assert [choice["finishes"] for choice in seen["choices"]] == [["stop"], ["stop"]]
    first, *others = seen["offers"]
    assert set(first) == {"pair_id", "token", "expires_at"}
    assert others and not any(others)


async def test_the_streaming_helper_puts_the_answer_together(stack: Stack) -> None:
    seen = await seen_by_the_sdk(stack, "helper")
    assert seen["text"] == SAID + SECOND
    assert [choice["message"]["content"] for choice in seen["final"]["choices"]] == [SAID, SECOND]
    assert [choice["finish_reason"] for choice in seen["final"]["choices"]] == ["stop", "stop"]
    assert seen["final"]["usage"]["completion_tokens"] == 11


async def test_a_refusal_is_the_sdks_own_error(stack: Stack) -> None:
    refusals = (await seen_by_the_sdk(stack, "refusals"))["seen"]
    assert [(error["name"], error["status"], error["code"], error["param"]) for error in refusals] == [
        ("NotFoundError", 404, "model_not_found", "model"),
        ("BadRequestError", 400, "invalid_value", "temperature"),
        ("BadRequestError", 400, "unsupported_parameter", "functions"),
    ]
    assert all(error["type"] and error["requestID"] for error in refusals)


async def test_models_can_be_listed_and_read(stack: Stack) -> None:
    seen = await seen_by_the_sdk(stack, "models")
    assert {"chat", "chat@stable", "chat@base", f"chat@{STABLE}"} <= set(seen["ids"])
    assert (seen["stable"]["root"], seen["stable"]["parent"]) == (STABLE, "echo")
