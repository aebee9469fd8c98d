"""One contract, both event logs: what the rest of the system relies on."""

from __future__ import annotations

import time
from collections import defaultdict

import pytest

from telemetry.event_log import (
    MAX_PAYLOAD_BYTES,
    Entry,
    EntryTooLarge,
    EventLog,
    LogUnavailable,
    Offsets,
    PositionLost,
    Reader,
)
from tests.contract.conftest import LogServer

TOPIC, OTHER = "things.v1", "others.v1"


def append_all(log: EventLog, topic: str, entries: list[tuple[str, bytes]]) -> None:
    for future in [log.append(topic, key, payload) for key, payload in entries]:
        future.result(timeout=20)


def read_all(reader: Reader, count: int, *, most_at_once: int = 100) -> list[Entry]:
    """``count`` entries, and then nothing more."""
    entries: list[Entry] = []
    deadline = time.monotonic() + 20
    while len(entries) < count and time.monotonic() < deadline:
        entries += reader.poll(max_entries=most_at_once, timeout_s=0.2)
    assert reader.poll(max_entries=most_at_once, timeout_s=0.1) == []
    return entries


def after(entries: list[Entry]) -> Offsets:
    offsets: Offsets = defaultdict(dict)
    for entry in entries:
        offsets[entry.position.topic][entry.position.partition] = entry.position.offset + 1
    return dict(offsets)


def append_until_taken(log: EventLog, topic: str, payload: bytes) -> None:
    for _ in range(20):
        try:
            log.append(topic, "k", payload).result(timeout=20)
            return
        except LogUnavailable:
            continue
    pytest.fail("the log did not recover")


def test_entries_of_one_key_are_read_in_the_order_they_were_appended(log_server: LogServer) -> None:
    log = log_server.open()
    sent = [(f"key-{n % 7}", f"{n}".encode()) for n in range(200)]
    append_all(log, TOPIC, sent)

    entries = read_all(log_server.reader([TOPIC], {}), 200, most_at_once=30)

    for key in {key for key, _ in sent}:
        assert [e.payload for e in entries if e.key == key] == [p for k, p in sent if k == key]
    assert sorted((e.key, e.payload) for e in entries) == sorted(sent)


def test_offsets_of_a_partition_only_grow_and_are_what_append_returned(log_server: LogServer) -> None:
    log = log_server.open()
    positions = [log.append(TOPIC, "k", str(n).encode()).result(timeout=20) for n in range(20)]

    entries = read_all(log_server.reader([TOPIC], {}), 20)

    assert [entry.position for entry in entries] == positions
    offsets = [position.offset for position in positions]
    assert offsets == sorted(set(offsets))


def test_poll_never_returns_more_than_it_was_asked_for_and_drops_nothing(log_server: LogServer) -> None:
    log = log_server.open()
    append_all(log, TOPIC, [("k", str(n).encode()) for n in range(25)])
    append_all(log, OTHER, [("k", str(n).encode()) for n in range(25)])
    reader = log_server.reader([TOPIC, OTHER], {})

    sizes, total, deadline = [], 0, time.monotonic() + 20
    while total < 50 and time.monotonic() < deadline:
        sizes.append(len(reader.poll(max_entries=4, timeout_s=0.3)))
        total += sizes[-1]

    assert total == 50
    assert max(sizes) <= 4


def test_a_reader_started_at_kept_offsets_continues_without_gap_or_repetition(log_server: LogServer) -> None:
    log = log_server.open()
    append_all(log, TOPIC, [(f"key-{n}", f"{n}".encode()) for n in range(60)])
    first = log_server.reader([TOPIC], {}).poll(max_entries=25, timeout_s=10)

    rest = read_all(log_server.reader([TOPIC], after(first)), 60 - len(first))

    assert 0 < len(first) <= 25
    assert sorted(int(e.payload) for e in first + rest) == list(range(60))


def test_a_reader_waits_for_an_entry_and_gets_it_when_it_comes(log_server: LogServer) -> None:
    log = log_server.open()
    reader = log_server.reader([TOPIC], {})
    assert reader.poll(max_entries=10, timeout_s=0.2) == []

    future = log.append(TOPIC, "k", b"late")
    entries = reader.poll(max_entries=10, timeout_s=10)

    assert [entry.position for entry in entries] == [future.result(timeout=20)]


def test_lag_counts_what_was_appended_and_not_polled(log_server: LogServer) -> None:
    log = log_server.open()
    append_all(log, TOPIC, [(f"{n}", b"x") for n in range(10)])
    append_all(log, OTHER, [(f"{n}", b"x") for n in range(5)])
    reader = log_server.reader([TOPIC, OTHER], {})
    assert reader.lag() == 15

    polled = reader.poll(max_entries=4, timeout_s=10)
    assert reader.lag() == 15 - len(polled)
    assert log_server.reader([TOPIC, OTHER], after(polled)).lag() == 15 - len(polled)

    append_all(log, TOPIC, [("k", b"x")])
    assert reader.lag() == 16 - len(polled)


def test_acknowledged_entries_survive_kill_9_of_the_server(log_server: LogServer) -> None:
    log = log_server.open()
    append_all(log, TOPIC, [(f"{n}", f"{n}".encode()) for n in range(100)])

    log_server.kill()
    log_server.start()

    entries = read_all(log_server.reader([TOPIC], {}), 100)
    assert sorted(int(entry.payload) for entry in entries) == list(range(100))


def test_an_append_fails_while_the_server_is_away_and_works_again_afterwards(log_server: LogServer) -> None:
    log = log_server.open()
    append_all(log, TOPIC, [("k", b"before")])
    log_server.kill()
    try:
        with pytest.raises(LogUnavailable):
            log.append(TOPIC, "k", b"during").result(timeout=20)
    finally:
        log_server.start()

    append_until_taken(log, TOPIC, b"after")

    payloads = [entry.payload for entry in read_all(log_server.reader([TOPIC], {}), 2)]
    assert payloads[0] == b"before"
    assert payloads[-1] == b"after"


def test_a_reader_says_that_the_server_is_away_and_then_goes_on_where_it_was(log_server: LogServer) -> None:
    log = log_server.open()
    append_all(log, TOPIC, [("k", b"before")])
    reader = log_server.reader([TOPIC], {})
    read_all(reader, 1)
    log_server.kill()
    try:
        with pytest.raises(LogUnavailable):
            for _ in range(30):
                reader.poll(max_entries=10, timeout_s=0.3)
    finally:
        log_server.start()

    append_until_taken(log, TOPIC, b"after")

    entries: list[Entry] = []
    for _ in range(60):
        try:
            entries += reader.poll(max_entries=10, timeout_s=0.5)
        except LogUnavailable:
            continue
        if entries:
            break
    assert {entry.payload for entry in entries} == {b"after"}


def test_a_position_that_is_not_in_a_remade_topic_is_refused(log_server: LogServer) -> None:
    log = log_server.open()
    append_all(log, TOPIC, [("k", str(n).encode()) for n in range(5)])
    entries = read_all(log_server.reader([TOPIC], {}), 5)

    log_server.remake(TOPIC)

    with pytest.raises(PositionLost, match="restore it, or remove"):
        log_server.reader([TOPIC], after(entries)).poll(max_entries=1, timeout_s=5)


def test_a_position_in_a_topic_that_was_remade_is_lost_also_once_it_has_grown_past_it(log_server: LogServer) -> None:
    log = log_server.open()
    append_all(log, TOPIC, [("k", str(n).encode()) for n in range(5)])
    entries = read_all(log_server.reader([TOPIC], {}), 5)

    log_server.remake(TOPIC)
    append_all(log_server.open(), TOPIC, [("k", b"new") for _ in range(20)])

    with pytest.raises(PositionLost, match="made anew"):
        log_server.reader([TOPIC], after(entries)).poll(max_entries=1, timeout_s=5)
    anew = log_server.reader([TOPIC], {})
    assert len(read_all(anew, 20)) == 20, "who begins anew reads it"
    anew.close()  # the connection was lost
    append_all(log_server.open(), TOPIC, [("k", b"newer")])
    assert [entry.payload for entry in read_all(anew, 1)] == [b"newer"], "and goes on reading it"


def test_a_running_reader_halts_when_its_topic_is_remade(log_server: LogServer) -> None:
    log = log_server.open()
    append_all(log, TOPIC, [("k", str(n).encode()) for n in range(5)])
    reader = log_server.reader([TOPIC], {})
    read_all(reader, 5)

    log_server.remake(TOPIC)

    with pytest.raises(PositionLost):
        for _ in range(40):
            reader.poll(max_entries=1, timeout_s=0.3)


def test_an_entry_that_no_log_takes_is_refused_at_once(log_server: LogServer) -> None:
    log = log_server.open()
    with pytest.raises(EntryTooLarge):
        log.append(TOPIC, "k", b"x" * (MAX_PAYLOAD_BYTES + 1)).result(timeout=1)

    append_all(log, TOPIC, [("k", b"y" * (MAX_PAYLOAD_BYTES - 100))])
    assert len(read_all(log_server.reader([TOPIC], {}), 1)[0].payload) == MAX_PAYLOAD_BYTES - 100


def test_close_waits_until_what_was_queued_is_durable(log_server: LogServer) -> None:
    log = log_server.open()
    futures = [log.append(TOPIC, str(n), b"x") for n in range(50)]

    log.close()

    assert all(future.done() and future.exception() is None for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        log.append(TOPIC, "k", b"x")
