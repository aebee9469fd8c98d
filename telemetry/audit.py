"""The audit trail: who read, exported, changed or deleted what, in a chain that shows every later change.

Entries are events like any other (topic AUDIT); the recorder, the store's one writer, links each row to the one
before: ``hash = SHA-256(previous hash, number, event, time of storing)``. A changed, removed or reordered row breaks
the chain. Rows cut off its end are missed by the head, ``<state>/audit.head``: the last number and hash, signed with
the deployment's key. It is there before the first entry, and the recorder leaves one alone that is not on the chain.
Whoever holds that key and may write both can forge a trail: the operator is not kept from it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from telemetry.event_log import Entry, Position
from telemetry.events import AUDIT, InvalidEvent, decode
from telemetry.process import sync
from telemetry.rows import Row, row_of

START: Final = "0" * 64  # what the first row is linked to
_SCOPE: Final = b"tiebreak-audit:"


class Head(msgspec.Struct, frozen=True):
    """The end of the chain: how many rows it has, and the last one's hash."""

    rows: int
    hash: str
    signature: str = ""


class HeadFile:
    """Where the end of the chain stands, signed."""

    def __init__(self, state: Path, key: bytes) -> None:
        self._path, self._key = state / "audit.head", key

    def write(self, rows: int, last: str) -> None:
        """Replace it, durably."""
        head = Head(rows, last, self._sign(rows, last))
        staging = self._path.with_suffix(f".{os.getpid()}")
        with staging.open("wb") as file:
            file.write(msgspec.json.encode(head))
            file.flush()
            os.fsync(file.fileno())
        staging.rename(self._path)
        sync(self._path.parent)

    def read(self) -> Head | None:
        """None where nothing was ever written. Raises ValueError for one that is damaged or not ours."""
        try:
            head = msgspec.json.decode(self._path.read_bytes(), type=Head)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise ValueError(f"{self._path} is damaged: {error}") from error
        if not hmac.compare_digest(self._sign(head.rows, head.hash), head.signature):
            raise ValueError(f"{self._path} is not signed with this deployment's key")
        return head

    def _sign(self, rows: int, last: str) -> str:
        return hmac.new(self._key, _SCOPE + f"{rows}:{last}".encode(), hashlib.sha256).hexdigest()


def link(rows: Sequence[Row], at: Head) -> Head:
    """Chain ``rows`` behind ``at``, in place; the new end."""
    number, last = at.rows, at.hash
    for row in rows:
        row |= {"number": number, "previous": last, "hash": _hash(last, number, row["event"], row["recorded_at"])}
        number, last = number + 1, row["hash"]
    return Head(number, last)


def _hash(previous: str, number: int, event: str, recorded_at: datetime) -> str:
    words = [previous, number, event, int(recorded_at.timestamp() * 1_000_000)]
    return hashlib.sha256(msgspec.msgpack.encode(words)).hexdigest()


def faults(rows: Sequence[Row], head: Head | None) -> Iterator[str]:
    """What is wrong with the trail, in its order; nothing where it is whole."""
    at = Head(0, START)
    hashes = {0: START}
    for row in sorted(rows, key=lambda row: row["number"]):
        name = f"entry {row['number']} ({row['event_id']})"
        if row["number"] != at.rows:
            told = "is there twice" if row["number"] < at.rows else f"follows entry {at.rows - 1}: some are missing"
            yield f"{name} {told}"
        elif row["previous"] != at.hash:
            yield f"{name} does not follow the one before it"
        if row["hash"] != _hash(row["previous"], row["number"], row["event"], row["recorded_at"]):
            yield f"{name} was changed"
        elif odd := _odd_columns(row):
            yield f"{name}: {', '.join(odd)} say something else than its event"
        at = Head(row["number"] + 1, row["hash"])
        hashes[at.rows] = at.hash
    if head is None and rows:
        yield "the signed head is missing: whether entries are missing at the end cannot be told"
    elif head is not None and at.rows < head.rows:
        yield f"{head.rows - at.rows} entries are missing at the end: the head counts {head.rows}, here are {at.rows}"
    elif head is not None and hashes.get(head.rows) != head.hash:
        yield "the signed head names another last entry"


def _odd_columns(row: Row) -> list[str]:
    """Columns that differ from what the row's event says."""
    try:
        event = decode(row["event"].encode())
    except InvalidEvent:
        return ["event"]
    position = Position(AUDIT, row["partition"], row["offset"])
    told: dict[str, Any] = row_of(event, Entry(position, "", row["event"].encode()), row["recorded_at"])
    return [name for name, value in told.items() if row.get(name) != value]
