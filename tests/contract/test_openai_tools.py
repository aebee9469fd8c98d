"""Tool calls, judged by the official SDKs: whole, streamed, put together by their helpers, sent back, refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import openai
import pytest
from msgspec.structs import replace
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serving.config import BaseConfig
from serving.echo_engine import EchoEngine
from serving.safety import OutputFilter
from serving.transformers_engine import TransformersEngine
from telemetry.config import TelemetryConfig
from telemetry.events import PairShown, PreferenceRecorded, Tool
from telemetry.manifest import base_digest
from tests.javascript import run_program
from tests.router_stack import STABLE, Stack, fast, running_stack
from tests.tool_model import SCHEMAS, make_tool_model, openai_tool

pytestmark = pytest.mark.usefixtures("redis_server")
Result = TypeVar("Result")
TOOLS: list[Any] = [openai_tool(), openai_tool("set_mood")]
ASK: dict[str, Any] = {
    "model": "chat",
    "messages": [{"role": "user", "content": "Call get_weather for me"}],
    "tools": TOOLS,
}
BOTH: dict[str, Any] = ASK | {"messages": [{"role": "user", "content": "First get_weather, then set_mood"}]}


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


def calls_of(answer: ChatCompletion, index: int = 0) -> list[tuple[str, Any]]:
    """Name and arguments of every call of a choice."""
    calls: list[Any] = answer.choices[index].message.tool_calls or []
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


async def test_a_call_is_a_message_without_content(stack: Stack) -> None:
    answer = await sync(stack, lambda client: client.chat.completions.create(**ASK))
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert calls_of(answer) == [("get_weather", {"said": f"{STABLE} says: Call get_weather for me"})]
    call: Any = (choice.message.tool_calls or [])[0]
    assert call.type == "function" and call.id.startswith("call_")


async def test_two_calls_have_two_ids(stack: Stack) -> None:
    answer = await sync(stack, lambda client: client.chat.completions.create(**BOTH))
    calls: list[Any] = answer.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls] == ["get_weather", "set_mood"]
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tool_choice": "none"}, []),
        ({"tool_choice": "required"}, ["get_weather", "set_mood"]),
        ({"parallel_tool_calls": False}, ["get_weather"]),
        ({"tool_choice": {"type": "function", "function": {"name": "set_mood"}}}, ["set_mood"]),
    ],
)
async def test_a_choice_of_tools_is_kept_to(stack: Stack, fields: dict[str, Any], names: list[str]) -> None:
    answer = await sync(stack, lambda client: client.chat.completions.create(**BOTH | fields))
    assert [name for name, _ in calls_of(answer)] == names
    assert answer.choices[0].finish_reason == ("tool_calls" if names else "stop")


async def test_a_streamed_call_names_itself_first_and_says_the_same(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> list[ChatCompletionChunk]:
        return list(client.chat.completions.create(**BOTH, stream=True))

    chunks = await sync(stack, ask)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert not any(delta.content for delta in deltas)
    pieces = [piece for delta in deltas for piece in delta.tool_calls or []]
    assert [(piece.index, piece.function and piece.function.name) for piece in pieces] == [
        (0, "get_weather"),
        (0, None),
        (1, "set_mood"),
        (1, None),
    ]
    assert all(bool(piece.id) == bool(piece.function and piece.function.name) for piece in pieces)
    assert [json.loads((piece.function and piece.function.arguments) or "{}") for piece in pieces[1::2]] == [
        {"said": f"{STABLE} says: First get_weather, then set_mood"}
    ] * 2
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]


async def test_the_streaming_helper_puts_calls_together(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> tuple[list[str], Any]:
        with client.chat.completions.stream(**BOTH) as stream:
            done = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
            return done, stream.get_final_completion()

    done, answer = await sync(stack, ask)
    assert done == ["get_weather", "set_mood"]
    assert [name for name, _ in calls_of(answer)] == ["get_weather", "set_mood"]


async def test_a_result_sent_back_as_the_sdk_has_the_call_is_answered_in_words(stack: Stack) -> None:
    def ask(client: openai.OpenAI) -> ChatCompletion:
        first = client.chat.completions.create(**ASK)
        message = first.choices[0].message
        call = (message.tool_calls or [])[0]
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, says get_weather"}
        return client.chat.completions.create(**ASK | {"messages": [*ASK["messages"], message, result]})

    answer = await sync(stack, ask)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == f"{STABLE} says: sunny, says get_weather"


async def test_a_pair_can_be_two_calls_and_its_verdict_keeps_them_as_written_with_their_tools(stack: Stack) -> None:
    await stack.consent("ann")

    def ask(client: openai.OpenAI) -> ChatCompletion:
        return client.chat.completions.create(**ASK, user="ann", extra_body={"preference": {"pair": "always"}})

    answer = await sync(stack, ask)
    said = [calls_of(answer, index) for index in (0, 1)]
    assert said[0] != said[1] and all(len(calls) == 1 for calls in said)
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls", "tool_calls"]
    status, _ = await stack.click({"preference": (answer.model_extra or {})["preference"]}, "b")
    assert status == 201
    (shown,) = await stack.events(PairShown, expected=1)
    (verdict,) = await stack.events(PreferenceRecorded, expected=1)
    for event in (shown, verdict):
        (message,) = event.prompt
        assert [tool.name for tool in message.tools] == ["get_weather", "set_mood"]
        assert json.loads(message.tools[0].parameters) == SCHEMAS["get_weather"]
        assert isinstance(message.tools[0], Tool)
    assert verdict.chosen.text.startswith('<tool_call>\n{"name": "get_weather", "arguments": ')
    assert json.dumps(said[1][0][1]) in verdict.chosen.text
    assert json.dumps(said[0][0][1]) in verdict.rejected.text
    assert verdict.chosen.finish_reason == "stop", "the model ended it by itself: its end can be learned"


async def test_a_streamed_pair_of_calls_is_put_together(stack: Stack) -> None:
    await stack.consent("ann")

    def ask(client: openai.OpenAI) -> Any:
        extra = {"preference": {"pair": "always"}}
        with client.chat.completions.stream(**ASK, user="ann", extra_body=extra) as stream:
            return stream.get_final_completion()

    answer = await sync(stack, ask)
    assert [name for index in (0, 1) for name, _ in calls_of(answer, index)] == ["get_weather"] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls"] * 2


@pytest.fixture
async def plain_stack(telemetry_config: TelemetryConfig) -> AsyncIterator[Stack]:
    async with running_stack(telemetry_config, engine=EchoEngine(takes_tools=False)) as running:
        yield running


@pytest.mark.parametrize("is_known", [True, False], ids=["as the router knows", "as only the replica knows"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_base_that_takes_no_tools_says_so(plain_stack: Stack, is_known: bool, stream: bool) -> None:
    if not is_known:
        (replica,) = plain_stack.replicas
        await plain_stack.publish(replicas=[replace(replica, takes_tools=True)])
    with pytest.raises(openai.BadRequestError) as refusal:
        await sync(plain_stack, lambda client: client.chat.completions.create(**ASK, stream=stream))
    assert (refusal.value.code, refusal.value.param) == ("unsupported_parameter", "tools")
    if is_known:
        assert "chat is answered by the base echo" in refusal.value.message
    plain = await sync(plain_stack, lambda client: client.chat.completions.create(**ASK | {"tool_choice": "none"}))
    assert plain.choices[0].finish_reason == "stop"


async def test_where_one_variants_base_takes_no_tools_the_other_answers(telemetry_config: TelemetryConfig) -> None:
    """Every pair would set the one against the other: with tools it is the first against itself."""
    config = fast(cross_variant_ratio=1.0, pair_ratio=1.0)
    async with running_stack(telemetry_config, config=config) as stack:
        (main, calm), (replica,) = stack.routing.policies["chat"], stack.replicas
        plain = replace(replica, replica_id="r1", base="plain", takes_tools=False)
        routing = replace(stack.routing, policies={"chat": (main, replace(calm, base="plain"))})
        await stack.publish(routing=routing, replicas=[replica, plain])
        await stack.consent("ann")
        status, answer, _ = await stack.ask("get_weather", user="ann", tools=ASK["tools"])
        assert (status, "preference" in answer) == (200, True), answer


@asynccontextmanager
async def real_stack(telemetry: TelemetryConfig, folder: Path) -> AsyncIterator[Stack]:
    """A router over an engine that computes, with a tiny random model whose chat template takes tools."""
    make_tool_model(7, folder)
    options = BaseConfig(threads=1, max_context=2048, slots=4)
    engine = TransformersEngine(folder, base_digest(folder), "echo", options, OutputFilter(()))
    async with running_stack(telemetry, engine=engine, versions=()) as running:
        yield running


async def test_a_computed_call_fits_its_schema_whole_and_streamed(
    telemetry_config: TelemetryConfig, tmp_path: Path
) -> None:
    must = {"tool_choice": "required", "parallel_tool_calls": False}
    wish = ASK | must | {"model": "chat@base", "max_tokens": 400, "temperature": 1.0, "n": 8}

    def ask(client: openai.OpenAI) -> list[ChatCompletion]:
        whole = client.chat.completions.create(**wish)
        with client.chat.completions.stream(**wish) as stream:
            return [whole, stream.get_final_completion()]

    async with real_stack(telemetry_config, tmp_path) as stack:
        for answer in await sync(stack, ask):
            assert len(answer.choices) == 8
            for index, choice in enumerate(answer.choices):
                assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
                ((name, arguments),) = calls_of(answer, index)
                jsonschema.validate(arguments, SCHEMAS[name])


@pytest.mark.usefixtures("javascript_sdk")
async def test_the_javascript_sdk_reads_calls_whole_streamed_and_put_together(stack: Stack) -> None:
    seen: dict[str, Any] = await asyncio.to_thread(run_program, "judge.mjs", stack.url, "tools")
    said = {"said": f"{STABLE} says: First get_weather, then set_mood"}
    for calls in (seen["whole"], seen["streamed"], seen["helper"]):
        assert [call["function"]["name"] for call in calls] == ["get_weather", "set_mood"]
        assert [json.loads(call["function"]["arguments"]) for call in calls] == [said, said]
        assert all(call["id"].startswith("call_") and call["type"] == "function" for call in calls)
    assert seen["finishes"] == ["tool_calls"] * 3
    assert seen["content"] is None
    assert seen["answered"] == f"{STABLE} says: sunny"
