"""From the world to the machine's inputs: log events, replica tables and operator commands. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from deploy.release.evidence import observe
from deploy.release.state import Candidate, Commanded, Input, Judged, Published, Served, Stepped, VariantState
from telemetry.events import (
    AnyEvent,
    BatchTrained,
    CompletionServed,
    PreferenceRecorded,
    VersionPublished,
)
from telemetry.routing import ReplicaTable, VariantRoute

USERS = ("end_user", "simulated")  # whose verdicts are evidence: many labels of one pair are not many users
LIVE_CHANNELS = ("stable", "canary")  # what users got; pinned answers and probes prove nothing about traffic
# what weights can do to an engine; every other error of an answer is the client's, the load's or the machine's
OWN_ERRORS = ("engine_error", "engine_failed", "not_finite", "version_mismatch")


class InvalidCommand(ValueError):
    """The command is not one: it needs command (promote, rollback) and version."""


class _Wire(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A command as the API and the CLI push it."""

    command: Literal["promote", "rollback"]
    version: str
    force: bool = False
    actor: str = "operator"
    reason: str = ""


def inputs_of(event: AnyEvent) -> tuple[str, Input] | None:
    """(variant, input) for the machine, or None when the event is none of its business."""
    match event:
        case VersionPublished():
            return event.variant, Published(_candidate(event))
        case BatchTrained():
            return event.variant, Stepped(event.traces)
        case CompletionServed() if event.channel in LIVE_CHANNELS and _is_the_versions_own(event):
            return event.variant, Served(event.version, observe(event))
        case PreferenceRecorded() if event.outcome != "skip":
            return _judged(event)
        case _:
            return None


def asked_of(event: AnyEvent) -> str:
    """The variant that a user asked, however the answer ended; empty for every other event."""
    return event.variant if isinstance(event, CompletionServed) and event.channel in LIVE_CHANNELS else ""


def _is_the_versions_own(event: CompletionServed) -> bool:
    """Whether an answer says something about its version: a client's mistake or a replica's death does not."""
    return event.finish_reason != "cancelled" and event.error in ("", *OWN_ERRORS)


def ready_versions(table: ReplicaTable | None, base: str, now_s: float, stale_s: float) -> frozenset[str] | None:
    """Versions that every ready replica of ``base`` holds; None when there is none, or the table is stale."""
    if table is None or now_s - table.updated_at_s > stale_s:
        return None
    held = [frozenset(item.versions) for item in table.replicas if item.base == base and item.is_ready]
    return frozenset.intersection(*held) if held else None


def is_answering(table: ReplicaTable | None, route: VariantRoute, now_s: float, stale_s: float) -> bool:
    """Whether a replica answers with the route's stable or canary now: its users ask, whether or not they are let in.

    A base that is full refuses without an event, and a long answer has none before its end.
    """
    if table is None or now_s - table.updated_at_s > stale_s:
        return False
    live = {route.stable, route.canary}
    return any(not live.isdisjoint(item.in_flight_by_version) for item in table.replicas if item.base == route.base)


def parse_command(payload: bytes) -> Commanded:
    """The operator's command in ``payload``; raises InvalidCommand."""
    try:
        wire = msgspec.json.decode(payload, type=_Wire)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidCommand(f"not a release command: {error}") from error
    return Commanded(wire.command, wire.version, wire.force, wire.actor, wire.reason)


def addressee(states: Mapping[str, VariantState], version: str) -> str:
    """The variant that knows ``version``; else the first, which will refuse with a reason."""
    published = (name for name, state in states.items() if version in state.known)
    based = (name for name, state in states.items() if version == state.route.base_version)
    return next(published, None) or next(based, None) or next(iter(states))


def _candidate(event: VersionPublished) -> Candidate:
    oldest = event.oldest_verdict_at
    return Candidate(
        version=event.version,
        parent=event.parent,
        metrics=event.metrics,
        oldest_verdict_at_s=None if oldest is None else oldest.timestamp(),
    )


def _judged(event: PreferenceRecorded) -> tuple[str, Input] | None:
    if event.source not in USERS or event.chosen.variant != event.rejected.variant:
        return None
    is_tie = event.outcome != "chosen_rejected"
    shown_at_s = event.shown_at.timestamp()
    judged = Judged(event.user, event.chosen.version, event.rejected.version, is_tie, shown_at_s)
    return event.chosen.variant, judged
