"""``tiebreak lineage``: which verdicts a version learned from, and which versions learned from a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Column, Table

from telemetry.lineage import Lineages, Published
from telemetry.manifest import VERSION_PATTERN, is_base


def document(store: str, name: str) -> dict[str, Any]:
    """All that is known of the version or verdict ``name``, as plain values. Raises NotRecorded."""
    lineages = Lineages(store)
    if not VERSION_PATTERN.match(name):
        return {"verdict": msgspec.to_builtins(lineages.verdict(name))}
    line = [] if is_base(name) else lineages.ancestry(name)
    return {
        "version": name,
        "preference_ids": [each for version in reversed(line) for each in version.preference_ids],
        "ancestry": msgspec.to_builtins(line),
    }


def show(store: str, name: str, console: Console) -> None:
    """``document`` for people."""
    lineages = Lineages(store)
    if is_base(name):
        console.print(f"{name} is a base model: it has no forebears here, and no verdicts")
    elif VERSION_PATTERN.match(name):
        _show_version(lineages.ancestry(name), console)
    else:
        table = Table(box=None, show_header=False)
        for key, value in msgspec.to_builtins(lineages.verdict(name)).items():
            table.add_row(key, ", ".join(value) if isinstance(value, list | tuple) else str(value))
        console.print(table)


def _show_version(line: Sequence[Published], console: Console) -> None:
    names = ("version", "parent", "step", "published", "became", "data set", "verdicts", "their ids")
    table = Table(*(Column(name, no_wrap=name not in ("their ids", "became")) for name in names), box=None)
    for each in line:
        ids = " ".join(each.preference_ids)
        states, count = " → ".join(each.states), str(len(each.preference_ids))
        table.add_row(
            each.version,
            each.parent,
            str(each.step),
            each.published_at.isoformat(timespec="seconds"),
            states,
            each.dataset or "the stream",
            count,
            ids,
        )
    console.print(table)
    total = sum(len(each.preference_ids) for each in line)
    console.print(
        f"{line[0].version}: {total} verdicts since {line[-1].parent}; a version with none went over earlier ones"
    )
