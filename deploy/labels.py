"""``tiebreak labels``: pairs out to people who label, and their labels in."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import pyarrow.compute as pc  # type: ignore[import-untyped]

from deploy import audit
from deploy.export import export
from telemetry.config import TelemetryConfig, open_log, open_sealer
from telemetry.events import (
    PAIRS,
    PREFERENCES,
    TOPIC_OF,
    LabelSource,
    PreferenceRecorded,
    encode,
    key_of,
    utc_now,
)
from telemetry.labeling import Format, Label, label_event, labeler_name, labels, tasks
from telemetry.process import signing_key
from telemetry.store import preferences, read

UNKNOWN: Final = "of pairs that are not in the store"


def pairs_out(config: TelemetryConfig, form: Format, out: str, *, most: int, with_judged: bool) -> int:
    """Write the newest ``most`` pairs as tasks for labelers."""
    audit.record(config, "exported", "pairs", format=form, out=out)
    judged = set() if with_judged else {row["pair_id"] for row in preferences(config.store_root, with_retracted=True)}
    rows = read(config.store_root, PAIRS, columns=["pair_id", "occurred_at", "event"]).to_pylist()
    rows = sorted((row for row in rows if row["pair_id"] not in judged), key=lambda row: row["occurred_at"])
    newest = list(islice(open_sealer(config).opened(reversed(rows)), most))
    export([list(tasks(reversed(newest), form))], out)
    print(f"{len(newest)} pairs", file=sys.stderr)
    return 0


def labels_in(config: TelemetryConfig, form: Format, path: Path, *, source: LabelSource, instructions: str) -> int:
    """Put the labels of an exported file into the log; 1 where some are of pairs that the store does not have."""
    key, found = signing_key(config.state_path), labels(path.read_bytes(), form)
    given = [msgspec.structs.replace(label, labeler=labeler_name(key, label.labeler)) for label in found]
    audit.record(config, "imported", path.name, labels=str(len(given)), source=source, instructions=instructions)
    pairs, log = _Pairs(config, {label.pair_id for label in given}), open_log(config)
    counts: Counter[str] = Counter()
    try:
        for label in given:
            what, event = pairs.event(label, source=source, instructions=instructions)
            counts[what] += 1
            if event is not None:
                log.append(TOPIC_OF[type(event)], key_of(event), encode(event)).result()
    finally:
        log.close()
    print(", ".join(f"{count} {what}" for what, count in counts.items()) or "no labels in the file", file=sys.stderr)
    return 1 if counts[UNKNOWN] else 0


class _Pairs:
    """The pairs that labels are of, as the store has them, and the labels that it has already."""

    def __init__(self, config: TelemetryConfig, ids: set[str]) -> None:
        self._sealer = open_sealer(config)
        wanted = pc.field("pair_id").isin(sorted(ids))
        rows = read(config.store_root, PAIRS, columns=["pair_id", "event"], wanted=wanted).to_pylist()
        self._rows = {row["pair_id"]: row for row in rows}
        known = read(config.store_root, PREFERENCES, columns=["event_id"], wanted=wanted)
        self._known = set(known["event_id"].to_pylist())

    def event(self, label: Label, *, source: LabelSource, instructions: str) -> tuple[str, PreferenceRecorded | None]:
        """What becomes of the label, and the sealed event where it is recorded."""
        row = self._rows.get(label.pair_id)
        if row is None:
            return UNKNOWN, None
        for shown in self._sealer.opened([row]):
            event = label_event(shown, label, source=source, instructions=instructions, now=utc_now())
            if event.event_id in self._known:
                return "recorded before", None
            self._known.add(event.event_id)
            return "recorded", self._sealer.seal(event)
        return "of people who were erased", None
