"""The official OpenAI SDK is the judge: whole and streamed answers, pairs, usage, log-probs, errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from telemetry.config import TelemetryConfig
from tests.router_stack import STABLE, Stack, running_stack

pytestmark = pytest.mark.usefixtures("redis_server")
Result = TypeVar("Result")
MESSAGES: list[Any] = [{"role": "user", "content": "one two three"}]
SAID = f"{STABLE} says: one two three"


@pytest.fixture
async def stack(telemetry_config: TelemetryConfig) -> AsyncIterator[Stack]:
    async with running_stack(telemetry_config) as running:
        yield running


async def sync(stack: Stack, ask: Callable[[openai.OpenAI], Result]) -> Result:
    """``ask`` with the SDK's blocking client, in a thread of its own."""

    def work() -> Result:
        with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
            return ask(client)

    return await asyncio.to_thread(work)


async def test_a_whole_answer(stack: Stack) -> None:
    answer = await sync(stack, lambda client: client.chat.completions.create(model="chat", messages=MESSAGES))
    assert answer.choices[0].message.content == SAID
    assert (answer.choices[0].message.role, answer.choices[0].finish_reason) == ("assistant", "stop")
    assert (answer.object, answer.model) == ("chat.completion", "chat")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens == 5


async def test_a_single_answer_names_its_variant_and_version_in_headers(stack: Stack) -> None:
    raw = await sync(
        stack, lambda client: client.chat.completions.with_raw_response.create(model="chat", messages=MESSAGES)
    )
    assert raw.headers["x-tiebreak-variant"] == "chat-main"
    assert raw.headers["x-tiebreak-version"] == STABLE
    assert "x-tiebreak-pair-id" not in raw.headers


async def test_a_streamed_answer_is_the_whole_answer_in_pieces(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> list[ChatCompletionChunk]:
        return list(client.chat.completions.create(model="chat", messages=MESSAGES, stream=True))

    chunks = await sync(stack, ask)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_stream_names_its_version_in_headers(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> Any:
        with client.chat.completions.with_streaming_response.create(
            model="chat", messages=MESSAGES, stream=True
        ) as response:
            list(response.iter_lines())
            return response.headers

    headers = await sync(stack, ask)
    assert headers["x-tiebreak-version"] == STABLE
    assert headers["content-type"].startswith("text/event-stream")


async def test_usage_comes_last_when_asked_for(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> list[ChatCompletionChunk]:
        stream = client.chat.completions.create(
            model="chat", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        return list(stream)

    *others, last = await sync(stack, ask)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in others)
    assert last.choices == []
    assert last.usage is not None and last.usage.completion_tokens == 5


async def test_the_async_client_streams_too(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model="chat@base", messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == f"{stack.engine.base_version} says: one two three"


async def test_sampling_fields_are_honoured(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> tuple[ChatCompletion, ChatCompletion]:
        short = client.chat.completions.create(
            model="chat", messages=MESSAGES, max_tokens=3, temperature=0, top_p=0.5, seed=7, user="ann"
        )
        return short, client.chat.completions.create(model="chat", messages=MESSAGES, stop=["two"])

    short, stopped = await sync(stack, ask)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == (f"{STABLE} says: one", "length")
    assert (stopped.choices[0].message.content or "").rstrip() == f"{STABLE} says: one"
    assert stopped.choices[0].finish_reason == "stop"


async def test_eight_choices_are_eight_without_any_setting(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> tuple[ChatCompletion, list[ChatCompletionChunk]]:
        whole = client.chat.completions.create(model="chat", messages=MESSAGES, n=8)
        return whole, list(client.chat.completions.create(model="chat", messages=MESSAGES, n=8, stream=True))

    whole, chunks = await sync(stack, ask)
    assert len({choice.message.content for choice in whole.choices}) == 8
    finishes = [c.choices[0].index for c in chunks if c.choices[0].finish_reason == "stop"]
    assert sorted(finishes) == list(range(8))


async def test_n_choices_are_all_there_whole_and_streamed(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> tuple[ChatCompletion, list[ChatCompletionChunk]]:
        whole = client.chat.completions.create(model="chat", messages=MESSAGES, n=3)
        return whole, list(client.chat.completions.create(model="chat", messages=MESSAGES, n=3, stream=True))

    whole, chunks = await sync(stack, ask)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    streamed = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == i) for i in range(3)]
    assert streamed == texts


async def test_logprobs_name_every_token(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> ChatCompletion:
        return client.chat.completions.create(model="chat", messages=MESSAGES, logprobs=True, top_logprobs=2)

    answer = await sync(stack, ask)
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert "".join(token.token for token in tokens) == SAID
    assert all(token.logprob < 0 and len(token.top_logprobs) == 2 for token in tokens)
    assert bytes(tokens[0].bytes or []).decode() == tokens[0].token


async def test_a_pair_is_two_choices_with_a_token_and_no_version(stack: Stack) -> None:
    await stack.consent("ann")
    raw = await sync(
        stack,
        lambda client: client.chat.completions.with_raw_response.create(
            model="chat", messages=MESSAGES, user="ann", extra_body={"preference": {"pair": "always"}}
        ),
    )
    answer = raw.parse()
    offer: Any = answer.model_extra or {}
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.message.content for choice in answer.choices)
    assert set(offer["preference"]) == {"pair_id", "token", "expires_at"}
    assert raw.headers["x-tiebreak-pair-id"] == offer["preference"]["pair_id"]
    assert raw.headers["x-tiebreak-pair-token"] == offer["preference"]["token"]
    assert "x-tiebreak-version" not in raw.headers and "x-tiebreak-variant" not in raw.headers
    assert answer.model == "chat" and answer.system_fingerprint is None


async def test_a_streamed_pair_carries_both_choices_and_the_offer_first(stack: Stack) -> None:
    await stack.consent("ann")

    def ask(client: openai.OpenAI) -> list[ChatCompletionChunk]:
        stream = client.chat.completions.create(
            model="chat", messages=MESSAGES, user="ann", stream=True, stream_options={"include_usage": True},
            extra_body={"preference": {"pair": "always"}},
        )  # fmt: skip
        return list(stream)

    chunks = await sync(stack, ask)
    assert set((chunks[0].model_extra or {})["preference"]) == {"pair_id", "token", "expires_at"}
    assert not any((chunk.model_extra or {}).get("preference") for chunk in chunks[1:])
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    for index in (0, 1):
        text = "".join(piece.delta.content or "" for piece in pieces if piece.index == index)
        assert text.startswith(f"{STABLE} says")
        assert [p.finish_reason for p in pieces if p.index == index and p.finish_reason] == ["stop"]
    assert chunks[-1].usage is not None and chunks[-1].choices == []


@pytest.mark.parametrize(
    ("arguments", "error", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model"),
        ({"model": "chat", "tools": [{"type": "function", "function": {"name": "no name"}}]},
         openai.BadRequestError, "tools[0].function.name"),
        ({"model": "chat", "temperature": 9.0}, openai.BadRequestError, "temperature"),
        ({"model": "chat", "extra_body": {"preference": {"pair": "sometimes"}}}, openai.BadRequestError,
         "preference.pair"),
        ({"model": "chat", "user": "ann", "extra_body": {"preference": {"pair": "always"}}},
         openai.PermissionDeniedError, "user"),
    ],
)  # fmt: skip
async def test_a_refusal_is_the_sdks_own_exception(
    stack: Stack, arguments: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as refusal:
        await sync(stack, lambda client: client.chat.completions.create(messages=MESSAGES, **arguments))
    assert refusal.value.param == param


async def test_models_can_be_listed_and_read(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> tuple[dict[str, Any], Any]:
        return {model.id: model for model in client.models.list()}, client.models.retrieve("chat@stable")

    models, stable = await sync(stack, ask)
    assert {"chat", "chat@stable", "chat@base", f"chat@{STABLE}"} <= set(models)
    assert (stable.root, stable.parent, stable.object) == (STABLE, "echo", "model")
    assert models["chat@base"].parent is None
    with pytest.raises(openai.NotFoundError):
        await sync(stack, lambda client: client.models.retrieve("chat@canary"))
