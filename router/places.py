"""What the workers of one router count together: chat requests being answered, over all and per key.

The counts lie in a file that every worker has mapped. Each writes its own row alone, so nobody locks, and a worker that
died leaves a row that its next life clears, or whoever finds no place left (each holds a lock on its own row's bytes,
and the kernel lets go of it). Two that look at the same moment may both let a request in: a limit is exceeded by fewer
requests than there are workers.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_COUNT = 8  # bytes


class Places:
    """Counts by name, of ``worker`` (from 1) of ``workers``; without a folder they are this process's alone."""

    def __init__(self, names: Sequence[str], *, folder: Path | None = None, worker: int = 1, workers: int = 1) -> None:
        self._columns = {name: column for column, name in enumerate(sorted(set(names)))}
        self._width = len(self._columns)
        self._row = (worker - 1) * self._width
        size = _COUNT * workers * self._width
        self._file = None if folder is None else self._open(folder, size)  # stays open: closing it ends the lock
        self._counts = memoryview(mmap.mmap(-1 if self._file is None else self._file, size)).cast("q")
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_EX, *self._span(self._row))  # waits while another just looks
        self._clear(self._row)

    def _open(self, folder: Path, size: int) -> int:
        # other keys, or other workers, are another file: one of each life of a router is never read as the other
        shape = hashlib.sha256(repr((size, list(self._columns))).encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / f"places-{shape}", os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(file, size)
        return file

    def add(self, name: str, change: int) -> None:
        """Count ``change`` more of this worker's."""
        self._counts[self._row + self._columns[name]] += change

    def mine(self, name: str) -> int:
        """The count of this worker."""
        return self._counts[self._row + self._columns[name]]

    def total(self, name: str) -> int:
        """The count of all workers."""
        return sum(self._counts[self._columns[name] :: self._width])

    def forget_the_dead(self) -> None:
        """Clear what workers left that are no more; for who finds no place left."""
        if self._file is None:
            return
        for row in range(0, len(self._counts), self._width):
            if row != self._row and any(self._counts[row : row + self._width]):
                with suppress(BlockingIOError):  # it lives
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, *self._span(row))
                    self._clear(row)
                    fcntl.lockf(self._file, fcntl.LOCK_UN, *self._span(row))

    def _clear(self, row: int) -> None:
        for column in range(self._width):
            self._counts[row + column] = 0

    def _span(self, row: int) -> tuple[int, int]:
        """Length and start of a row's bytes, as ``lockf`` takes them."""
        return _COUNT * self._width, _COUNT * row
