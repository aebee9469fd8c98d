"""What clients saw against what the store holds, in the manner of Jepsen's test of Kafka.

Every operation is written down before it is tried, and once more when it was acknowledged. At the end: an
acknowledged one that is not stored is lost; one stored twice is duplicated; one that nobody tried is a phantom; two
of one key and one writer in another order than they were appended are reordered; a receipt that was missing after its
verdict was acknowledged is stale.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pyarrow.compute as pc  # type: ignore[import-untyped]

from telemetry.events import COMPLETIONS, PREFERENCES, VERSIONS, BatchTrained, PreferenceRecorded
from telemetry.store import counts, read


@dataclass
class Verdicts:
    """The verdicts that clients gave over HTTP, by preference id."""

    tried: set[str] = field(default_factory=set)
    acknowledged: set[str] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Findings:
    """What is wrong, by kind, and how much was looked at."""

    events: int
    acknowledged: int
    lost: frozenset[str]
    duplicated: frozenset[str]
    phantom: frozenset[str]
    reordered: frozenset[str]
    stale: frozenset[str]
    trained_twice: frozenset[str]
    untrained: frozenset[str]
    refused: frozenset[str]  # for good, though their pair had just been offered
    went_astray: int  # times that a guard took weights back: then what they had learned is told twice, rightly

    @property
    def is_clean(self) -> bool:
        """Nothing lost, doubled, invented, reordered or stale, nothing learned twice, nothing left untrained."""
        return not any(self.faults().values())

    def faults(self) -> dict[str, int]:
        names = ("lost", "duplicated", "phantom", "reordered", "stale", "trained_twice", "untrained", "refused")
        return {name: len(getattr(self, name)) for name in names}


def appended(history: Path) -> tuple[dict[str, tuple[str, int]], set[str]]:
    """What the bulk writers tried (event id → key and number, in each writer's order), and what was acknowledged."""
    tried: dict[str, tuple[str, int]] = {}
    done: set[str] = set()
    for path in sorted(history.glob("writer-*")):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[0] == "try" and len(words) == 4:
                tried[words[1]] = (words[2], int(words[3]))
            elif words[0] == "done" and len(words) == 2:
                done.add(words[1])
    return tried, done


def check(store: Path, verdicts: Verdicts, history: Path) -> Findings:
    """Compare everything that was tried with everything that is stored."""
    tried, done = appended(history)
    bulk = read(
        store, COMPLETIONS, columns=["event_id", "completion_id", "request_id", "prompt_tokens", "partition", "offset"]
    )
    rows = [row for row in bulk.to_pylist() if row["request_id"].startswith("writer-")]
    is_verdict = pc.field("type") == PreferenceRecorded.__name__
    given = read(store, PREFERENCES, columns=["preference_id"], wanted=is_verdict)["preference_id"].to_pylist()
    stored = Counter([row["event_id"] for row in rows] + given)
    acknowledged = done | verdicts.acknowledged
    every = tried.keys() | verdicts.tried
    trained, dropped = _trained(store)
    return Findings(
        events=_count(store),
        acknowledged=len(acknowledged),
        lost=frozenset(acknowledged - stored.keys()),
        duplicated=frozenset(name for name, count in stored.items() if count > 1),
        phantom=frozenset(stored.keys() - every),
        reordered=frozenset(_reordered(rows)),
        stale=frozenset(verdicts.stale),
        trained_twice=frozenset(name for name, count in trained.items() if count > 1),
        went_astray=(history.parent / "trainer.log").read_text(errors="replace").count('"went_astray"'),
        untrained=frozenset(set(given) - trained.keys() - dropped),
        refused=frozenset(verdicts.refused),
    )


def _count(store: Path) -> int:
    return sum(counts(store).values())


def _reordered(rows: Iterable[dict[str, object]]) -> set[str]:
    """Entries of one writer's life and one key that lie before one that was appended before them."""
    lines: defaultdict[tuple[object, object], list[tuple[object, object, object]]] = defaultdict(list)
    for row in rows:
        key = (row["request_id"], row["completion_id"])
        lines[key].append((row["partition"], row["offset"], row["prompt_tokens"]))
    found: set[str] = set()
    for (writer, key), entries in lines.items():
        numbers = [number for _, _, number in sorted(entries)]  # type: ignore[type-var]
        if numbers != sorted(numbers):  # type: ignore[type-var]
            found.add(f"{writer} {key}: {numbers}")
    return found


def _trained(store: Path) -> tuple[Counter[str], set[str]]:
    """How often each verdict was new in a step, and which were dropped."""
    rows = read(store, VERSIONS, wanted=pc.field("type") == BatchTrained.__name__).to_pylist()
    trained = Counter(name for row in rows for name in row["preference_ids"])
    dropped = {name for row in rows for name, _ in msgspec.json.decode(row["event"], type=BatchTrained).dropped}
    return trained, dropped
