"""An answer as it grows: how it ends, and what its event says of that. No I/O."""

from __future__ import annotations

import pytest

from router.answers import FunctionCallOut
from router.arms import Arm
from router.exchange import Answer
from serving.wire import CalledTool, Chunk, Sampling

VERSION = "v000001-aaaaaaaa"


def ended(**fields: object) -> Answer:
    arm = Arm(variant="main", base="small", version=VERSION, channel="stable", temperature=0.7, top_p=0.95)
    answer = Answer("c", arm, Sampling(8), started_s=1.0)
    answer.take(Chunk(0, VERSION, **({"text": "Hello"} | fields)), 2.0)  # type: ignore[arg-type]
    return answer


@pytest.mark.parametrize(
    ("error", "code"), [("deadline_exceeded", "deadline_exceeded"), ("shutting_down", "shutting_down")]
)
def test_an_answer_that_was_cut_says_why(error: str, code: str) -> None:
    failure = ended(finish_reason="cancelled", error=error).failure
    assert failure is not None
    assert failure.code == code


def test_a_call_is_the_clients_and_its_text_the_events() -> None:
    text = 'So: <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    made = CalledTool(0, "f", '{"a": 1}')
    answer = ended(text=text, content="So:", tool_calls=(made,), finish_reason="stop")
    message = answer.message()
    assert message.content == "So:"
    assert isinstance(message.tool_calls, tuple)
    assert message.tool_calls[0].function == FunctionCallOut("f", '{"a": 1}')
    assert answer.client_finish_reason() == "tool_calls"
    assert (answer.completion().text, answer.completion().finish_reason) == (text, "stop")


def test_calls_alone_leave_no_content() -> None:
    answer = ended(text="<tool_call>", content="", tool_calls=(CalledTool(0, "f", "{}"),), finish_reason="stop")
    assert answer.message().content is None


def test_an_answer_cut_behind_a_call_says_length() -> None:
    answer = ended(text="x", content="", tool_calls=(CalledTool(0, "f", "{}"),), finish_reason="length")
    assert answer.client_finish_reason() == "length"


def test_an_event_tells_a_filtered_answer_from_one_that_ended() -> None:
    assert ended(finish_reason="stop").completion().finish_reason == "stop"
    assert ended(finish_reason="stop", is_unsafe=True).completion().finish_reason == "content_filter"
