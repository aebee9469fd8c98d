"""What both event logs do between ``append`` and their writer thread: queue, start the thread, stop it.

The writer takes entries in order and resolves their futures; an entry's ``deadline`` says until when it may wait for
a log that does not answer. When one fails, all that came after it fail with it: none may reach the log before one that
was appended earlier, and that an outbox behind this log is about to bring again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

import msgspec

from telemetry.event_log import LogUnavailable, Position, too_large


class Append(msgspec.Struct):
    """One queued entry."""

    topic: str
    key: str
    payload: bytes
    deadline: float  # time.monotonic
    future: Future[Position]


class AppendQueue:
    """Entries on their way to one writer thread, which starts with the first entry."""

    def __init__(self, write: Callable[[], None], timeout_s: float, name: str) -> None:
        self._write = write
        self._timeout_s = timeout_s
        self._name = name
        self._queue: queue.SimpleQueue[Append | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.failing = threading.RLock()  # held while entries fail, and by a writer that hands one over
        self._writer: threading.Thread | None = None
        self._is_closed = False
        self._waiting: dict[int, tuple[float, Future[Position]]] = {}  # appended when, by identity

    def put(self, topic: str, key: str, payload: bytes) -> Future[Position]:
        """Queue one entry for the writer."""
        future: Future[Position] = Future()
        future.set_running_or_notify_cancel()  # what is queued may already be durable: it cannot be cancelled
        if error := too_large(topic, payload):
            future.set_exception(error)
            return future
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the event log was closed; open another")
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name=self._name, daemon=True)
                self._writer.start()
            now_s = time.monotonic()
            self._waiting[id(future)] = (now_s, future)
            self._queue.put(Append(topic, key, payload, now_s + self._timeout_s, future))
        future.add_done_callback(lambda done: self._waiting.pop(id(done), None))
        return future

    def put_all(self, entries: Iterable[tuple[str, str, bytes]]) -> list[Future[Position]]:
        """Queue entries, none of which is left out when those before it fail meanwhile."""
        with self.failing:
            return [self.put(*entry) for entry in entries]

    def fail(self, future: Future[Position], error: LogUnavailable) -> None:
        """This entry could not be appended, nor can any that waits behind it."""
        with self.failing:
            _fail(future, error)  # from here on an outbox takes what comes
            for _, behind in list(self._waiting.values()):
                _fail(behind, error)

    def overdue(self, most_s: float) -> Future[Position] | None:
        """The oldest entry, if it has waited longer than ``most_s``."""
        since_s, future = next(iter(list(self._waiting.values())), (0.0, None))
        return future if future is not None and time.monotonic() - since_s > most_s else None

    def get_group(self, most: int) -> tuple[list[Append], bool]:
        """Writer: wait for one entry, then take what else has gathered; True after the last one."""
        item = self._queue.get()
        group: list[Append] = []
        while item is not None:
            group.append(item)
            if len(group) == most:
                return group, False
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def close(self) -> None:
        """Let the writer finish what is queued, and wait for it."""
        with self._lock:
            self._is_closed = True
            writer, self._writer = self._writer, None
        if writer is not None:
            self._queue.put(None)
            writer.join()


def _fail(future: Future[Position], error: LogUnavailable) -> None:
    with suppress(InvalidStateError):  # appended, or failed, a moment ago
        future.set_exception(error)
