"""``tiebreak dlq``: entries of the event log that could not be read, and their way back into it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from deploy import audit
from telemetry.config import TelemetryConfig, open_log
from telemetry.dead_letters import Letter, letters, named, replay, retracted, revived, stored
from telemetry.event_log import EventLog
from telemetry.events import AnyEvent, InvalidEvent

State = Literal["unreadable", "replayable", "in the store", "retracted"]


class Judged(NamedTuple):
    """A letter, and what this build makes of it."""

    letter: Letter
    state: State
    event: AnyEvent | None  # None: it is unreadable
    why: str  # it is


def judged(store: str, dead: list[Letter]) -> list[Judged]:
    """Each letter with what can be done about it now."""
    read = [_read(each) for each in dead]
    events = [event for event, _ in read if event is not None]
    known, taken_back = stored(store, events), retracted(store, events)
    return [
        Judged(each, _state(event, known, taken_back), event, why)
        for each, (event, why) in zip(dead, read, strict=True)
    ]


def _read(dead: Letter) -> tuple[AnyEvent | None, str]:
    try:
        return revived(dead), ""
    except InvalidEvent as error:
        return None, str(error)


def _state(event: AnyEvent | None, known: set[str], taken_back: set[str]) -> State:
    if event is None:
        return "unreadable"
    if event.event_id in taken_back:
        return "retracted"
    return "in the store" if event.event_id in known else "replayable"


def show_all(config: TelemetryConfig, console: Console) -> int:
    """One line a letter, then how many there are of each kind; 0."""
    found = judged(config.store_root, letters(config.store_root))
    table = Table(
        *(Column(name, no_wrap=name != "reason") for name in ("id", "at", "from", "state", "reason")), box=None
    )
    for dead, state, _, _ in found:
        source = f"{dead.topic}/{dead.partition}@{dead.offset}"
        table.add_row(dead.id, dead.recorded_at.isoformat(timespec="seconds"), source, state, dead.reason)
    if found:
        console.print(table)
    kinds = Counter(each.state for each in found)
    console.print(", ".join(f"{count} {state}" for state, count in kinds.items()) or "no dead letters")
    return 0


def show_one(config: TelemetryConfig, letter_id: str) -> int:
    """Why it could not be read, on standard error, and the entry as it is, on standard output. Raises LetterUnknown."""
    dead = named(letters(config.store_root), letter_id)
    audit.record(config, "read", f"dead letter {dead.id}")
    print(f"{dead.topic}, partition {dead.partition}, offset {dead.offset}: {dead.reason}", file=sys.stderr)
    sys.stdout.buffer.write(dead.payload + b"\n")
    return 0


def replay_some(config: TelemetryConfig, letter_ids: list[str]) -> int:
    """Put these letters (none: all that can be) back into the log; 1 if one of them could not be.

    Raises LetterUnknown, and LogUnavailable where the log takes nothing.
    """
    every = letters(config.store_root)
    found = judged(config.store_root, [named(every, each) for each in letter_ids] or every)
    wanted = [each for each in found if letter_ids or each.state == "replayable"]
    if wanted:
        audit.record(config, "replayed", "dead letters", ids=" ".join(each.letter.id for each in wanted))
    log = open_log(config)
    try:
        for each in wanted:
            print(f"{each.letter.id}  {_replay_one(log, each)}")
    finally:
        log.close()
    if not wanted:
        print("nothing to replay: `tiebreak dlq list` says why", file=sys.stderr)
    return 1 if any(each.state == "unreadable" for each in wanted) else 0


def _replay_one(log: EventLog, found: Judged) -> str:
    """What became of it."""
    if found.event is None:
        return f"this build cannot read it either: {found.why}"
    name = f"{type(found.event).__name__} {found.event.event_id}"
    if found.state == "in the store":
        return f"is in the store already, as {name}"
    if found.state == "retracted":
        return f"stays: its user took {name} back"
    position = replay(log, found.event)
    return f"{name} → {position.topic}/{position.partition}@{position.offset}"
