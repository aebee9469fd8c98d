"""What became of a verdict: one Redis hash per preference, written by events, read by whoever clicked.

``tiebreak:receipt:<preference_id>`` holds pair_id, user, accepted_at, durable, stored_at, batch, trained_at, version,
live_at, dropped_at, reason, retracted_at (times ISO 8601, UTC). Every field is written once and never changed, so
events may be projected again and in another order. The router writes only what it acknowledges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import redis

from telemetry.events import (
    AnyEvent,
    BatchTrained,
    PreferenceRecorded,
    PreferenceRetracted,
    ReleaseChanged,
    VersionPublished,
)

RECEIPT_KEY: Final = "tiebreak:receipt:"
LINEAGE_KEY: Final = "tiebreak:lineage:"  # version → hash: parent, variant, live_at
TAUGHT_KEY: Final = "tiebreak:taught:"  # version → set: preferences it learned since its parent
LIVE_STATES: Final = frozenset({"canary", "stable"})
MAX_ANCESTORS: Final = 100_000  # a longer chain means a cycle


class Stage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step of a verdict's way. ``stage``: accepted, stored, trained, live, dropped or retracted."""

    stage: str
    at: str  # ISO 8601, UTC
    durable: str = ""  # accepted: "log" or "outbox"
    batch: str = ""  # trained
    version: str = ""  # live
    reason: str = ""  # dropped


def receipt_key(preference_id: str) -> str:
    """The Redis key of one receipt."""
    return RECEIPT_KEY + preference_id


def timeline(fields: Mapping[Any, Any]) -> list[Stage]:
    """The stages that a receipt's hash (bytes or text) tells of, in their order in time."""
    texts = {_text(name): _text(value) for name, value in fields.items()}
    details = {
        "accepted": {"durable": texts.get("durable", "log")},
        "stored": {},
        "trained": {"batch": texts.get("batch", "")},
        "live": {"version": texts.get("version", "")},
        "dropped": {"reason": texts.get("reason", "")},
        "retracted": {},
    }
    stages = [Stage(name, texts[f"{name}_at"], **detail) for name, detail in details.items() if f"{name}_at" in texts]
    return sorted(stages, key=lambda stage: datetime.fromisoformat(stage.at))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


class Receipts:
    """Projects events onto receipts. Remembers in Redis up to where, so that nothing is left out after a crash."""

    PROGRESS_KEY: Final = "tiebreak:receipts:next"  # hash: topic/partition → next offset to project

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def progress(self) -> dict[str, int]:
        """``topic/partition`` → next offset to project."""
        found: dict[Any, Any] = self._client.hgetall(self.PROGRESS_KEY)
        return {_text(name): int(offset) for name, offset in found.items()}

    def project(self, events: Iterable[tuple[AnyEvent, datetime]], progress: Mapping[str, int]) -> None:
        """Write what ``events`` (each with the time it was stored) say, then the new ``progress``."""
        pipeline = self._client.pipeline(transaction=False)
        for event, stored_at in events:
            if isinstance(event, ReleaseChanged):
                pipeline.execute()  # what it refers to has to be there
                self._release(event)
            else:
                _note(pipeline, event, stored_at)
        if progress:
            pipeline.hset(self.PROGRESS_KEY, mapping={name: str(offset) for name, offset in progress.items()})
        pipeline.execute()

    def _release(self, event: ReleaseChanged) -> None:
        """A version that users meet makes its verdicts live, and those of every ancestor not yet live."""
        if event.state not in LIVE_STATES:
            return
        version, at = event.version, _iso(event.occurred_at)
        for _ in range(MAX_ANCESTORS):
            parent, is_live = self._client.hmget(LINEAGE_KEY + version, "parent", "live_at")
            if not parent or is_live:
                return
            members: Any = self._client.smembers(TAUGHT_KEY + version)
            pipeline = self._client.pipeline(transaction=False)
            for member in members:
                _set(pipeline, _text(member), live_at=at, version=event.version)
            pipeline.hset(LINEAGE_KEY + version, "live_at", at)  # last: after a crash all of it is done again
            pipeline.execute()
            version = _text(parent)


def _note(pipeline: Any, event: AnyEvent, stored_at: datetime) -> None:
    match event:
        case PreferenceRecorded():
            accepted_at = _iso(event.occurred_at)
            fields = {"pair_id": event.pair_id, "user": event.user, "accepted_at": accepted_at, "durable": "log"}
            _set(pipeline, event.event_id, **fields, stored_at=_iso(stored_at))
        case PreferenceRetracted():
            _set(pipeline, event.preference_id, retracted_at=_iso(event.occurred_at))
        case BatchTrained():
            trained_at = _iso(event.occurred_at)
            for preference_id in event.preference_ids:
                _set(pipeline, preference_id, batch=event.batch_id, trained_at=trained_at)
            for preference_id, reason in event.dropped:
                _set(pipeline, preference_id, dropped_at=trained_at, reason=reason)
        case VersionPublished():
            lineage = {"parent": event.parent, "variant": event.variant}
            pipeline.hset(LINEAGE_KEY + event.version, mapping=lineage)
            if event.preference_ids:
                pipeline.sadd(TAUGHT_KEY + event.version, *event.preference_ids)
        case _:
            pass


def _set(pipeline: Any, preference_id: str, **fields: str) -> None:
    for name, value in fields.items():
        pipeline.hsetnx(receipt_key(preference_id), name, value)


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat()
