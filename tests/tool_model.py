"""A tiny random model whose chat template takes tools, as Qwen 2.5's does, word for word where the tools are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.models import make_tiny
from telemetry.events import Message, Tool

TEMPLATE = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'Be helpful.' }}{%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rom"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
MOOD: dict[str, Any] = {
    "type": "object",
    "properties": {"mood": {"enum": ["calm", "lively"]}},
    "required": ["mood"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "set_mood": MOOD}


def make_tool_model(seed: int, folder: Path) -> None:
    """``make_tiny`` with this template."""
    make_tiny(seed, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def tool(name: str = "get_weather", *, is_strict: bool = False) -> Tool:
    """A function whose arguments are few enough for a model of noise."""
    return Tool(name, f"Says it: {name}.", json.dumps(SCHEMAS[name]), is_strict)


def offered(*tools: Tool, text: str = "Hello there") -> tuple[Message, ...]:
    """A prompt that offers ``tools``."""
    return (Message("user", text, tools=tools),)


def openai_tool(name: str = "get_weather", *, strict: bool = False) -> dict[str, Any]:
    """The same as a client sends it."""
    function = {"name": name, "description": f"Says it: {name}.", "parameters": SCHEMAS[name], "strict": strict}
    return {"type": "function", "function": function}
