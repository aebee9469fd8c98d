"""Every event contract and topic: the arrows of the circle, one frozen record each.

Fields are only ever added, with defaults; a breaking change is a new topic ``….v2``. Records are
msgspec structs, tagged by ``type``; on the wire they are JSON. Text in an event is what we served,
never what a client claims. ``a``/``b`` positions end at ``router/preferences.py``; after it the words
are chosen and rejected.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from telemetry.randomness import random_bytes

PAIRS: Final = "tiebreak.pairs.v1"
PREFERENCES: Final = "tiebreak.preferences.v1"
FEEDBACK: Final = "tiebreak.feedback.v1"
COMPLETIONS: Final = "tiebreak.completions.v1"
VERSIONS: Final = "tiebreak.versions.v1"
DEAD_LETTERS: Final = "tiebreak.dead-letters.v1"
AUDIT: Final = "tiebreak.audit.v1"
TOPICS: Final = (PAIRS, PREFERENCES, FEEDBACK, COMPLETIONS, VERSIONS, DEAD_LETTERS, AUDIT)

Choice = Literal["a", "b", "tie", "both_bad", "skip"]
Outcome = Literal["chosen_rejected", "tie", "both_bad", "skip"]
LabelSource = Literal["end_user", "labeler", "judge", "import", "simulated"]
Role = Literal["system", "user", "assistant", "tool", "developer"]
Channel = Literal["base", "stable", "canary", "shadow", "pinned"]


def utc_now() -> datetime:
    """The current time, aware, UTC."""
    return datetime.now(UTC)


def new_id() -> str:
    """A UUIDv7 (RFC 9562 §5.7) as text: ordered by time, unique across processes."""
    ms = time.time_ns() // 1_000_000
    bits = (ms << 80) | int.from_bytes(random_bytes(10), "big")
    bits = (bits & ~(0xF << 76)) | (0x7 << 76)
    bits = (bits & ~(0x3 << 62)) | (0x2 << 62)
    text = f"{bits:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function that the model was told it may call."""

    name: str
    description: str = ""
    parameters: str = ""  # JSON schema of its arguments, as text in the client's own order
    is_strict: bool = False  # its arguments are held to the schema, not only described by it


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A call that the assistant made earlier in a conversation."""

    id: str
    name: str
    arguments: str  # JSON text of an object


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One chat message of a prompt. Templates read it by ``telemetry.conversation``, in serving and in training."""

    role: Role
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()  # of role assistant
    tool_call_id: str | None = None  # of role tool: the call that this is the result of
    tools: tuple[Tool, ...] = ()  # on a prompt's first message only: what the whole prompt was rendered with


class Completion(msgspec.Struct, frozen=True):
    """One answer of exactly one version, as served. A tool call is in ``text`` as the model wrote it."""

    completion_id: str
    text: str
    variant: str
    version: str
    channel: Channel
    finish_reason: str  # stop | length | cancelled | error
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    duration_s: float
    temperature: float
    top_p: float
    seed: int | None = None
    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()  # log-probs of token_ids under the serving version (behaviour policy)
    is_clipped: bool = False  # ended by a stop string of the request, not by the model
    reference: str = ""  # the base version that reference_logps are of
    reference_logps: tuple[float, ...] = ()  # of token_ids, then of the end where the model ended it; may be missing


class Sealed(msgspec.Struct, frozen=True):
    """The texts of an event, encrypted with the key of its ``user`` (telemetry/sealing.py)."""

    key_id: str
    data: bytes


class Event(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """What every event carries."""

    event_id: str = msgspec.field(default_factory=new_id)
    occurred_at: datetime = msgspec.field(default_factory=utc_now)
    schema_version: int = 1
    trace_id: str = ""  # 32 hex digits, W3C trace context
    span_id: str = ""  # 16 hex digits: parent for spans that continue this trace


class PairShown(Event, frozen=True, tag=True, kw_only=True):
    """Two completions to one prompt were shown to one opted-in user (topic PAIRS, key pair_id)."""

    pair_id: str
    request_id: str
    policy: str
    user: str  # pseudonym (keyed hash), never the client's id
    prompt: tuple[Message, ...]
    a: Completion
    b: Completion
    propensity: float  # probability with which this (unordered) pair of arms was drawn
    cohort: str = "default"
    expires_at: datetime | None = None
    cluster: str = ""  # of similar prompts: a keyed hash, the same for each of them
    sealed: Sealed | None = None  # prompt and the sides' words, which then are empty


class PreferenceRecorded(Event, frozen=True, tag=True, kw_only=True):
    """A verdict, whole in itself (topic PREFERENCES, key pair_id). Its event_id is the preference id.

    For ``chosen_rejected`` the words mean what they say; for tie, both_bad and skip ``chosen`` is
    position a and ``rejected`` position b, and no learner may read a preference into it.
    """

    pair_id: str
    policy: str
    user: str
    prompt: tuple[Message, ...]
    chosen: Completion
    rejected: Completion
    outcome: Outcome
    chosen_position: Literal["a", "b", ""]  # "" unless outcome is chosen_rejected
    propensity: float
    shown_at: datetime
    decided_s: float  # seconds from shown to verdict
    source: LabelSource = "end_user"
    labeler: str = ""
    instructions: str = ""  # version of the task's instructions that a labeler had
    labeled_at: datetime | None = None  # of an imported label: when it was given there; occurred_at is the import
    cohort: str = "default"
    reasons: tuple[str, ...] = ()
    comment: str = ""
    quality: int | None = None
    edited: str | None = None  # what the user would have preferred to read
    cluster: str = ""  # as the pair has it
    sealed: Sealed | None = None  # prompt, the sides' words, reasons, comment and edited, which then are empty


class PreferenceRetracted(Event, frozen=True, tag=True, kw_only=True):
    """The user took the verdict back (topic PREFERENCES, key pair_id): excluded if not yet trained on."""

    preference_id: str
    pair_id: str
    user: str


class PersonErased(Event, frozen=True, tag=True, kw_only=True):
    """A person is forgotten: their key is gone, no text of theirs can be read (topic PREFERENCES, key user)."""

    user: str
    actor: str


class FeedbackRecorded(Event, frozen=True, tag=True, kw_only=True):
    """A thumb on a single answer (topic FEEDBACK, key completion_id)."""

    completion_id: str
    policy: str
    user: str
    prompt: tuple[Message, ...]
    completion: Completion
    rating: Literal[1, -1]
    comment: str = ""
    sealed: Sealed | None = None  # prompt, the completion's words and comment, which then are empty


class CompletionServed(Event, frozen=True, tag=True, kw_only=True):
    """One answer went out, or failed: numbers only, no text (topic COMPLETIONS, key completion_id)."""

    completion_id: str
    request_id: str
    policy: str
    variant: str
    version: str
    channel: Channel
    pair_id: str = ""
    finish_reason: str
    error: str = ""  # error code, empty when all is well
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float = 0.0
    duration_s: float = 0.0
    repetition_ratio: float = 0.0  # see telemetry.text.repetition_ratio
    mean_logp: float = 0.0  # mean log-prob of the sampled tokens
    is_unsafe: bool = False


class BatchTrained(Event, frozen=True, tag=True, kw_only=True):
    """One optimizer step has been taken on these verdicts (topic VERSIONS, key variant)."""

    batch_id: str  # variant/step, zero-padded
    variant: str
    step: int
    preference_ids: tuple[str, ...]  # trained on for the first time
    replayed_ids: tuple[str, ...] = ()  # trained on again
    traces: tuple[tuple[str, str], ...] = ()  # (trace_id, span_id) of those verdicts
    dropped: tuple[tuple[str, str], ...] = ()  # (preference_id, reason)
    metrics: dict[str, float] = {}


class VersionPublished(Event, frozen=True, tag=True, kw_only=True):
    """Immutable weights stand in the version store, whole and signed (topic VERSIONS, key variant)."""

    variant: str
    version: str
    parent: str
    base: str
    digest: str
    uri: str  # folder of the version
    step: int
    preference_ids: tuple[str, ...]  # trained on since the parent version
    oldest_verdict_at: datetime | None = None  # for retrain latency
    metrics: dict[str, float] = {}  # offline evaluation, what the gate reads
    dataset: str = ""  # id of the data set that it was made of; "" where it learned from the stream


class ReleaseChanged(Event, frozen=True, tag=True, kw_only=True):
    """The release controller moved a version (topic VERSIONS, key variant)."""

    variant: str
    version: str
    state: Literal["gated", "rejected", "shadow", "canary", "stable", "rolled_back", "superseded"]
    stable: str  # the variant's stable version after this change
    reason: str
    actor: str = "controller"
    evidence: dict[str, float] = {}


class DeadLetter(Event, frozen=True, tag=True, kw_only=True):
    """An entry that no consumer may interpret: kept whole, counted, replayable (topic DEAD_LETTERS)."""

    topic: str
    partition: int
    offset: int
    reason: str
    payload: bytes


class AuditRecorded(Event, frozen=True, tag=True, kw_only=True):
    """Somebody read, exported, changed or deleted something (topic AUDIT). Never a text, never a client's user id."""

    actor: str  # the caller's name at the router, user@host of a command
    action: str  # exported, imported, dataset_created, erased, consent_changed, promote_ordered, rollback_ordered …
    subject: str  # of what, or whom (pseudonym)
    details: dict[str, str] = {}


AnyEvent = (
    PairShown
    | PreferenceRecorded
    | PreferenceRetracted
    | PersonErased
    | FeedbackRecorded
    | CompletionServed
    | BatchTrained
    | VersionPublished
    | ReleaseChanged
    | DeadLetter
    | AuditRecorded
)
TOPIC_OF: Final[dict[type[Any], str]] = {
    PairShown: PAIRS,
    PreferenceRecorded: PREFERENCES,
    PreferenceRetracted: PREFERENCES,
    PersonErased: PREFERENCES,
    FeedbackRecorded: FEEDBACK,
    CompletionServed: COMPLETIONS,
    BatchTrained: VERSIONS,
    VersionPublished: VERSIONS,
    ReleaseChanged: VERSIONS,
    DeadLetter: DEAD_LETTERS,
    AuditRecorded: AUDIT,
}

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


class InvalidEvent(ValueError):
    """The payload is not an event this build knows: keep it in the dead-letter topic."""


def encode(event: AnyEvent) -> bytes:
    """The event as JSON bytes."""
    return _encoder.encode(event)


def decode_from(topic: str, payload: bytes) -> AnyEvent:
    """``decode`` for what was read from ``topic``; an event of another topic is no valid entry there either."""
    event = decode(payload)
    if TOPIC_OF[type(event)] != topic:
        raise InvalidEvent(f"{type(event).__name__} belongs to {TOPIC_OF[type(event)]}")
    return event


def decode(payload: bytes) -> AnyEvent:
    """The event in ``payload``; raises InvalidEvent for anything malformed, unknown or of a newer schema."""
    try:
        event = _decoder.decode(payload)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidEvent(f"not a known event: {error}") from error
    if event.schema_version != 1:
        raise InvalidEvent(f"schema_version {event.schema_version} is newer than this build knows (1)")
    return event


def key_of(event: AnyEvent) -> str:
    """The log key: entries with one key stay in order."""
    match event:
        case PairShown() | PreferenceRecorded() | PreferenceRetracted():
            return event.pair_id
        case PersonErased():
            return event.user
        case FeedbackRecorded() | CompletionServed():
            return event.completion_id
        case BatchTrained() | VersionPublished() | ReleaseChanged():
            return event.variant
        case AuditRecorded():
            return event.actor
        case DeadLetter():
            return f"{event.topic}/{event.partition}"
