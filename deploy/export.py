"""``tiebreak export``: the preference store as rows of TRL's conversational preference data set, one JSON a line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec


def export(rows: Iterable[Any], out: str) -> int:
    """Write ``rows`` to ``out`` (``-``: standard output); the count. A file appears whole or not at all."""
    if out == "-":
        return _write(rows, sys.stdout.fileno())
    path = Path(out)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        count = _write(rows, descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    staging.rename(path)
    return count


def _write(rows: Iterable[Any], descriptor: int) -> int:
    encoder, count = msgspec.json.Encoder(), 0
    with os.fdopen(os.dup(descriptor), "wb") as file:
        for row in rows:
            file.write(encoder.encode(row) + b"\n")
            count += 1
    return count
