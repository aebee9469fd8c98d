"""``tiebreak datasets``: versioned data sets. ``tiebreak labels``: pairs out to labelers, their labels in."""

from __future__ import annotations

import argparse
import hashlib
import hmac
import sys
from collections import Counter
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow.compute as pc  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Column, Table

from deploy import audit
from deploy.export import export
from telemetry.config import TelemetryConfig, open_log, open_sealer
from telemetry.datasets import Dataset, Datasets, Filter
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
from telemetry.labeling import Format, Label, label_event, labels, tasks
from telemetry.process import signing_key
from telemetry.store import opened, preferences, read, trl_rows

UNKNOWN: Final = "of pairs that are not in the store"


def chosen(options: argparse.Namespace) -> Filter:
    """The filter that a command's options are. Raises ValueError for a time that is none, or names no zone."""
    values = {name: getattr(options, name) for name in Filter.__struct_fields__ if getattr(options, name, None)}
    for name in {"since", "until"} & values.keys():
        values[name] = datetime.fromisoformat(values[name])
        if values[name].tzinfo is None:
            raise ValueError(f"--{name} {getattr(options, name)}: say the zone, too: 2026-01-31T12:00:00+00:00")
    return Filter(**values)


def create(config: TelemetryConfig, options: argparse.Namespace) -> int:
    """Make a data set and print its id."""
    wanted = chosen(options)
    made = Datasets(config.store_root).create(wanted, by=audit.actor(), note=options.note)
    audit.record(config, "dataset_created", made.id, verdicts=str(made.verdicts), filter=_shown(wanted))
    print(made.id)
    print(f"{made.verdicts} verdicts of version {made.table_version} of the table", file=sys.stderr)
    return 0


def show_all(config: TelemetryConfig, console: Console, *, as_json: bool) -> int:
    """Every data set, oldest first."""
    found = Datasets(config.store_root).all()
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return 0
    names = ("id", "created", "by", "table version", "verdicts", "filter", "note")
    table = Table(*(Column(name, no_wrap=name not in ("filter", "note")) for name in names), box=None)
    for each in found:
        at = each.created_at.isoformat(timespec="seconds")
        table.add_row(
            each.id, at, each.created_by, str(each.table_version), str(each.verdicts), _shown(each.filter), each.note
        )
    console.print(table if found else "no data sets: `tiebreak datasets create` makes one")
    return 0


def diff(config: TelemetryConfig, before: str, after: str) -> int:
    """The verdicts that only one of two data sets has, one a line; like diff, 1 where there are any."""
    datasets = Datasets(config.store_root)
    old, new = (datasets.ids(datasets.named(name)) for name in (before, after))
    for name in sorted(old ^ new):
        print(f"{'-' if name in old else '+'} {name}")
    print(f"{len(old - new)} gone, {len(new - old)} new, {len(old & new)} in both", file=sys.stderr)
    return 1 if old ^ new else 0


def export_one(config: TelemetryConfig, name: str, form: str, out: str) -> int:
    """Write a data set's verdicts; how many of them are erased is said."""
    datasets, sealer = Datasets(config.store_root), open_sealer(config)
    dataset = datasets.named(name)
    audit.record(config, "exported", dataset.id, format=form, out=out)
    events = list(datasets.verdicts(dataset, sealer))
    rows: Any = trl_rows(events) if form == "trl" else _plain(events)
    count = export(rows, out)
    print(f"{count} rows of {dataset.verdicts} verdicts; {_left_out(dataset, events, count)}", file=sys.stderr)
    return 0


def _left_out(dataset: Dataset, events: list[Any], count: int) -> str:
    erased = dataset.verdicts - len(events)
    return f"{erased} of people who were erased, {len(events) - count} without a preference"


def _plain(events: list[Any]) -> Any:
    """Every verdict as its event, opened."""
    return (msgspec.to_builtins(event) for event in events)


def _shown(wanted: Filter) -> str:
    return msgspec.json.encode(wanted).decode()


def pairs_out(config: TelemetryConfig, form: Format, out: str, *, most: int, with_judged: bool) -> int:
    """Write the newest ``most`` pairs as tasks for labelers."""
    audit.record(config, "exported", "pairs", format=form, out=out)
    judged = set() if with_judged else {row["pair_id"] for row in preferences(config.store_root, with_retracted=True)}
    rows = read(config.store_root, PAIRS, columns=["pair_id", "occurred_at", "event"]).to_pylist()
    rows = sorted((row for row in rows if row["pair_id"] not in judged), key=lambda row: row["occurred_at"])
    newest = list(islice(opened(reversed(rows), open_sealer(config)), most))
    export([list(tasks(reversed(newest), form))], out)
    print(f"{len(newest)} pairs", file=sys.stderr)
    return 0


def labels_in(config: TelemetryConfig, form: Format, path: Path, *, source: LabelSource, instructions: str) -> int:
    """Put the labels of an exported file into the log; 1 where some are of pairs that the store does not have."""
    given = [_pseudonymous(label, signing_key(config.state_path)) for label in labels(path.read_bytes(), form)]
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


def _pseudonymous(label: Label, key: bytes) -> Label:
    """Tools name labelers by their mail addresses; here a keyed hash tells them apart."""
    name = hmac.new(key, b"labeler:" + label.labeler.encode(), hashlib.sha256).hexdigest()[:16]
    return msgspec.structs.replace(label, labeler=name)


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
        for shown in opened([row], self._sealer):
            event = label_event(shown, label, source=source, instructions=instructions, now=utc_now())
            if event.event_id in self._known:
                return "recorded before", None
            self._known.add(event.event_id)
            return "recorded", self._sealer.seal(event)
        return "of people who were erased", None
