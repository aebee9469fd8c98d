"""What a request may say, and how a refusal names the field without repeating the body. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from router.errors import InvalidRequest, UnsupportedParameter
from router.schema import ChatLimits, ChatRequest, VerdictRequest, checked, decode
from serving.wire import ToolUse
from telemetry.events import Message, ToolCall

LIMITS = ChatLimits(default_max_tokens=64, max_tokens=128, max_choices=4)
PLAIN: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}]}
SECRET = "s3cret-words-of-a-user"


F: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def with_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def calling(arguments: str = '{"a": 1}') -> dict[str, Any]:
    """An assistant's message that is one call."""
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def read(**fields: Any) -> ChatRequest:
    return checked(decode(msgspec.json.encode(PLAIN | fields), ChatRequest), LIMITS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", []),
        ("function_call", "auto"),
        ("reasoning_effort", "high"),
        ("service_tier", "flex"),
        ("store", True),
        ("metadata", {"a": "b"}),
        ("modalities", ["audio"]),
        ("prediction", {"type": "content"}),
        ("web_search_options", {}),
        ("best_of", 2),
        ("top_k", 40),
    ],
)
def test_an_unsupported_field_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedParameter) as refusal:
        read(**{field: value})
    assert (refusal.value.status, refusal.value.param) == (400, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("tool_choice", "none"),
        ("store", False),
        ("service_tier", "auto"),
        ("modalities", ["text"]),
    ],
)
def test_an_unsupported_field_that_asks_for_nothing_is_taken(field: str, value: Any) -> None:
    assert read(**{field: value}).model == "chat"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 129}, "max_tokens"),
        ({"max_completion_tokens": 129}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [F, F]}, "tools"),
        ({"tools": [with_parameters({"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [with_parameters({"properties": {}})]}, "tools[0].function.parameters"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "always", "tools": [F]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [F]}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [calling("[1]")]}, "messages[0].tool_calls"),
        ({"messages": [calling('{"a": ')]}, "messages[0].tool_calls"),
        ({"messages": [calling('{"a": ' * 65 + "1" + "}" * 65)]}, "messages[0].tool_calls"),
        ({"messages": [calling(), {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        (
            {"messages": [calling(), {"role": "user", "content": "x", "tool_call_id": "call_1"}]},
            "messages[1].tool_call_id",
        ),
        (
            {"messages": [calling(), {"role": "tool", "content": "x", "tool_call_id": "call_2"}]},
            "messages[1].tool_call_id",
        ),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "call_1"}, calling()]},
            "messages[0].tool_call_id",
        ),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"preference": {"pair": "maybe"}}, "preference.pair"),
        ({"preference": {"pair": "always"}}, "user"),
        ({"preference": {"pair": "always"}, "user": "ann", "n": 2}, "n"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read(**fields)
    assert (refusal.value.status, refusal.value.param) == (400, param)


def test_a_refusal_repeats_nothing_of_the_body() -> None:
    bodies = [
        PLAIN | {"messages": [{"role": SECRET, "content": "x"}]},
        PLAIN | {"messages": SECRET},
        PLAIN | {"response_format": {"type": SECRET}},
        PLAIN | {"tool_choice": SECRET},
        PLAIN | {"tools": [{"type": SECRET, "function": {"name": SECRET}}]},
        PLAIN | {"model": 5, "user": SECRET},
        PLAIN | {"preference": {"pair": SECRET}},
        PLAIN | {SECRET + " " * 90: 1},
    ]
    for body in bodies:
        with pytest.raises(InvalidRequest) as refusal:
            decode(msgspec.json.encode(body), ChatRequest)
        assert SECRET not in msgspec.json.encode(refusal.value.body()).decode()


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"nonsense"])
def test_what_is_no_json_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decode(body, ChatRequest)
    assert refusal.value.code == "invalid_json"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decode(b'{"model": "chat"}', ChatRequest)
    assert (refusal.value.code, refusal.value.param) == ("missing_required_parameter", "messages")


def test_both_names_of_the_token_limit_mean_the_same() -> None:
    assert read(max_tokens=9).max_tokens == read(max_completion_tokens=9).max_tokens == 9
    assert read().max_tokens == 64


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    request = read(messages=[{"role": "user", "content": parts}])
    assert request.prompt()[0].content == "Hello"


@pytest.mark.parametrize(
    ("fields", "use"),
    [
        ({}, ToolUse(("f", "g"))),
        ({"tool_choice": "auto"}, ToolUse(("f", "g"))),
        ({"tool_choice": "required"}, ToolUse(("f", "g"), is_required=True)),
        ({"parallel_tool_calls": False}, ToolUse(("f", "g"), is_parallel=False)),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            ToolUse(("g",), is_required=True, is_parallel=False),
        ),
    ],
)
def test_how_tools_may_be_used_reaches_the_replica(fields: dict[str, Any], use: ToolUse) -> None:
    request = read(tools=[F, {"type": "function", "function": {"name": "g"}}], **fields)
    assert request.tool_use == use
    assert [tool.name for tool in request.prompt()[0].tools] == ["f", "g"]


def test_a_model_hears_nothing_of_tools_that_it_must_not_call() -> None:
    request = read(tools=[F], tool_choice="none")
    assert request.tool_use is None
    assert request.prompt() == (Message("user", "Hello"),)


def test_tools_go_with_the_first_message_and_keep_the_order_of_their_schemas() -> None:
    parameters = {"type": "object", "properties": {"b": {}, "a": {}}, "required": ["b"]}
    first, second = read(tools=[with_parameters(parameters)], messages=PLAIN["messages"] * 2).prompt()
    assert [list(msgspec.json.decode(tool.parameters)["properties"]) for tool in first.tools] == [["b", "a"]]
    assert second.tools == ()


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_message_of_every_role_is_read_as_that_role(role: str) -> None:
    assert read(messages=[{"role": role, "content": "x", "name": "ann"}]).prompt() == (Message(role, "x", "ann"),)  # type: ignore[arg-type]


def test_calls_and_their_results_are_read_back() -> None:
    result = {"role": "tool", "content": [{"type": "text", "text": "sunny"}], "tool_call_id": "call_1"}
    _, called, came = read(messages=[*PLAIN["messages"], calling(), result]).prompt()
    assert called == Message("assistant", "", tool_calls=(ToolCall("call_1", "f", '{"a": 1}'),))
    assert came == Message("tool", "sunny", tool_call_id="call_1")


def test_an_answer_can_be_sent_back_as_the_sdk_dumps_it() -> None:
    dumped = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    assert read(messages=[dumped, *PLAIN["messages"]]).prompt()[0].content == "Hi"


@pytest.mark.parametrize("field", ["choice", "token", "pair_id"])
def test_a_verdict_needs_pair_token_and_choice(field: str) -> None:
    whole = {"pair_id": "p", "token": "t", "choice": "a"}
    with pytest.raises(InvalidRequest) as refusal:
        decode(msgspec.json.encode({name: value for name, value in whole.items() if name != field}), VerdictRequest)
    assert refusal.value.param == field


@pytest.mark.parametrize("extra", [{"choice": "c"}, {"quality": 6}, {"reasons": ["x"] * 17}, {"source": "import"}])
def test_a_verdict_out_of_bounds_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        decode(msgspec.json.encode({"pair_id": "p", "token": "t", "choice": "a"} | extra), VerdictRequest)


def test_a_response_format_becomes_the_schema_that_the_engine_holds() -> None:
    wanted = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted, "strict": True}}
    read_format = read(response_format=form).response_format
    assert read_format is not None
    assert msgspec.json.decode(read_format.schema_text) == wanted
    for kind, text in (("json_object", '{"type":"object"}'), ("text", "")):
        plain = read(response_format={"type": kind}).response_format
        assert plain is not None
        assert plain.schema_text == text


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"preference": {"pair": "maybe"}}, '"always", "auto", "never"'),
        ({"tool_choice": "must"}, '"auto", "none", "required"'),
        ({"messages": [{"role": "usr", "content": "x"}]}, '"system", "developer", "user", "assistant", "tool"'),
        ({"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}, '"text"'),
        ({"response_format": {"type": "xml"}}, '"text", "json_object", "json_schema"'),
    ],
)
def test_a_value_that_is_not_supported_is_told_which_are(change: dict[str, Any], allowed: str) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "x"}]} | change
    with pytest.raises(InvalidRequest) as refusal:
        decode(msgspec.json.encode(body), ChatRequest)
    assert f"one of the supported values: {allowed} (field" in str(refusal.value)
