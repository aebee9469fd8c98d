"""``tiebreak datasets``: versioned data sets, made, listed, compared and exported."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from typing import Any, Final, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Column, Table

from deploy import audit
from deploy.export import export
from telemetry.config import TelemetryConfig, open_sealer
from telemetry.datasets import Dataset, Datasets, Filter
from telemetry.drift import OUTCOMES, Counts, counts, divergences
from telemetry.store import trl_rows

UNKNOWN: Final = "of pairs that are not in the store"


def chosen(options: argparse.Namespace) -> Filter:
    """The filter that a command's options are. Raises ValueError for a time that is none, or names no zone."""
    values = {name: getattr(options, name) for name in Filter.__struct_fields__ if getattr(options, name, None)}
    for name in {"since", "until"} & values.keys():
        values[name] = datetime.fromisoformat(values[name])
        if values[name].tzinfo is None:
            raise ValueError(f"--{name} {getattr(options, name)}: say the zone, too: 2026-01-31T12:00:00+00:00")
    if ("per" in values or "seed" in values) and "sample" not in values:
        raise ValueError("--per and --seed choose a sample: say --sample, too")
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


def drift(config: TelemetryConfig, before: str, after: str, console: Console) -> int:
    """By how much, and in what, people prefer something else in one data set than in another."""
    found = drifted(config, before, after)
    names = [f"{which} {name}" for which in ("before:", "after:") for name in OUTCOMES]
    table = Table("preferred", "KL, nats", *names, box=None)
    for name, value in found.divergences.items():
        cells = [f"{counts[name][outcome]}" for counts in (found.old, found.new) for outcome in OUTCOMES]
        table.add_row(name, f"{value:.3f}", *cells)
    console.print(table)
    return 0


class Drift(NamedTuple):
    """Two data sets, counted."""

    old: Counts
    new: Counts
    divergences: dict[str, float]  # the largest first


def drifted(config: TelemetryConfig, before: str, after: str) -> Drift:
    """The divergence of the data set ``after`` from ``before``. Raises DatasetUnknown or DatasetChanged."""
    datasets, sealer = Datasets(config.store_root), open_sealer(config)
    old, new = (counts(datasets.verdicts(datasets.named(name), sealer)) for name in (before, after))
    return Drift(old, new, divergences(old, new))


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
