"""Wire records of the HTTP API: requests as clients send them. What is answered is in ``router/answers.py``.

Requests forbid unknown fields; known but unsupported ones (``NEUTRAL_ONLY``) take only the value that asks
for nothing. Checks that one field's type cannot express are in ``checked`` functions.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from router.errors import InvalidRequest, UnsupportedParameter, invalid_body
from serving.wire import ToolUse
from telemetry.events import Choice, Message, Role, Tool, ToolCall

Text = Annotated[str, Meta(max_length=262_144)]
Short = Annotated[str, Meta(min_length=1, max_length=256)]
FunctionName = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
TokenId = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Cohort = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,32}$")]
PairWish = Literal["auto", "always", "never"]
MAX_SCHEMA_DEPTH: Final = 64


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a message; text is the only kind that is supported."""

    type: Literal["text"]
    text: Text


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``arguments`` is the JSON text of an object, as it was answered."""

    name: FunctionName
    arguments: Text


class MadeCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call of an earlier answer, sent back. ``index`` is what streams carry, and is not needed."""

    id: Short
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None

    def call(self) -> ToolCall:
        """The call as events and templates have it."""
        return ToolCall(self.id, self.function.name, self.function.arguments or "{}")


Content = Text | tuple[TextPart, ...]
Nothing = Annotated[tuple[Any, ...], Meta(max_length=0)] | None


class _Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", kw_only=True):
    """A message of role system, developer or user; fields typed null are what some clients send with every message."""

    content: Content
    name: Short | None = None
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    tool_call_id: None = None


class SystemMessage(_Said, frozen=True, tag="system"):
    pass


class DeveloperMessage(_Said, frozen=True, tag="developer"):
    pass


class UserMessage(_Said, frozen=True, tag="user"):
    pass


class EarlierAnswer(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="assistant", kw_only=True
):
    """An answer as OpenAI's clients send it back; calls can stand in place of content."""

    content: Content | None = None
    name: Short | None = None
    tool_calls: Annotated[tuple[MadeCall, ...], Meta(max_length=128)] | None = None
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_call_id: None = None


class ToolResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role", tag="tool", kw_only=True):
    """What came of an earlier answer's call."""

    content: Content
    tool_call_id: Short
    name: Short | None = None


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | EarlierAnswer | ToolResult


def message_of(said: ChatMessage, tools: tuple[Tool, ...] = ()) -> Message:
    """The message as events and templates have it, its parts joined; ``tools`` go with a prompt's first."""
    content = said.content or ""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    calls = tuple(made.call() for made in said.tool_calls or ()) if isinstance(said, EarlierAnswer) else ()
    return Message(_ROLES[type(said)], text, said.name, calls, said.tool_call_id, tools)


_ROLES: Final[dict[type[Any], Role]] = {
    SystemMessage: "system",
    DeveloperMessage: "developer",
    UserMessage: "user",
    EarlierAnswer: "assistant",
    ToolResult: "tool",
}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class PreferenceWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether this answer may or must be a pair, and which group of users its verdict counts for."""

    pair: PairWish = "auto"
    cohort: Cohort = "default"


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Free text."""

    @property
    def schema_text(self) -> str:
        return ""


class JsonObjectFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""

    @property
    def schema_text(self) -> str:
        return '{"type":"object"}'


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``schema`` is always enforced: ``strict`` changes nothing."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
    schema: dict[str, Any] = {}
    description: str | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        if not _is_flat(self.schema, MAX_SCHEMA_DEPTH):
            raise ValueError(f"A schema has at most {MAX_SCHEMA_DEPTH} levels")


def _is_flat(document: Any, levels: int) -> bool:
    """Whether ``document`` has at most ``levels`` levels. Without recursion, which is what deep ones exhaust."""
    layer = [document]
    for _ in range(levels):
        inner = (value.values() if isinstance(value, dict) else value for value in layer)
        layer = [value for values in inner for value in values if isinstance(value, dict | list)]
        if not layer:
            return True
    return False


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON of the given schema."""

    json_schema: NamedSchema

    @property
    def schema_text(self) -> str:
        return msgspec.json.encode(self.json_schema.schema).decode()


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that may be called. ``strict`` holds its arguments to ``parameters`` even where no call must come."""

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        if not _is_flat(self.parameters or {}, MAX_SCHEMA_DEPTH):
            raise ValueError(f"A schema has at most {MAX_SCHEMA_DEPTH} levels")

    def tool(self) -> Tool:
        """The function as events and templates have it."""
        schema = msgspec.json.encode(self.parameters).decode() if self.parameters else ""
        return Tool(self.name, self.description or "", schema, bool(self.strict))


class FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: Function
    type: Literal["function"]


class FunctionRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: FunctionName


class FunctionChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """This function must be called, once."""

    function: FunctionRef
    type: Literal["function"]


class ChatRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    model: Short
    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1, max_length=1024)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    stop: StopText | Annotated[tuple[StopText, ...], Meta(max_length=4)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=300)] | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    tools: Annotated[tuple[FunctionTool, ...], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    user: Short | None = None
    preference: PreferenceWish | None = None
    # known to OpenAI's clients, not supported: only the value that asks for nothing
    audio: None = None
    function_call: None = None
    functions: None = None
    metadata: None = None
    modalities: Annotated[tuple[Literal["text"], ...], Meta(max_length=1)] | None = None
    prediction: None = None
    reasoning_effort: None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    verbosity: None = None
    web_search_options: None = None

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def pair_wish(self) -> PairWish:
        return self.preference.pair if self.preference else "auto"

    @property
    def cohort(self) -> str:
        return self.preference.cohort if self.preference else "default"

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def tool_use(self) -> ToolUse | None:
        """How the offered functions may be used; None where none is offered, or none may be called."""
        if not self.tools or self.tool_choice == "none":
            return None
        if isinstance(self.tool_choice, FunctionChoice):
            return ToolUse((self.tool_choice.function.name,), is_required=True, is_parallel=False)
        names = tuple(tool.function.name for tool in self.tools)
        is_parallel = self.parallel_tool_calls is not False
        return ToolUse(names, is_required=self.tool_choice == "required", is_parallel=is_parallel)

    def prompt(self) -> tuple[Message, ...]:
        """What the model is to read; of tools that must not be called it hears nothing."""
        tools = tuple(tool.function.tool() for tool in self.tools or ()) if self.tool_use else ()
        first, *others = self.messages
        return (message_of(first, tools), *map(message_of, others))


_NEUTRAL_NAMES: Final = (
    "audio function_call functions metadata modalities prediction reasoning_effort "
    "service_tier store verbosity web_search_options refusal annotations"
)
NEUTRAL_ONLY: Final = frozenset(_NEUTRAL_NAMES.split())


class ChatLimits(msgspec.Struct, frozen=True):
    """What a deployment allows; see RouterConfig."""

    default_max_tokens: int
    max_tokens: int
    max_choices: int


def checked(request: ChatRequest, limits: ChatLimits) -> ChatRequest:
    """``request`` with ``max_tokens`` settled; raises InvalidRequest where fields contradict each other."""
    low, high = request.max_tokens, request.max_completion_tokens
    if low is not None and high is not None and low != high:
        _refuse("max_tokens and max_completion_tokens differ: send one of them", "max_tokens")
    tokens = high if high is not None else low if low is not None else limits.default_max_tokens
    if tokens > limits.max_tokens:
        param = "max_completion_tokens" if high is not None else "max_tokens"
        _refuse(f"at most {limits.max_tokens} tokens are allowed", param)
    if (request.n or 1) > limits.max_choices:
        _refuse(f"at most {limits.max_choices} choices are allowed", "n")
    if request.top_logprobs and not request.logprobs:
        _refuse("top_logprobs needs logprobs: true", "top_logprobs")
    if request.stream_options is not None and not request.is_stream:
        _refuse("stream_options needs stream: true", "stream_options")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        raise UnsupportedParameter(param="stream_options.include_obfuscation")
    if request.pair_wish == "always":
        if not request.user:
            _refuse("a pair needs the user whom it is shown to", "user")
        if (request.n or 1) > 1:
            _refuse("a pair has two choices of its own: leave n out", "n")
    _check_tools(request)
    _check_messages(request.messages)
    return msgspec.structs.replace(request, max_tokens=tokens, max_completion_tokens=tokens)


def _check_tools(request: ChatRequest) -> None:
    names = [tool.function.name for tool in request.tools or ()]
    choice = request.tool_choice
    if not names and choice not in (None, "none"):
        _refuse("tool_choice needs tools", "tool_choice")
    if not names and request.parallel_tool_calls is not None:
        _refuse("parallel_tool_calls needs tools", "parallel_tool_calls")
    if len(set(names)) < len(names):
        _refuse("two functions have the same name", "tools")
    if isinstance(choice, FunctionChoice) and choice.function.name not in names:
        _refuse("tool_choice names a function that is not in tools", "tool_choice")
    for number, tool in enumerate(request.tools or ()):
        parameters = tool.function.parameters
        if parameters and parameters.get("type") != "object":
            _refuse('parameters are a JSON schema of "type": "object"', f"tools[{number}].function.parameters")


def _check_messages(messages: tuple[ChatMessage, ...]) -> None:
    """Raise InvalidRequest for an answer that says and calls nothing, or a result that no call asked for."""
    called: set[str] = set()
    for number, message in enumerate(messages):
        if isinstance(message, ToolResult) and message.tool_call_id not in called:
            _refuse("no call before this message has this id", f"messages[{number}].tool_call_id")
        if not isinstance(message, EarlierAnswer):
            continue
        if message.content is None and not message.tool_calls:
            param = f"messages[{number}].content"
            raise InvalidRequest(f"The field {param} is required.", param=param, code="missing_required_parameter")
        for call in message.tool_calls or ():
            if not _is_object(call.function.arguments or "{}"):
                words = f"a call's arguments are the JSON text of an object of at most {MAX_SCHEMA_DEPTH} levels"
                _refuse(words, f"messages[{number}].tool_calls")
            called.add(call.id)


def _is_object(text: str) -> bool:
    """Whether ``text`` is a JSON object that a template can walk through."""
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return isinstance(document, dict) and _is_flat(document, MAX_SCHEMA_DEPTH)


def _refuse(message: str, param: str) -> None:
    raise InvalidRequest(f"{message[0].upper()}{message[1:]}.", param=param, code="invalid_value")


class VerdictRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/preferences``. ``user``, where given, must be the one whom the pair was shown to.

    ``labeler`` says who judged it, if that was another person; only a keyed hash of it is written.
    """

    pair_id: Annotated[str, Meta(min_length=1, max_length=64)]
    token: Annotated[str, Meta(min_length=1, max_length=1024)]
    choice: Choice
    reasons: Annotated[tuple[Short, ...], Meta(max_length=16)] | None = None
    comment: Annotated[str, Meta(max_length=4096)] | None = None
    quality: Annotated[int, Meta(ge=1, le=5)] | None = None
    edited: Annotated[str, Meta(max_length=32_768)] | None = None
    user: Short | None = None
    source: Literal["end_user", "labeler", "judge", "simulated"] = "end_user"
    labeler: Annotated[str, Meta(max_length=128)] | None = None


class FeedbackRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/feedback``: a thumb on a single answer. ``completion_id`` is the answer's ``id``."""

    completion_id: Annotated[str, Meta(min_length=1, max_length=128)]
    rating: Literal[1, -1]
    comment: Annotated[str, Meta(max_length=4096)] | None = None
    user: Short | None = None


class Consent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``PUT /v1/users/{user}/consent``."""

    pairing: bool


class ReleaseOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/releases/{version}/{promote|rollback}``; ``force`` skips guards that can be skipped."""

    force: bool = False
    reason: Annotated[str, Meta(max_length=512)] = ""


# answers


Body = TypeVar("Body", bound=msgspec.Struct)
_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {}


def decode(body: bytes, cls: type[Body]) -> Body:
    """``body`` as ``cls``; raises InvalidRequest that names the field."""
    decoder = _decoders.get(cls)
    if decoder is None:
        decoder = _decoders[cls] = msgspec.json.Decoder(cls)
    try:
        record: Body = decoder.decode(body)
    except msgspec.DecodeError as error:
        raise invalid_body(error, cls, NEUTRAL_ONLY) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("The body is not UTF-8.", code="invalid_json") from error
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deep.", code="invalid_json") from error
    return record
