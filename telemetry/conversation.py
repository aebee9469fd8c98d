"""A prompt in the words of transformers' chat templates: training renders exactly what serving rendered. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from telemetry.events import Message, Tool
from telemetry.text import text_cluster


def conversation(prompt: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as ``apply_chat_template`` takes them; a call's arguments as an object, which templates expect."""
    return [_message(message) for message in prompt]


def tools_of(prompt: Sequence[Message]) -> list[dict[str, Any]] | None:
    """The ``tools`` of ``apply_chat_template``; None where the model is offered none."""
    offered = prompt[0].tools if prompt else ()
    return [_tool(tool) for tool in offered] or None


def needs_tools(prompt: Sequence[Message]) -> bool:
    """Whether only a template that knows tools can render ``prompt``."""
    return any(message.tools or message.tool_calls or message.role == "tool" for message in prompt)


def _message(message: Message) -> dict[str, Any]:
    words: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        words["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": msgspec.json.decode(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        words["tool_call_id"] = message.tool_call_id
    return words


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = msgspec.json.decode(tool.parameters)
    return {"type": "function", "function": function}


def prompt_cluster(prompt: Sequence[Message]) -> str:
    """The cluster of similar questions that a prompt belongs to, by its last message of a user."""
    asked = next((message.content for message in reversed(prompt) if message.role == "user"), "")
    return text_cluster(asked)
