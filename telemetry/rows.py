"""The preference store's tables: their columns, and how an event becomes a row. Pure.

One table per topic, so that one commit holds the rows and the log offsets they end at. Every row ends with the whole
event as JSON; the columns before it are there for SQL.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

import msgspec
import pyarrow as pa  # type: ignore[import-untyped]

from telemetry.conversation import conversation
from telemetry.event_log import Entry
from telemetry.events import (
    AUDIT,
    COMPLETIONS,
    DEAD_LETTERS,
    FEEDBACK,
    PAIRS,
    PREFERENCES,
    VERSIONS,
    AnyEvent,
    AuditRecorded,
    BatchTrained,
    CompletionServed,
    DeadLetter,
    FeedbackRecorded,
    Message,
    PairShown,
    PersonErased,
    PreferenceRecorded,
    PreferenceRetracted,
    ReleaseChanged,
    VersionPublished,
)

TABLE_OF: Final = {
    PAIRS: "pairs",
    PREFERENCES: "preferences",
    FEEDBACK: "feedback",
    COMPLETIONS: "completions",
    VERSIONS: "versions",
    DEAD_LETTERS: "dead_letters",
    AUDIT: "audit",
}

Row = dict[str, Any]
_TIME: Final = pa.timestamp("us", tz="UTC")


def _schema(**columns: str) -> pa.Schema:
    """``columns`` between what every table begins and ends with."""
    types = {
        "text": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "time": _TIME,
        "texts": pa.list_(pa.string()), "bytes": pa.binary(),
    }  # fmt: skip
    first = {"event_id": "text", "type": "text", "occurred_at": "time", "recorded_at": "time", "trace_id": "text"}
    last = {"topic": "text", "partition": "int", "offset": "int", "event": "text"}
    return pa.schema([(name, types[kind]) for name, kind in (first | columns | last).items()])


SCHEMAS: Final[dict[str, pa.Schema]] = {
    "pairs": _schema(
        pair_id="text", request_id="text", policy="text", user="text", cohort="text", prompt="text",
        a_text="text", a_variant="text", a_version="text", b_text="text", b_variant="text", b_version="text",
        propensity="float", expires_at="time", cluster="text",
    ),
    "preferences": _schema(
        preference_id="text", pair_id="text", policy="text", user="text", cohort="text", source="text",
        labeler="text", outcome="text", prompt="text", chosen_text="text", chosen_variant="text",
        chosen_version="text", rejected_text="text", rejected_variant="text", rejected_version="text",
        chosen_position="text", propensity="float", shown_at="time", decided_s="float", reasons="texts",
        comment="text", quality="int", edited="text", instructions="text", cluster="text",
    ),
    "feedback": _schema(
        completion_id="text", policy="text", user="text", prompt="text", completion_text="text", variant="text",
        version="text", rating="int", comment="text",
    ),
    "completions": _schema(
        completion_id="text", request_id="text", pair_id="text", policy="text", variant="text", version="text",
        channel="text", finish_reason="text", error="text", prompt_tokens="int", completion_tokens="int",
        ttft_s="float", duration_s="float", repetition_ratio="float", mean_logp="float", is_unsafe="bool",
    ),
    "versions": _schema(
        variant="text", version="text", parent="text", base="text", digest="text", uri="text", step="int",
        batch_id="text", state="text", stable="text", reason="text", actor="text", preference_ids="texts",
        replayed_ids="texts", oldest_verdict_at="time", metrics="text",
    ),
    "dead_letters": _schema(
        source_topic="text", source_partition="int", source_offset="int", reason="text", payload="bytes"
    ),
    "audit": _schema(
        actor="text", action="text", subject="text", details="text", number="int", previous="text", hash="text"
    ),
}  # fmt: skip


def row_of(event: AnyEvent, entry: Entry, recorded_at: datetime) -> Row:
    """The row that ``event``, read as ``entry``, is in its topic's table; columns it has no value for are absent."""
    return {
        "event_id": event.event_id,
        "type": type(event).__name__,
        "occurred_at": event.occurred_at,
        "recorded_at": recorded_at,
        "trace_id": event.trace_id,
        **_COLUMNS[type(event)](event),
        "topic": entry.position.topic,
        "partition": entry.position.partition,
        "offset": entry.position.offset,
        "event": entry.payload.decode(errors="replace"),
    }


def _same(event: AnyEvent, *names: str) -> Row:
    return {name: getattr(event, name) for name in names}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _prompt(messages: tuple[Message, ...]) -> str:
    return _json(conversation(messages))


def _texts(event: PairShown | PreferenceRecorded | FeedbackRecorded, **texts: Any) -> Row:
    """Columns of what people read and wrote; none of a sealed event."""
    return {} if event.sealed else {"prompt": _prompt(event.prompt), **texts}


def _pair(event: PairShown) -> Row:
    return {
        **_same(event, "pair_id", "request_id", "policy", "user", "cohort", "propensity", "expires_at", "cluster"),
        **_texts(event, a_text=event.a.text, b_text=event.b.text),
        "a_variant": event.a.variant, "a_version": event.a.version,
        "b_variant": event.b.variant, "b_version": event.b.version,
    }  # fmt: skip


def _preference(event: PreferenceRecorded) -> Row:
    chosen, rejected = event.chosen, event.rejected
    names = (
        "pair_id", "policy", "user", "cohort", "source", "labeler", "instructions", "outcome", "chosen_position",
        "propensity", "shown_at", "decided_s", "quality", "cluster",
    )  # fmt: skip
    return {
        **_same(event, *names),
        "preference_id": event.event_id,
        **_texts(
            event, chosen_text=chosen.text, rejected_text=rejected.text, reasons=list(event.reasons),
            comment=event.comment, edited=event.edited,
        ),
        "chosen_variant": chosen.variant, "chosen_version": chosen.version,
        "rejected_variant": rejected.variant, "rejected_version": rejected.version,
    }  # fmt: skip


def _feedback(event: FeedbackRecorded) -> Row:
    return {
        **_same(event, "completion_id", "policy", "user", "rating"),
        **_texts(event, completion_text=event.completion.text, comment=event.comment),
        "variant": event.completion.variant,
        "version": event.completion.version,
    }


def _completion(event: CompletionServed) -> Row:
    return _same(
        event, "completion_id", "request_id", "pair_id", "policy", "variant", "version", "channel", "finish_reason",
        "error", "prompt_tokens", "completion_tokens", "ttft_s", "duration_s", "repetition_ratio", "mean_logp",
        "is_unsafe",
    )  # fmt: skip


def _batch(event: BatchTrained) -> Row:
    row = _same(event, "batch_id", "variant", "step")
    ids = {"preference_ids": list(event.preference_ids), "replayed_ids": list(event.replayed_ids)}
    return {**row, **ids, "metrics": _json(event.metrics)}


def _version(event: VersionPublished) -> Row:
    row = _same(event, "variant", "version", "parent", "base", "digest", "uri", "step", "oldest_verdict_at")
    return {**row, "preference_ids": list(event.preference_ids), "metrics": _json(event.metrics)}


def _release(event: ReleaseChanged) -> Row:
    row = _same(event, "variant", "version", "state", "stable", "reason", "actor")
    return {**row, "metrics": _json(event.evidence)}


def _dead_letter(event: DeadLetter) -> Row:
    source = {"source_topic": event.topic, "source_partition": event.partition, "source_offset": event.offset}
    return {**source, "reason": event.reason, "payload": event.payload}


_COLUMNS: Final[dict[type[Any], Callable[[Any], Row]]] = {
    PairShown: _pair,
    PreferenceRecorded: _preference,
    PersonErased: lambda event: _same(event, "user"),
    PreferenceRetracted: lambda event: _same(event, "preference_id", "pair_id", "user"),
    FeedbackRecorded: _feedback,
    CompletionServed: _completion,
    BatchTrained: _batch,
    VersionPublished: _version,
    ReleaseChanged: _release,
    DeadLetter: _dead_letter,
    AuditRecorded: lambda event: {**_same(event, "actor", "action", "subject"), "details": _json(event.details)},
}
