"""What the workers of one router count together: chat requests being answered, over all and per key.

The counts lie in a file that every worker has mapped. Each writes its own row alone, so nobody locks, and a worker that
died leaves a row that its next life clears. Two that look at the same moment may both let a request in: a limit is
exceeded by fewer requests than there are workers.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from pathlib import Path

_COUNT = 8  # bytes


class Places:
    """Counts by name, of ``worker`` (from 1) of ``workers``; without a folder they are this process's alone."""

    def __init__(self, names: Sequence[str], *, folder: Path | None = None, worker: int = 1, workers: int = 1) -> None:
        self._columns = {name: column for column, name in enumerate(sorted(set(names)))}
        self._width = len(self._columns)
        self._row = (worker - 1) * self._width
        counts = memoryview(self._memory(folder, _COUNT * workers * self._width)).cast("q")
        self._counts = counts
        for column in range(self._width):
            counts[self._row + column] = 0

    def _memory(self, folder: Path | None, size: int) -> mmap.mmap:
        if folder is None:
            return mmap.mmap(-1, size)
        # other keys, or other workers, are another file: one of each life of a router is never read as the other
        shape = hashlib.sha256(repr((size, list(self._columns))).encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"places-{shape}").open("a+b") as file:
            file.truncate(size)
            return mmap.mmap(file.fileno(), size)

    def add(self, name: str, change: int) -> None:
        """Count ``change`` more of this worker's."""
        self._counts[self._row + self._columns[name]] += change

    def mine(self, name: str) -> int:
        """The count of this worker."""
        return self._counts[self._row + self._columns[name]]

    def total(self, name: str) -> int:
        """The count of all workers."""
        return sum(self._counts[self._columns[name] :: self._width])
