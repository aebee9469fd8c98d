"""Wire records of the HTTP API: answers as OpenAI's clients read them, and our own."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from telemetry.events import Choice
from telemetry.receipts import Stage


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


class FunctionCallOut(msgspec.Struct, frozen=True):
    """In a stream the name comes first, then the arguments."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallOut(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCallOut


class AssistantMessage(msgspec.Struct, frozen=True):
    """``content`` is null where there is nothing to read but calls to make."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: tuple[ToolCallOut, ...] | UnsetType = UNSET


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


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallOut


class Delta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: tuple[ToolCallDelta, ...] | UnsetType = UNSET


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
