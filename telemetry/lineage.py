"""Who learned from whom, read from the store: a version's verdicts, and the versions that learned from a verdict.

A version's event names the verdicts learned since its parent, so all that it knows is its own and its forebears'. The
base is no version of the store: every line ends there. A verdict also names the others on its pair, which are all kept.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow.compute as pc  # type: ignore[import-untyped]

from telemetry.events import (
    FEEDBACK,
    PREFERENCES,
    VERSIONS,
    BatchTrained,
    FeedbackRecorded,
    PreferenceRecorded,
    ReleaseChanged,
    VersionPublished,
)
from telemetry.store import read

Relation = Literal["repeats", "agrees", "contradicts"]


class Published(msgspec.Struct, frozen=True):
    """A version as its event announced it."""

    version: str
    variant: str
    parent: str
    step: int
    published_at: datetime
    preference_ids: tuple[str, ...]  # learned since the parent
    states: tuple[str, ...]  # what the release made of it, oldest first
    dataset: str = ""  # that it was made of; "" where it learned from the stream


class Learned(msgspec.Struct, frozen=True):
    """A verdict as the store holds it, and where it went."""

    preference_id: str
    pair_id: str
    user: str  # pseudonym
    outcome: str
    chosen_position: str
    source: str
    labeler: str
    occurred_at: datetime
    recorded_at: datetime
    is_retracted: bool
    dropped: str  # why no step used it; "" where one did or may yet
    batches: tuple[str, ...]  # steps that it was new in; more than one where weights were thrown away
    replays: int  # further steps that it was part of
    versions: tuple[str, ...]  # that know it, oldest first
    # ids of the other verdicts on its pair, oldest first, also of those taken back
    repeats: tuple[str, ...]  # the same choice by the same giver, earlier or later
    agrees: tuple[str, ...]  # the same choice by another giver
    contradicts: tuple[str, ...]  # another choice (tie, both_bad and skip are choices), whoever gave it


class NotRecorded(LookupError):
    """the store holds nothing of that name: `tiebreak releases list` and a verdict's receipt name what there is"""

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.__doc__}"


class Lineages:
    """The store's versions, read once; verdicts are looked up in it."""

    def __init__(self, store_root: str | Path) -> None:
        """Raises NotRecorded where there is no store yet."""
        self._root = str(store_root)
        rows = read(store_root, VERSIONS).to_pylist()
        if not rows:
            raise NotRecorded(f"versions in {store_root}")
        self._batches = [row for row in rows if row["type"] == BatchTrained.__name__]
        states: dict[str, list[str]] = {}
        for row in sorted(rows, key=lambda row: (row["occurred_at"], row["offset"])):
            if row["type"] == ReleaseChanged.__name__:
                states.setdefault(row["version"], []).append(row["state"])
        self._published = {
            row["version"]: Published(
                row["version"], row["variant"], row["parent"], row["step"], row["occurred_at"],
                tuple(row["preference_ids"]), tuple(states.get(row["version"], ())),
                msgspec.json.decode(row["event"], type=VersionPublished).dataset,
            )
            for row in sorted(rows, key=lambda row: row["occurred_at"]) if row["type"] == VersionPublished.__name__
        }  # fmt: skip

    def ancestry(self, version: str) -> list[Published]:
        """``version`` and its forebears, newest first, without the base. Raises NotRecorded."""
        if version not in self._published:
            raise NotRecorded(version)
        found, at = [], self._published.get(version)
        while at is not None:
            found.append(at)
            at = self._published.get(at.parent)
        return found

    def verdict(self, preference_id: str) -> Learned:
        """What became of one verdict. Raises NotRecorded."""
        rows = read(self._root, PREFERENCES, wanted=pc.field("preference_id") == preference_id).to_pylist()
        verdict = next((row for row in rows if row["type"] == PreferenceRecorded.__name__), None)
        if verdict is None:
            raise NotRecorded(preference_id)
        new_in = [row["batch_id"] for row in self._batches if preference_id in row["preference_ids"]]
        names = (
            "preference_id", "pair_id", "user", "outcome", "chosen_position", "source", "labeler", "occurred_at",
            "recorded_at",
        )  # fmt: skip
        others = self._others(verdict)
        return Learned(
            **{name: verdict[name] for name in names},
            is_retracted=len(rows) > 1,
            dropped=self._dropped(preference_id),
            batches=tuple(sorted(set(new_in))),
            replays=sum(preference_id in row["replayed_ids"] for row in self._batches),
            versions=tuple(name for name in self._published if self._knows(name, preference_id)),
            repeats=tuple(others["repeats"]),
            agrees=tuple(others["agrees"]),
            contradicts=tuple(others["contradicts"]),
        )

    def of_person(self, user: str) -> tuple[str, ...]:
        """The versions that learned from a person (by pseudonym), or descend from one that did; oldest first."""
        given = ((PREFERENCES, PreferenceRecorded), (FEEDBACK, FeedbackRecorded))
        theirs: set[str] = set()
        for topic, event in given:
            wanted = (pc.field("user") == user) & (pc.field("type") == event.__name__)
            theirs |= set(read(self._root, topic, columns=["event_id"], wanted=wanted)["event_id"].to_pylist())
        return tuple(
            name for name in self._published if any(theirs & set(each.preference_ids) for each in self.ancestry(name))
        )

    def _others(self, verdict: dict[str, Any]) -> dict[Relation, list[str]]:
        """relation → ids of the other verdicts on the pair, oldest first."""
        columns = ["preference_id", "occurred_at", "user", "labeler", "outcome", "chosen_position"]
        wanted = (pc.field("pair_id") == verdict["pair_id"]) & (pc.field("type") == PreferenceRecorded.__name__)
        rows = read(self._root, PREFERENCES, columns=columns, wanted=wanted).to_pylist()
        found: dict[Relation, list[str]] = {"repeats": [], "agrees": [], "contradicts": []}
        for row in sorted(rows, key=lambda row: row["occurred_at"]):
            if row["preference_id"] != verdict["preference_id"]:
                found[_relation(verdict, row)].append(row["preference_id"])
        return found

    def _knows(self, version: str, preference_id: str) -> bool:
        return any(preference_id in each.preference_ids for each in self.ancestry(version))

    def _dropped(self, preference_id: str) -> str:
        for row in self._batches:
            for name, reason in msgspec.json.decode(row["event"], type=_Dropped).dropped:
                if name == preference_id:
                    return reason
        return ""


def _relation(one: dict[str, Any], other: dict[str, Any]) -> Relation:
    """What two verdicts on a pair are to each other; a verdict's giver is its labeler, or else its user."""
    if (one["outcome"], one["chosen_position"]) != (other["outcome"], other["chosen_position"]):
        return "contradicts"
    is_same_giver = (one["labeler"] or one["user"]) == (other["labeler"] or other["user"])
    return "repeats" if is_same_giver else "agrees"


class _Dropped(msgspec.Struct):
    dropped: tuple[tuple[str, str], ...] = ()
