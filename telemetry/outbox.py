"""The router's way to the event log: when the log is down, a verdict is kept in a local file, synced, and sent later.

While the log answers, ``append`` is the log's append. When it does not, entries go to segment files (frames of
length, CRC-32 and msgpack), and, until every one of them is in the log, so does everything after them: entries with
one key stay in order, those of one process; what another process appends may overtake them. A crash repeats at most
one segment; consumers deduplicate by event_id. One process per folder.
"""

from __future__ import annotations

import logging
import os
import queue
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Final, Literal

import msgspec

from telemetry.crashpoints import reach
from telemetry.event_log import EventLog, LogUnavailable, Offsets, Position, Reader, too_large
from telemetry.process import HeldByAnother, hold, sync

log = logging.getLogger(__name__)

FRAME: Final = struct.Struct("<II")  # length of the body, its CRC-32
RETRY_S: Final = 0.25
FORWARD_GROUP: Final = 256  # entries on their way to the log at a time
SEGMENT_BYTES: Final = 4 << 20


class Durable(msgspec.Struct, frozen=True):
    """Where an entry is safe: in the log, at ``position``, or in this machine's outbox."""

    where: Literal["log", "outbox"]
    position: Position | None = None


class Spooled(msgspec.Struct, frozen=True, array_like=True):
    """One entry as it lies in a segment."""

    topic: str
    key: str
    payload: bytes


class OutboxInUse(RuntimeError):
    """Another process uses this outbox folder: give each router worker a folder of its own."""


def read_segment(path: Path) -> Iterator[Spooled]:
    """The whole entries of a segment, in order; it ends at the first frame that is torn or damaged.

    After a power cut a file may end in zeros, which would be an empty body with its right checksum.
    """
    content = path.read_bytes()
    start = 0
    while start + FRAME.size <= len(content):
        length, checksum = FRAME.unpack_from(content, start)
        body = content[start + FRAME.size : start + FRAME.size + length]
        if not length or len(body) < length or zlib.crc32(body) != checksum:
            break
        yield msgspec.msgpack.decode(body, type=Spooled)
        start += FRAME.size + length
    if start < len(content):
        log.warning(
            "%s ends in %d bytes that hold no whole entry: the last one, torn before it was acknowledged, unless the "
            "disk is damaged; they are kept beside it as .torn", path.name, len(content) - start,
            extra={"action": "outbox_torn"},
        )  # fmt: skip


def frame(entry: Spooled) -> bytes:
    """The entry as bytes of a segment."""
    body = msgspec.msgpack.encode(entry)
    return FRAME.pack(len(body), zlib.crc32(body)) + body


def _write_all(file: IO[bytes], content: bytes) -> None:
    """An unbuffered file may take less than it is given: on a disk that is nearly full, say."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _own(folder: Path) -> IO[str]:
    """The folder's lock, held until it is closed. Raises OutboxInUse."""
    try:
        return hold(folder / "lock")
    except HeldByAnother as error:
        raise OutboxInUse(f"{folder}: {OutboxInUse.__doc__}") from error


class Segments:
    """The folder of segment files, oldest first. A segment is only ever appended to by the process that made it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._owner = _own(folder)
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        names = [int(path.stem) for path in self.paths()]
        self._number = max(names, default=0)

    def adopt(self, folder: Path) -> None:
        """Take over the segments of a folder that nobody owns, behind our own; do nothing when somebody does."""
        try:
            owner = _own(folder)
        except OutboxInUse:
            return
        with owner, self._lock:
            for path in sorted(folder.glob("*.segment")):
                self._number += 1
                path.rename(self._folder / f"{self._number:012d}.segment")
            sync(self._folder)

    def paths(self) -> list[Path]:
        return sorted(self._folder.glob("*.segment"))

    def write(self, frames: bytes) -> None:
        """Append and sync."""
        with self._lock:
            if self._file is None:
                self._number += 1
                self._file = (self._folder / f"{self._number:012d}.segment").open("xb", buffering=0)
                sync(self._folder)
            try:
                reach("outbox.writing")
                _write_all(self._file, frames)
                os.fsync(self._file.fileno())
                reach("outbox.synced")
            except OSError:
                self._roll()  # whatever comes next goes into a new segment, never behind a torn entry
                raise
            if self._file.tell() > SEGMENT_BYTES:
                self._roll()

    def oldest(self) -> Path | None:
        """The oldest segment, closed for writing: what is written from now on goes to a new one."""
        with self._lock:
            paths = self.paths()
            if len(paths) == 1:
                self._roll()
            return paths[0] if paths else None

    def close(self) -> None:
        with self._lock:
            self._roll()
        self._owner.close()

    def _roll(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class OutboxLog:
    """An event log that takes entries also while the real one is down. Safe to share between threads."""

    def __init__(self, log: EventLog, folder: Path, *, adopt: Sequence[Path] = ()) -> None:
        """``adopt`` names folders of outboxes whose processes are no more: what they hold is sent from here."""
        self._log = log
        self._segments = Segments(folder)
        for left in adopt:
            self._segments.adopt(left)
        self._lock = threading.Lock()  # guards the four below
        self._under_way: dict[int, tuple[Spooled, Future[Durable]]] = {}  # in the log's hands, in order, by identity
        self._unwritten = 0  # entries on their way to a segment
        self._unsent = sum(1 for path in self._segments.paths() for _ in read_segment(path))
        self._is_spooling = bool(self._segments.paths())
        self._to_file: queue.SimpleQueue[tuple[Spooled, Future[Durable]] | None] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._is_closing = False
        self._spooler = threading.Thread(target=self._spool, name="outbox-spool", daemon=True)
        self._forwarder = threading.Thread(target=self._forward, name="outbox-forward", daemon=True)
        self._spooler.start()
        self._forwarder.start()

    @property
    def pending(self) -> int:
        """Entries that are durable here and not yet in the log."""
        with self._lock:
            return self._unsent

    def append(self, topic: str, key: str, payload: bytes) -> Future[Durable]:
        """Queue one entry; the future tells where it became durable.

        It raises EntryTooLarge, and LogUnavailable only when log and disk both fail.
        """
        entry, result = Spooled(topic, key, payload), Future[Durable]()
        result.set_running_or_notify_cancel()
        if error := too_large(topic, payload):  # here already: in a segment it would block the way for ever
            result.set_exception(error)
            return result
        with self._lock:  # the log's queue, too: nothing may get into it once an earlier entry is here
            if self._is_spooling:
                self._put(entry, result)
                return result
            appended = self._log.append(topic, key, payload)
            self._under_way[id(entry)] = (entry, result)
        appended.add_done_callback(lambda done: self._settle(done, entry))
        return result

    def reader(self, topics: Sequence[str], start: Offsets) -> Reader:
        return self._log.reader(topics, start)

    def close(self) -> None:
        """Let the log flush, stop the threads; what is still in the outbox stays there for the next start."""
        self._is_closing = True
        self._wake.set()
        self._forwarder.join()
        self._log.close()  # what it could not take comes back to the spooler
        self._to_file.put(None)
        self._spooler.join()
        self._segments.close()

    def _settle(self, done: Future[Position], entry: Spooled) -> None:
        """The log took the entry, or did not. Then all that it still has in hand go to a segment, in their order.

        They fail one by one and on more than one thread, and a later one may be told first. What the log takes
        nevertheless is there twice; consumers deduplicate.
        """
        error = done.exception()
        with self._lock:
            if id(entry) not in self._under_way:  # it went to a segment with another one
                return
            if isinstance(error, LogUnavailable):
                under_way, self._under_way = self._under_way, {}
                for each, waiting in under_way.values():
                    self._put(each, waiting)
                return
            _, result = self._under_way.pop(id(entry))
        if error is None:
            result.set_result(Durable("log", done.result()))
        else:
            result.set_exception(error)

    def _put(self, entry: Spooled, result: Future[Durable]) -> None:
        if not self._is_spooling:
            log.warning("the event log is away; entries go to the outbox", extra={"action": "outbox_opened"})
        self._is_spooling = True
        self._unsent += 1
        self._unwritten += 1
        self._to_file.put((entry, result))

    def _spool(self) -> None:
        """Thread: write what has gathered, sync once, resolve."""
        while (first := self._to_file.get()) is not None:
            group = [first]
            while not self._to_file.empty():
                following = self._to_file.get()
                if following is None:
                    self._to_file.put(None)
                    break
                group.append(following)
            self._write(group)

    def _write(self, group: list[tuple[Spooled, Future[Durable]]]) -> None:
        try:
            self._segments.write(b"".join(frame(entry) for entry, _ in group))
        except OSError as error:
            with self._lock:
                self._unsent -= len(group)
                self._unwritten -= len(group)
            for _, result in group:
                result.set_exception(LogUnavailable(f"neither the log nor the outbox took the entry: {error}"))
            return
        with self._lock:
            self._unwritten -= len(group)
        for _, result in group:
            result.set_result(Durable("outbox"))
        self._wake.set()

    def _forward(self) -> None:
        """Thread: send segments to the log, oldest first, and return to the direct way when none is left."""
        while not self._is_closing:
            path = self._segments.oldest()
            if path is not None:
                entries = list(read_segment(path))
                self._send(entries)
                if self._is_closing:
                    return
                reach("outbox.sent")
                if sum(len(frame(entry)) for entry in entries) == path.stat().st_size:
                    path.unlink()
                else:
                    path.rename(path.with_suffix(".torn"))  # kept, for whoever wants to know what was behind the tear
                continue
            with self._lock:
                if self._is_spooling and not self._unwritten and not self._segments.paths():
                    self._is_spooling, self._unsent = False, 0
                    log.info("the outbox is empty again", extra={"action": "outbox_drained"})
            self._wake.wait(RETRY_S if self._is_spooling else None)
            self._wake.clear()

    def _send(self, entries: list[Spooled]) -> None:
        """Bring the entries into the log, in order, however often that takes (or until close)."""
        at = 0
        while at < len(entries) and not self._is_closing:
            group = entries[at : at + FORWARD_GROUP]
            futures = self._log.append_all((entry.topic, entry.key, entry.payload) for entry in group)
            sent = 0
            for future in futures:
                if future.exception() is not None:
                    break
                sent += 1
            at += sent
            with self._lock:
                self._unsent -= sent
            if sent < len(group):
                time.sleep(RETRY_S)
