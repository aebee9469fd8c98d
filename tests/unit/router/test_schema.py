"""What a request may say, and how a refusal names the field without repeating the body. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from router.errors import InvalidRequest, UnsupportedParameter
from router.schema import ChatLimits, ChatRequest, VerdictRequest, checked, decode

LIMITS = ChatLimits(default_max_tokens=64, max_tokens=128, max_choices=4)
PLAIN: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}]}
SECRET = "s3cret-words-of-a-user"


def read(**fields: Any) -> ChatRequest:
    return checked(decode(msgspec.json.encode(PLAIN | fields), ChatRequest), LIMITS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto"),
        ("functions", []),
        ("parallel_tool_calls", True),
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
    assert request.messages[0].message().content == "Hello"


def test_an_answer_can_be_sent_back_as_the_sdk_dumps_it() -> None:
    dumped = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    assert read(messages=[dumped, *PLAIN["messages"]]).messages[0].message().content == "Hi"


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
