"""Tool calls in the form of Hermes and Qwen: ``<tool_call>``, a JSON object with name and arguments, ``</tool_call>``.

``CallReader`` takes a completion's text as it comes and gives what is for reading and whole calls; ``call_grammar`` is
what a completion is held to where calls must come, or must fit. Other forms are left out: a base whose chat template
has one does not take tools here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec

from serving.errors import InvalidRequest
from serving.wire import CalledTool, GenerateRequest
from telemetry.events import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD, TAIL = '\n{"name": %s, "arguments": ', "}\n"
MAX_CALLS = 16  # of one completion that must call
MAX_GRAMMAR_CHARS = 131_072
# spaces only where a person would put one: a small model can else fill its budget with them
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_ARGUMENTS = '{"type": "object"}'
NO_ARGUMENTS = '{"type": "object", "properties": {}, "additionalProperties": false}'


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class CallReader:
    """Splits one completion's text. What is no call of an offered function stays text, and so does a call cut short."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._held = ""  # may still become a call, or the space around one
        self._count = 0

    def push(self, piece: str, *, is_last: bool = False) -> tuple[str, tuple[CalledTool, ...]]:
        """Add ``piece``; what may be read now, and the calls that it completes."""
        self._held += piece
        parts, calls = [], []
        while (begin := self._held.find(OPEN)) >= 0 and (end := self._held.find(CLOSE, begin)) >= 0:
            # the last mark, too: one that the text only speaks of must not swallow the call behind it
            for start in dict.fromkeys((begin, self._held.rfind(OPEN, 0, end))):
                if call := self._call(self._held[start + len(OPEN) : end]):
                    calls.append(call)
                    parts.append(self._held[:start].rstrip())
                    break
            else:
                parts.append(self._held[: end + len(CLOSE)])
            self._held = self._held[end + len(CLOSE) :]
        parts.append(self._harmless(is_last))
        return "".join(parts), tuple(calls)

    def _harmless(self, is_last: bool) -> str:
        """Takes the beginning that cannot belong to a call any more out of what is held."""
        end = len(self._held)
        if is_last:
            text, self._held = self._held, ""
            return "" if self._count and text.isspace() else text
        if (begin := self._held.find(OPEN)) >= 0:
            end = begin
        else:
            end -= next(length for length in range(len(OPEN) - 1, -1, -1) if self._held.endswith(OPEN[:length]))
        end = len(self._held[:end].rstrip())
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _call(self, block: str) -> CalledTool | None:
        try:
            call = msgspec.json.decode(block, type=_Call)
            arguments = bytes(call.arguments)
            is_object = isinstance(msgspec.json.decode(arguments), dict)
        except (msgspec.DecodeError, RecursionError):
            return None
        if call.name not in self._names or not is_object:
            return None
        self._count += 1
        return CalledTool(self._count - 1, call.name, arguments.decode())


def must_hold(request: GenerateRequest) -> bool:
    """Whether the decoding must be held to a grammar for the tools' sake."""
    use = request.tool_use
    if use is None:
        return False
    is_strict = any(tool.is_strict for tool in request.messages[0].tools if tool.name in use.names)
    return use.is_required or not use.is_parallel or is_strict or bool(request.sampling.json_schema)


def call_grammar(request: GenerateRequest, *, are_marks_special: bool) -> str:
    """What the answer must be, in llguidance's Lark. Raises InvalidRequest for one too large.

    Calls that must come fit their function's schema; where text may come instead (JSON, if the request has a schema for
    it), those of strict functions do. ``are_marks_special``: the marks are special tokens, which no text can spell.
    """
    use, schema = request.tool_use, request.sampling.json_schema
    assert use is not None, "only where tools may be used"
    opening, closing = (OPEN, CLOSE) if are_marks_special else (json.dumps(OPEN), json.dumps(CLOSE))
    more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if use.is_parallel else ""
    calls = [f"calls: call{more}", f"call: {opening} body {closing}"]
    if use.is_required:
        rules = ["start: calls", *calls]
    elif schema:
        rules = ["start: calls | json", f"json: %json {_compact(schema)}", *calls]
    else:
        rules = [f"start: {'called* text' if use.is_parallel else 'text | called'}", "text: TEXT", r"TEXT: /(.|\n)*/"]
        # a lazy lexeme ends where the mark first stands: from there on it is a call
        begin = f"begin: TEXT {opening}" if are_marks_special else f"begin[lazy]: TEXT {opening}"
        rules += [begin, f"called: begin body {closing}"]
    tools = [tool for tool in request.messages[0].tools if tool.name in use.names]
    rules.append("body: " + " | ".join(f"body_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        rules.append(f"body_{number}: {_body(tool, is_held=use.is_required or tool.is_strict)}")
    grammar = "\n".join(["%llguidance {}", *rules])
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(f"tools: their schemas have more than {MAX_GRAMMAR_CHARS} characters together")
    return grammar


def _body(tool: Tool, *, is_held: bool) -> str:
    schema = tool.parameters or NO_ARGUMENTS if is_held else ANY_ARGUMENTS
    head = HEAD % json.dumps(tool.name)
    return f"{json.dumps(head)} %json {_compact(schema)} {json.dumps(TAIL)}"


def _compact(schema: str) -> str:
    try:
        document = json.loads(schema)
    except ValueError as error:
        raise InvalidRequest(f"tools: a schema is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest("tools: a schema is a JSON object")
    return json.dumps(document | {"x-guidance": COMPACT})
