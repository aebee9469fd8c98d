"""What of a growing text is for reading and what is a call, whatever the pieces; and what a grammar lets through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import AddedToken, AutoTokenizer

from serving.errors import InvalidRequest
from serving.prompts import PromptEncoder
from serving.shaping import Guides
from serving.tool_calls import CLOSE, MAX_CALLS, OPEN, CallReader, call_grammar, must_hold
from serving.wire import CalledTool, GenerateRequest, Sampling, ToolUse
from telemetry.events import Tool
from tests.tool_model import offered, tool

NAMES = ("get_weather", "set_mood")


def call(name: str = "get_weather", arguments: str = '{"city": "Bern", "days": 3}') -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def read(text: str, step: int) -> tuple[str, list[CalledTool]]:
    """All that a reader makes of ``text`` in pieces of ``step`` characters."""
    reader = CallReader(NAMES)
    pieces = [text[i : i + step] for i in range(0, len(text), step)]
    out = [reader.push(piece) for piece in pieces] + [reader.push("", is_last=True)]
    return "".join(content for content, _ in out), [one for _, calls in out for one in calls]


BERN = CalledTool(0, "get_weather", '{"city": "Bern", "days": 3}')
CALM = CalledTool(1, "set_mood", '{"mood": "calm"}')
TEXTS: dict[str, tuple[str, str, list[CalledTool]]] = {  # text, what is read of it, calls
    "a call": (call(), "", [BERN]),
    "text before it": ("Let me look.\n" + call(), "Let me look.", [BERN]),
    "text behind it": (call() + "\nDone.", "\nDone.", [BERN]),
    "two calls": (call() + "\n" + call("set_mood", '{"mood": "calm"}') + "\n", "", [BERN, CALM]),
    "on one line": (call().replace("\n", ""), "", [BERN]),
    "arguments first": (
        '<tool_call>{"arguments": {"mood": "calm"}, "name": "set_mood"}</tool_call>',
        "",
        [CalledTool(0, "set_mood", '{"mood": "calm"}')],
    ),
    "no arguments": (
        '<tool_call>\n{"name": "set_mood"}\n</tool_call>',
        "",
        [CalledTool(0, "set_mood", "{}")],
    ),
    "plain text": ("Just < text <tool_ and </tool_call> more \n", "Just < text <tool_ and </tool_call> more \n", []),
    "an unknown function": (call("format_disk"), call("format_disk"), []),
    "no JSON": ("So: <tool_call>\nhm\n</tool_call>", "So: <tool_call>\nhm\n</tool_call>", []),
    "arguments that are no object": (call(arguments='"x"'), call(arguments='"x"'), []),
    "a call cut short": ("So: " + call()[:-5], "So: " + call()[:-5], []),
    "one broken, one whole": (call("no") + " " + call(), call("no"), [BERN]),
    "a mark that is only spoken of": ("Use <tool_call> like so: " + call(), "Use <tool_call> like so:", [BERN]),
    "nothing": ("", "", []),
}


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_read_the_same_in_pieces_of_any_size(name: str, step: int) -> None:
    text, content, calls = TEXTS[name]
    assert read(text, step) == (content, calls)


def test_text_is_not_held_back_for_longer_than_it_could_be_a_call() -> None:
    reader = CallReader(NAMES)
    assert reader.push("Hello <tool") == ("Hello", ())
    assert reader.push("box> there ") == (" <toolbox> there", ())
    assert reader.push("", is_last=True) == (" ", ())


def test_a_call_comes_out_with_the_piece_that_completes_it() -> None:
    reader = CallReader(NAMES)
    assert reader.push(call()[:-1]) == ("", ())
    assert reader.push(">") == ("", (BERN,))


def asked(*tools: Tool, schema: str = "", **use: Any) -> GenerateRequest:
    fields = {"names": tuple(tool.name for tool in tools)} | use
    sampling = Sampling(max_tokens=9, json_schema=schema)
    return GenerateRequest("r", "v", offered(*tools), sampling, tool_use=ToolUse(**fields))


@pytest.fixture(scope="module")
def words(tiny_model: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return tokenizer, from_tokenizer(tokenizer)


def lets_through(words: Any, grammar: str, text: str) -> bool:
    tokenizer, vocabulary = words
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


CALM_CALL = call("set_mood", '{"mood": "calm"}')
MISFIT = call(arguments='{"city": "Paris"}')
BOTH = (tool(), tool("set_mood"))


@pytest.mark.parametrize(
    ("request_", "through", "kept_out"),
    [
        (
            asked(*BOTH, is_required=True),
            [call(), f"{call()}\n{CALM_CALL}", "\n".join([call()] * MAX_CALLS)],
            ["", "Hello", MISFIT, "Hello " + call(), call()[:-5], "\n".join([call()] * (MAX_CALLS + 1))],
        ),
        (asked(*BOTH, is_required=True, is_parallel=False), [call(), CALM_CALL], [f"{call()}\n{CALM_CALL}"]),
        (
            asked(*BOTH, names=("set_mood",), is_required=True, is_parallel=False),
            [CALM_CALL],
            [call(), "Hello"],
        ),
        (
            asked(tool(is_strict=True), tool("set_mood")),
            ["", "Hello < there", call(), f"So: {call()}\n{CALM_CALL} Done.", call("set_mood", '{"any": [1, 2]}')],
            [MISFIT, "So: " + MISFIT, call("format_disk")],
        ),
        (asked(*BOTH, is_parallel=False), ["Hello", call(), "So: " + call()], [f"{call()}\n{CALM_CALL}"]),
        (
            asked(*BOTH, schema='{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
            ['{"a": 5}', call(), f"{call()}\n{CALM_CALL}"],
            ["Hello", '{"a": "b"}', MISFIT.replace('"Paris"', "5") + "x"],
        ),
        (
            asked(Tool("now"), is_required=True),
            [call("now", "{}")],
            [call("now", '{"a": 1}')],
        ),
    ],
    ids=["required", "required once", "named", "strict", "once", "or JSON", "no parameters"],
)
def test_a_grammar_lets_through_what_fits_and_nothing_else(
    words: Any, request_: GenerateRequest, through: list[str], kept_out: list[str]
) -> None:
    assert must_hold(request_)
    grammar = call_grammar(request_, are_marks_special=False)
    assert [text for text in through if not lets_through(words, grammar, text)] == []
    assert [text for text in kept_out if lets_through(words, grammar, text)] == []


def test_nothing_is_held_where_functions_are_only_offered() -> None:
    assert not must_hold(asked(*BOTH))
    assert not must_hold(GenerateRequest("r", "v", offered(), Sampling(max_tokens=9)))


def test_only_the_strict_functions_that_may_be_called_count() -> None:
    assert not must_hold(asked(tool(is_strict=True), tool("set_mood"), names=("set_mood",)))


def test_schemas_too_large_for_a_grammar_are_refused() -> None:
    large = json.dumps({"type": "object", "description": "x" * 200_000})
    with pytest.raises(InvalidRequest, match="tools"):
        call_grammar(asked(Tool("large", "", large), is_required=True), are_marks_special=False)


@pytest.mark.parametrize("special", [False, True])
def test_marks_that_are_tokens_of_their_own_are_seen_and_held_to(tiny_model: Path, special: bool) -> None:
    """Qwen's marks are added tokens that count as text; other tokenizers have them as special tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens([AddedToken(mark, special=special) for mark in (OPEN, CLOSE)], special_tokens=special)
    (opening,) = tokenizer.encode(OPEN, add_special_tokens=False)
    ids = tokenizer.encode("So: " + call(), add_special_tokens=False)
    assert opening in ids
    assert PromptEncoder(tokenizer, None).decode([1, *ids, 2]) == "So: " + call()
    matcher = Guides(tokenizer, len(tokenizer)).guide(asked(tool(is_strict=True)))
    assert matcher is not None
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()
