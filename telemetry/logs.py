"""JSON logs on stderr, one object a line, for every process alike.

Call sites use the standard library: ``log.info("stored", extra={"action": "batch_stored", "entries": 12})``.
``action`` is the machine's key; ids (pair_id, version, trace_id) go beside it. Never prompt text, user ids or
addresses.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

# What every LogRecord has; all else came by ``extra``.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One log record as one line of JSON."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "action": getattr(record, "action", ""),
            "message": record.getMessage(),
            "logger": record.name,
        }
        document |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            document["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(document, enc_hook=str).decode()


def configure(name: str, level: str = "INFO") -> None:
    """Log as process ``name``, everything of ``level`` and above, to stderr; replaces earlier handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(name))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("kafka").setLevel(max(root.level, logging.WARNING))
