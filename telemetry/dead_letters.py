"""Entries that no consumer could interpret, as the store keeps them, and their way back into the log.

A letter is replayed by reading it with the build that is here now: what a newer build wrote, or what lay in the wrong
topic, becomes the event that it is and goes to that event's topic. It keeps its event_id: once the store holds that, or
its user took the verdict back, it is not replayed any more.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from telemetry.event_log import EventLog, Position
from telemetry.events import (
    DEAD_LETTERS,
    PREFERENCES,
    TOPIC_OF,
    AnyEvent,
    DeadLetter,
    InvalidEvent,
    PreferenceRecorded,
    PreferenceRetracted,
    decode,
    encode,
    key_of,
)
from telemetry.store import read


class Letter(msgspec.Struct, frozen=True):
    """One dead letter. ``topic``, ``partition`` and ``offset`` say where the entry lay that could not be read."""

    id: str
    topic: str
    partition: int
    offset: int
    reason: str
    payload: bytes
    recorded_at: datetime


class LetterUnknown(LookupError):
    """No dead letter, or more than one, is called that; `tiebreak dlq list` names them."""

    def __str__(self) -> str:
        return f"{self.args[0]!r}: {self.__doc__}"


def letters(store_root: str | Path) -> list[Letter]:
    """Every dead letter in the store, oldest first."""
    columns = ["event_id", "source_topic", "source_partition", "source_offset", "reason", "payload", "recorded_at"]
    is_letter = pc.field("type") == DeadLetter.__name__
    rows = read(store_root, DEAD_LETTERS, columns=columns, wanted=is_letter).to_pylist()
    found = [Letter(*(row[column] for column in columns)) for row in rows]
    return sorted(found, key=lambda letter: (letter.recorded_at, letter.topic, letter.offset))


def named(dead: list[Letter], letter_id: str) -> Letter:
    """The one called ``letter_id``, or by a beginning of it that is no other's. Raises LetterUnknown."""
    found = [each for each in dead if each.id.startswith(letter_id)]
    if len(found) != 1:
        raise LetterUnknown(letter_id)
    return found[0]


def stored(store_root: str | Path, events: list[AnyEvent]) -> set[str]:
    """The event_ids of those of ``events`` that the store holds."""
    by_topic: dict[str, list[str]] = {}
    for event in events:
        by_topic.setdefault(TOPIC_OF[type(event)], []).append(event.event_id)
    return {
        found
        for topic, ids in by_topic.items()
        for found in read(store_root, topic, columns=["event_id"], wanted=_is_in("event_id", ids))[
            "event_id"
        ].to_pylist()
    }


def retracted(store_root: str | Path, events: list[AnyEvent]) -> set[str]:
    """The event_ids of those verdicts among ``events`` that were taken back."""
    ids = [event.event_id for event in events if isinstance(event, PreferenceRecorded)]
    wanted = (pc.field("type") == PreferenceRetracted.__name__) & _is_in("preference_id", ids)
    return set(read(store_root, PREFERENCES, columns=["preference_id"], wanted=wanted)["preference_id"].to_pylist())


def _is_in(column: str, ids: list[str]) -> Any:
    return pc.field(column).isin(pa.array(ids, pa.string()))


def revived(dead: Letter) -> AnyEvent:
    """The event that this build reads in the letter. Raises InvalidEvent where it reads none."""
    event = decode(dead.payload)
    if isinstance(event, DeadLetter):
        raise InvalidEvent("a dead letter of a dead letter stays one")
    return event


def replay(log: EventLog, event: AnyEvent) -> Position:
    """Append a revived event to its own topic, and wait until it is durable. Raises LogUnavailable."""
    return log.append(TOPIC_OF[type(event)], key_of(event), encode(event)).result()
