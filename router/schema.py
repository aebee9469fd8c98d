"""Wire records of the HTTP API: requests as clients send them, answers as OpenAI's clients read them.

Requests forbid unknown fields; known but unsupported ones (``NEUTRAL_ONLY``) take only the value that asks
for nothing. Checks that one field's type cannot express are in ``checked`` functions.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from router.errors import InvalidRequest, UnsupportedParameter, invalid_body
from telemetry.events import Message
from telemetry.receipts import Stage

Text = Annotated[str, Meta(max_length=262_144)]
Short = Annotated[str, Meta(min_length=1, max_length=256)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
TokenId = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
StopText = Annotated[str, Meta(min_length=1, max_length=256)]
Choice = Literal["a", "b", "tie", "both_bad", "skip"]
PairWish = Literal["auto", "always", "never"]
MAX_SCHEMA_DEPTH: Final = 64


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a message; text is the only kind that is supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message; fields typed null are what OpenAI's clients send back of an earlier answer."""

    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: Text | tuple[TextPart, ...]
    name: Short | None = None
    refusal: None = None
    annotations: Annotated[tuple[Any, ...], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    tool_call_id: None = None

    def message(self) -> Message:
        """The message with its parts joined."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, text, self.name)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class PreferenceWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether this answer may or must be a pair."""

    pair: PairWish = "auto"


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
    user: Short | None = None
    preference: PreferenceWish | None = None
    # known to OpenAI's clients, not supported: only the value that asks for nothing
    audio: None = None
    function_call: None = None
    functions: None = None
    metadata: None = None
    modalities: Annotated[tuple[Literal["text"], ...], Meta(max_length=1)] | None = None
    parallel_tool_calls: None = None
    prediction: None = None
    reasoning_effort: None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none"] | None = None
    tools: Annotated[tuple[Any, ...], Meta(max_length=0)] | None = None
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
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


_NEUTRAL_NAMES: Final = (
    "audio function_call functions metadata modalities parallel_tool_calls "
    "prediction reasoning_effort service_tier store tool_choice tools "
    "verbosity web_search_options refusal annotations tool_calls tool_call_id"
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
    return msgspec.structs.replace(request, max_tokens=tokens, max_completion_tokens=tokens)


def _refuse(message: str, param: str) -> None:
    raise InvalidRequest(f"{message[0].upper()}{message[1:]}.", param=param, code="invalid_value")


class VerdictRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/preferences``. ``user``, where given, must be the one whom the pair was shown to."""

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


class TopLogprobOut(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: tuple[int, ...]


class LogprobOut(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: tuple[int, ...]
    top_logprobs: tuple[TopLogprobOut, ...]


class ChoiceLogprobs(msgspec.Struct, frozen=True):
    content: tuple[LogprobOut, ...]
    refusal: None = None


class AssistantMessage(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChoiceOut(msgspec.Struct, frozen=True):
    index: int
    message: AssistantMessage
    finish_reason: str
    logprobs: ChoiceLogprobs | None = None


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PairOffer(msgspec.Struct, frozen=True):
    """What is needed to judge a pair; versions stay hidden until then."""

    pair_id: str
    token: str
    expires_at: datetime


class StreamedPair(msgspec.Struct, frozen=True, kw_only=True):
    """A stream's word on its pair: the offer in the first piece; or, last, that one side failed.

    ``is_void`` means that no verdict is possible and the other side is a normal answer, of that version.
    """

    pair_id: str
    token: str | UnsetType = UNSET
    expires_at: datetime | UnsetType = UNSET
    is_void: bool | UnsetType = UNSET
    variant: str | UnsetType = UNSET
    version: str | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer. ``system_fingerprint`` is the version of a single answer, null for a pair."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: tuple[ChoiceOut, ...]
    usage: Usage
    system_fingerprint: str | None = None
    preference: PairOffer | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One server-sent piece of an answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    system_fingerprint: str | None = None
    usage: Usage | UnsetType | None = UNSET
    preference: StreamedPair | UnsetType = UNSET


class Model(msgspec.Struct, frozen=True):
    """One entry of ``/v1/models``: ``root`` is what it resolves to now, ``parent`` an adapter's base."""

    id: str
    created: int
    root: str
    parent: str | None
    object: Literal["model"] = "model"
    owned_by: str = "tiebreak"


class ModelList(msgspec.Struct, frozen=True):
    data: tuple[Model, ...]
    object: Literal["list"] = "list"


class ConsentState(msgspec.Struct, frozen=True):
    pairing: bool
    updated_at: datetime | None
    object: Literal["consent"] = "consent"


class Revealed(msgspec.Struct, frozen=True):
    """Which version a side was, told after the verdict."""

    variant: str
    version: str
    channel: str


class RevealedPair(msgspec.Struct, frozen=True):
    a: Revealed
    b: Revealed


class Links(msgspec.Struct, frozen=True):
    self: str


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a verdict: it is durable, and can be followed."""

    id: str
    object: Literal["preference"] = "preference"
    pair_id: str
    status: str
    choice: Choice
    accepted_at: datetime
    durable: str  # "log", or "outbox": on this machine's disk until the log is back
    replayed: bool
    revealed: RevealedPair
    links: Links


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /v1/preferences/{id}``: how far the verdict has come."""

    id: str
    object: Literal["preference"] = "preference"
    pair_id: str
    status: str
    choice: Choice | None
    stages: tuple[Stage, ...]
    revealed: RevealedPair | None


class FeedbackReceipt(msgspec.Struct, frozen=True):
    id: str
    completion_id: str
    rating: int
    accepted_at: datetime
    object: Literal["feedback"] = "feedback"


class Health(msgspec.Struct, frozen=True):
    status: Literal["live", "ready", "not_ready"]
    missing: tuple[str, ...] = ()  # what is not there yet


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
        raise invalid_body(error, NEUTRAL_ONLY) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("The body is not UTF-8.", code="invalid_json") from error
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deep.", code="invalid_json") from error
    return record
