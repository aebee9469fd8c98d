"""A recorder that is wrong on purpose: it commits a batch's offsets before the batch. The sweep has to notice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from telemetry import recorder
from telemetry.crashpoints import reach
from telemetry.store import Table

_commit = Table._commit


def _offsets_first(self: Table, rows: list[dict[str, Any]], reached: Mapping[int, int]) -> None:
    _commit(self, [], reached)
    reach("recorder.topic_committed")
    _commit(self, rows, reached)


Table._commit = _offsets_first  # type: ignore[method-assign]

if __name__ == "__main__":
    recorder.main()
