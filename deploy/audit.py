"""``tiebreak audit``: the trail of who read, exported, changed or deleted what; and how commands write to it.

A command does what it does only once its entry is durable: in the log, or where that is away in an outbox of its
own, which the router sends when it starts again.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Column, Table

from telemetry.audit import HeadFile, faults
from telemetry.config import TelemetryConfig, open_log
from telemetry.events import AUDIT, TOPIC_OF, AuditRecorded, encode, key_of
from telemetry.outbox import OutboxLog
from telemetry.process import signing_key
from telemetry.store import read


def actor() -> str:
    """Who runs this command."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def record(config: TelemetryConfig, action: str, subject: str, **details: str) -> None:
    """Write down that whoever runs this command does ``action``. Raises LogUnavailable where it cannot be."""
    event = AuditRecorded(actor=actor(), action=action, subject=subject, details=details)
    folder = config.state_path / "outbox" / f"command-{os.getpid()}"
    outbox = OutboxLog(open_log(config), folder)
    try:
        where = outbox.append(TOPIC_OF[type(event)], key_of(event), encode(event)).result().where
    finally:
        outbox.close()
    if where == "log" and not list(folder.glob("*.segment")):
        shutil.rmtree(folder)


def entries(config: TelemetryConfig) -> list[dict[str, Any]]:
    """The trail as stored, oldest first."""
    rows: list[dict[str, Any]] = read(config.store_root, AUDIT).to_pylist()
    return sorted(rows, key=lambda row: (row["number"], row["recorded_at"]))


def show(config: TelemetryConfig, console: Console, *, as_json: bool) -> int:
    """Every entry; 0."""
    names = ("number", "occurred_at", "actor", "action", "subject", "details")
    found = [{name: row[name] for name in names} for row in entries(config)]
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return 0
    table = Table(*(Column(name, no_wrap=name != "details") for name in names), box=None)
    for row in found:
        table.add_row(*(str(row[name]) for name in names))
    console.print(table if found else "no entries: the recorder stores them within seconds")
    return 0


def verify(config: TelemetryConfig) -> int:
    """Whether the trail is whole; 1, and every fault on standard error, where it is not."""
    try:
        head = HeadFile(config.state_path, signing_key(config.state_path)).read()
    except ValueError as error:
        print(f"tiebreak: {error}", file=sys.stderr)
        return 1
    rows = entries(config)
    found = list(faults(rows, head))
    for fault in found:
        print(f"tiebreak: {fault}", file=sys.stderr)
    if not found:
        print(f"{len(rows)} entries, each linked to the one before; the last is {rows[-1]['hash'] if rows else 'none'}")
    return 1 if found else 0
