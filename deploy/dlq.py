"""``tiebreak dlq``: entries of the event log that could not be read, and their way back into it."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Literal

from rich.console import Console
from rich.table import Column, Table

from telemetry.config import TelemetryConfig, open_log
from telemetry.dead_letters import Letter, letter, letters, replay, revived, stored
from telemetry.event_log import EventLog
from telemetry.events import AnyEvent, InvalidEvent

State = Literal["unreadable", "replayable", "in the store"]


def judged(store: str, dead: list[Letter]) -> list[tuple[Letter, AnyEvent | None, State]]:
    """Each letter with the event that this build reads in it, if any, and what can be done about it."""
    events = [_event(each) for each in dead]
    known = stored(store, [event for event in events if event is not None])
    return [(each, event, _state(event, known)) for each, event in zip(dead, events, strict=True)]


def _event(dead: Letter) -> AnyEvent | None:
    try:
        return revived(dead)
    except InvalidEvent:
        return None


def _state(event: AnyEvent | None, known: set[str]) -> State:
    if event is None:
        return "unreadable"
    return "in the store" if event.event_id in known else "replayable"


def show_all(config: TelemetryConfig, console: Console) -> int:
    """One line a letter, then how many there are of each kind; 0."""
    found = judged(config.store_root, letters(config.store_root))
    table = Table(
        *(Column(name, no_wrap=name != "reason") for name in ("id", "at", "from", "state", "reason")), box=None
    )
    for dead, _, state in found:
        source = f"{dead.topic}/{dead.partition}@{dead.offset}"
        table.add_row(dead.id, dead.recorded_at.isoformat(timespec="seconds"), source, state, dead.reason)
    if found:
        console.print(table)
    kinds = Counter(state for _, _, state in found)
    console.print(", ".join(f"{count} {state}" for state, count in kinds.items()) or "no dead letters")
    return 0


def show_one(config: TelemetryConfig, letter_id: str) -> int:
    """Why it could not be read, on standard error, and the entry as it is, on standard output. Raises LetterUnknown."""
    dead = letter(config.store_root, letter_id)
    print(f"{dead.topic}, partition {dead.partition}, offset {dead.offset}: {dead.reason}", file=sys.stderr)
    sys.stdout.buffer.write(dead.payload + b"\n")
    return 0


def replay_some(config: TelemetryConfig, letter_ids: list[str]) -> int:
    """Put these letters (none: all that can be) back into the log; 1 if one of them could not be.

    Raises LetterUnknown, and LogUnavailable where the log takes nothing.
    """
    store = config.store_root
    chosen = [letter(store, each) for each in letter_ids] or letters(store)
    log, failed = open_log(config), 0
    try:
        for dead, event, state in judged(store, chosen):
            said = _replay_one(log, dead, event, state)
            is_asked_for = bool(letter_ids) or state == "replayable"
            failed += bool(letter_ids) and event is None
            if is_asked_for:
                print(f"{dead.id}  {said}")
    finally:
        log.close()
    return 1 if failed else 0


def _replay_one(log: EventLog, dead: Letter, event: AnyEvent | None, state: State) -> str:
    """What became of it."""
    if event is None:
        return f"this build cannot read it either: {dead.reason}"
    if state == "in the store":
        return f"is in the store already, as {type(event).__name__} {event.event_id}"
    position = replay(log, event)
    return f"{type(event).__name__} {event.event_id} → {position.topic}/{position.partition}@{position.offset}"
