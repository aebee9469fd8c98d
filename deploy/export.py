"""``tiebreak export``: the preference store as rows of TRL's conversational preference data set, one JSON a line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from telemetry.store import trl_rows


def export(store: str, out: str) -> int:
    """Write every chosen/rejected verdict that was not taken back to ``out`` (``-``: standard output); the count.

    A file appears whole or not at all.
    """
    if out == "-":
        return _write(store, sys.stdout.fileno())
    path = Path(out)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        count = _write(store, descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    staging.rename(path)
    return count


def _write(store: str, descriptor: int) -> int:
    encoder, count = msgspec.json.Encoder(), 0
    with os.fdopen(os.dup(descriptor), "wb") as file:
        for row in trl_rows(store):
            file.write(encoder.encode(row) + b"\n")
            count += 1
    return count
