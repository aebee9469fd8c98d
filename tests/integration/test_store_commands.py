"""Commands that read a store of many files and end at once: they end by themselves, again and again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from telemetry.event_log import Entry, Position
from telemetry.events import VERSIONS, encode, key_of
from telemetry.store import Recorded, Store
from tests import examples

COMMITS, RUNS = 40, 8


def test_a_command_that_reads_many_files_does_not_abort_at_its_end(tmp_path: Path) -> None:
    """With Arrow's own threads about half of the runs did."""
    store = Store(tmp_path / "store")
    for offset in range(COMMITS):
        event = examples.batch(offset, [])
        entry = Entry(Position(VERSIONS, 0, offset), key_of(event), encode(event))
        store.append([Recorded(entry, event)], {VERSIONS: {0: offset + 1}})
    command = [sys.executable, "-m", "deploy.cli", "lineage", "v000001-aaaaaaaa", "--state", str(tmp_path)]
    for _ in range(RUNS):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert done.stderr.startswith("tiebreak: v000001-aaaaaaaa: the store holds nothing of that name")
