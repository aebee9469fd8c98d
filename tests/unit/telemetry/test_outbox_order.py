"""In which order entries reach a segment, whatever order the log tells their failures in."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from telemetry.append_queue import AppendQueue
from telemetry.event_log import LogUnavailable, Offsets, Position, Reader
from telemetry.outbox import Durable, OutboxLog, read_segment

AWAY = LogUnavailable("away")


class SlowLog:
    """A log whose entries stay under way until a test says what became of them."""

    def __init__(self) -> None:
        self.under_way: list[Future[Position]] = []
        self.is_away = False

    def append(self, topic: str, key: str, payload: bytes) -> Future[Position]:
        future = Future[Position]()
        if self.is_away:
            future.set_exception(AWAY)
        else:
            self.under_way.append(future)
        return future

    def append_all(self, entries: Iterable[tuple[str, str, bytes]]) -> list[Future[Position]]:
        return [self.append(*entry) for entry in entries]

    def reader(self, topics: Sequence[str], start: Offsets) -> Reader:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def log() -> SlowLog:
    return SlowLog()


@pytest.fixture
def outbox(log: SlowLog, tmp_path: Path) -> Iterator[OutboxLog]:
    opened = OutboxLog(log, tmp_path / "outbox")
    yield opened
    opened.close()


def fail(log: SlowLog, *numbers: int) -> None:
    log.is_away = True
    for number in numbers:
        log.under_way[number].set_exception(AWAY)


def kept(tmp_path: Path) -> list[bytes]:
    return [entry.payload for path in sorted((tmp_path / "outbox").glob("*.segment")) for entry in read_segment(path)]


def test_the_last_entry_may_fail_first(log: SlowLog, outbox: OutboxLog, tmp_path: Path) -> None:
    done = [outbox.append("t", "k", str(n).encode()) for n in range(4)]
    fail(log, 3, 1)
    later = outbox.append("t", "k", b"4")
    fail(log, 0, 2)
    assert [future.result(5) for future in [*done, later]] == [Durable("outbox")] * 5
    assert kept(tmp_path) == [b"0", b"1", b"2", b"3", b"4"]


def test_what_the_log_takes_after_all_is_told_once(log: SlowLog, outbox: OutboxLog, tmp_path: Path) -> None:
    first, second = outbox.append("t", "k", b"0"), outbox.append("t", "k", b"1")
    fail(log, 1)
    log.under_way[0].set_result(Position("t", 0, 7))
    assert (first.result(5), second.result(5)) == (Durable("outbox"), Durable("outbox"))
    assert kept(tmp_path) == [b"0", b"1"]


def test_what_the_log_took_before_another_failed_is_not_kept(log: SlowLog, outbox: OutboxLog, tmp_path: Path) -> None:
    first, second = outbox.append("t", "k", b"0"), outbox.append("t", "k", b"1")
    log.under_way[0].set_result(Position("t", 0, 7))
    fail(log, 1)
    assert first.result(5) == Durable("log", Position("t", 0, 7))
    assert second.result(5) == Durable("outbox")
    assert kept(tmp_path) == [b"1"]


def test_nothing_of_a_group_is_queued_behind_the_failure_of_what_is_before_it() -> None:
    """An outbox brings its entries in groups: what was queued after the first had failed would come before them."""
    queue = AppendQueue(lambda: None, 60.0, "writer")
    (under_way,) = queue.put_all([("topic", "k", b"0")])
    begun, resume = threading.Event(), threading.Event()

    def entries() -> Iterator[tuple[str, str, bytes]]:
        yield "topic", "k", b"1"
        begun.set()
        resume.wait(0.5)
        yield "topic", "k", b"2"

    def fail() -> None:
        begun.wait()
        queue.fail(under_way, AWAY)
        resume.set()

    failing = threading.Thread(target=fail)
    failing.start()
    futures = queue.put_all(entries())
    failing.join()
    assert [future.done() and future.exception() for future in futures] == [AWAY, AWAY]
