"""What a chat template is asked to render, and whether it can render tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from serving.errors import UnsupportedTools
from serving.prompts import PromptEncoder
from telemetry.events import Message, ToolCall
from tests.tool_model import TEMPLATE, offered, tool

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_RESULTS = TEMPLATE.replace("{{- message.content }}\n        {{- '\\n</tool_response>' }}", "")
OTHER_FORM = TEMPLATE.replace("tool_call>", "function_call>")
TALK = (
    *offered(tool(), text="How is Bern?"),
    Message("assistant", "", tool_calls=(ToolCall("call_1", "get_weather", '{"city": "Bern", "days": 2}'),)),
    Message("tool", "sunny", tool_call_id="call_1"),
)


def encoder(model: Path, template: str) -> PromptEncoder:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer, None)


@pytest.mark.parametrize(
    ("template", "takes_tools"),
    [
        (TEMPLATE, True),
        (SMOLLM2, False),
        (NO_RESULTS, False),
        (OTHER_FORM, False),
        ("{{ raise_exception('no') }}", False),
    ],
    ids=["Qwen 2.5", "SmolLM2", "no results", "another form of calls", "nothing at all"],
)
def test_a_template_takes_tools_if_it_renders_them_and_their_calls_and_results(
    tiny_model: Path, template: str, takes_tools: bool
) -> None:
    assert encoder(tiny_model, template).takes_tools == takes_tools


def test_a_template_without_tools_refuses_each_part_of_a_conversation_with_them(tiny_model: Path) -> None:
    prompts = encoder(tiny_model, SMOLLM2)
    for messages in (TALK[:1], (Message("user", "Hi"), TALK[1]), (Message("user", "Hi"), TALK[2])):
        with pytest.raises(UnsupportedTools):
            prompts.encode(messages)


def test_tools_calls_and_results_stand_in_the_prompt_as_the_model_was_taught(tiny_model: Path) -> None:
    prompts = encoder(tiny_model, TEMPLATE)
    text = prompts.decode(prompts.encode(TALK))
    assert '{"type": "function", "function": {"name": "get_weather", "description": "Says it: get_weather.", ' in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>' in text
    assert "<tool_response>\nsunny\n</tool_response>" in text
