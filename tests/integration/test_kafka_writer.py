"""Kafka's writer thread: what it does with entries that gathered where the client fails, waits, or says nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kafka import TopicPartition  # type: ignore[import-untyped]
from kafka.errors import KafkaTimeoutError  # type: ignore[import-untyped]
from kafka.producer.future import FutureProduceResult, FutureRecordMetadata  # type: ignore[import-untyped]

from deploy.kafka.broker import Broker
from telemetry.config import TelemetryConfig, open_log
from telemetry.event_log import LogUnavailable, Position
from telemetry.events import PREFERENCES, VERSIONS
from telemetry.kafka_log import KafkaLog
from telemetry.outbox import OutboxLog


def opened(config: TelemetryConfig) -> KafkaLog:
    """A log whose producer is connected."""
    log = open_log(config)
    assert isinstance(log, KafkaLog)
    log.append(PREFERENCES, "k", b"first").result(timeout=20)
    return log


def producers() -> set[threading.Thread]:
    """The threads of kafka-python's producers."""
    return {thread for thread in threading.enumerate() if "producer" in thread.name}


def gate(log: KafkaLog, monkeypatch: pytest.MonkeyPatch, of: str = PREFERENCES) -> threading.Event:
    """Until it is set the writer stands before its producer for entries of one topic; the others gather behind."""
    opens, connected = threading.Event(), log._connected

    def waits(topic: str) -> Any:
        if topic == of:
            opens.wait()
        return connected(topic)

    monkeypatch.setattr(log, "_connected", waits)
    return opens


def unanswered(topic: str) -> Any:
    """The client's future of an entry that was handed over."""
    return FutureRecordMetadata(FutureProduceResult(TopicPartition(topic, 0)), 0, 0, None, 0, 0, 0)


def acknowledged(topic: str) -> Any:
    """One that was acknowledged at once, whatever becomes of the broker."""
    return unanswered(topic).success(Position(topic, 0, 1))


@contextmanager
def frozen(broker: Broker) -> Iterator[None]:
    """It takes connections and bytes, and does nothing with them until the end."""
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def read_until(log: KafkaLog, last: bytes) -> list[bytes]:
    """What the log holds, each once, in the order of their first."""
    reader, found = log.reader([PREFERENCES], {}), list[bytes]()
    deadline = time.monotonic() + 20
    while last not in found and time.monotonic() < deadline:
        found += [entry.payload for entry in reader.poll(max_entries=100, timeout_s=0.5)]
    reader.close()
    return list(dict.fromkeys(found))


def test_an_entry_that_the_client_says_nothing_of_is_given_up(
    kafka_config: TelemetryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(msgspec.structs.replace(kafka_config, append_timeout_s=0.5))
    go_on = gate(log, monkeypatch)
    stuck, queued = log.append(PREFERENCES, "k", b"two"), log.append(PREFERENCES, "k", b"three")
    for future in (stuck, queued):
        with pytest.raises(LogUnavailable, match="says nothing"):
            future.result(timeout=20)
    monkeypatch.undo()
    go_on.set()
    time.sleep(0.2)
    assert log.append(PREFERENCES, "k", b"four").result(timeout=20).topic == PREFERENCES, "the writer lives"
    log.close()


def test_a_producer_that_cannot_be_closed_stops_nothing(
    kafka_config: TelemetryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With entries under way, kafka-python says so by an exception; it once ended the writer, and with it the log."""
    log = opened(kafka_config)
    close = log._producer.close

    def refuses(**options: Any) -> None:
        close(**options)
        raise KafkaTimeoutError("Timeout waiting for future")

    def knows_no_partitions(*_: Any) -> None:
        raise KafkaTimeoutError("Failed to update metadata")

    monkeypatch.setattr(log._producer, "close", refuses)
    monkeypatch.setattr(log._producer, "send", knows_no_partitions)
    assert log.append(PREFERENCES, "k", b"two").result(timeout=20).topic == PREFERENCES, "with another producer"
    monkeypatch.setattr(log, "_connected", lambda _: {}["nobody thought of this"])
    with pytest.raises(LogUnavailable, match="nobody thought"):
        log.append(PREFERENCES, "k", b"three").result(timeout=20)
    monkeypatch.undo()
    assert log.append(PREFERENCES, "k", b"four").result(timeout=20).topic == PREFERENCES
    log.close()


def test_a_producer_that_is_dropped_with_an_entry_under_way_ends_later(
    kafka_broker: Broker, kafka_config: TelemetryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its close is refused until that entry has failed; once it was left like that, with its thread and sockets."""
    earlier = producers()
    log = opened(msgspec.structs.replace(kafka_config, append_timeout_s=0.5))
    dropped, send = producers() - earlier, log._producer.send

    def fails(topic: str, payload: bytes, key: bytes) -> Any:
        if payload == b"held":
            return acknowledged(topic)
        if payload != b"bad":
            return send(topic, payload, key)
        sent = unanswered(topic)
        threading.Timer(0.1, sent._produce_future.failure, [KafkaTimeoutError("no answer")]).start()
        return sent

    go_on = gate(log, monkeypatch)
    monkeypatch.setattr(log._producer, "send", fails)
    with frozen(kafka_broker):
        log.append(PREFERENCES, "k", b"held")  # the next two are a group
        bad, under_way = log.append(PREFERENCES, "k", b"bad"), log.append(PREFERENCES, "k", b"under way")
        go_on.set()
        for future in (bad, under_way):
            with pytest.raises(LogUnavailable):
                future.result(timeout=20)
        with pytest.raises(LogUnavailable):
            log.append(PREFERENCES, "k", b"for another producer").result(timeout=20)
    deadline = time.monotonic() + 20
    while dropped & producers() and time.monotonic() < deadline:
        with suppress(LogUnavailable):
            log.append(PREFERENCES, "k", b"next").result(timeout=20)
        time.sleep(0.1)
    assert len(dropped) == 1 and not dropped & producers()
    assert len(producers() - earlier) == 1
    log.close()
    assert producers() <= earlier


@pytest.mark.parametrize("error", [KafkaTimeoutError("no answer"), RuntimeError("nobody thought of this")])
def test_what_fails_in_a_group_lets_nothing_of_its_key_overtake_it(
    kafka_config: TelemetryConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    log = opened(kafka_config)
    outbox = OutboxLog(log, tmp_path / "outbox")
    send = log._producer.send

    def fails(topic: str, payload: bytes, key: bytes) -> Any:
        return unanswered(topic).failure(error) if payload == b"bad" else send(topic, payload, key)

    go_on = gate(log, monkeypatch)
    monkeypatch.setattr(log._producer, "send", fails)
    payloads = [b"held", b"before", b"bad", b"behind", b"last"]
    durable = [outbox.append(PREFERENCES, "k", payload) for payload in payloads]
    go_on.set()
    assert [future.result(timeout=20).where for future in durable][2:] == ["outbox"] * 3
    assert read_until(log, b"last") == [b"first", *payloads]
    outbox.close()


def test_what_waits_in_the_client_behind_a_batch_that_fails_is_not_sent(
    kafka_broker: Broker, kafka_config: TelemetryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of one partition; an outbox will bring both again, in order, and none may be ahead of that."""
    log = opened(msgspec.structs.replace(kafka_config, append_timeout_s=5.0))
    send = log._producer.send

    def sends(topic: str, payload: bytes, key: bytes) -> Any:
        if payload == b"held":
            return acknowledged(topic)
        if payload == b"behind":
            time.sleep(0.5)  # the first has left
        sent = send(topic, payload, key)
        if payload == b"one":
            threading.Timer(1.0, sent.failure, [KafkaTimeoutError("expired")]).start()
        return sent

    go_on = gate(log, monkeypatch)
    monkeypatch.setattr(log._producer, "send", sends)
    with frozen(kafka_broker):
        futures = [log.append(PREFERENCES, "k", payload) for payload in (b"held", b"one", b"behind")]
        go_on.set()
        for future in futures[1:]:
            with pytest.raises(LogUnavailable):
                future.result(timeout=20)
    monkeypatch.undo()
    time.sleep(1.0)
    log.append(PREFERENCES, "k", b"last").result(timeout=20)
    assert b"behind" not in read_until(log, b"last")
    log.close()


def test_nothing_goes_to_a_new_producer_before_it_is_known_what_became_of_the_old_ones(
    kafka_config: TelemetryConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = opened(kafka_config)
    outbox = OutboxLog(log, tmp_path / "outbox")

    def hesitates(topic: str, payload: bytes, key: bytes) -> Any:
        if payload != b"slow":
            raise KafkaTimeoutError("Failed to update metadata")
        sent = unanswered(topic)
        threading.Timer(0.8, sent._produce_future.failure, [KafkaTimeoutError("no answer")]).start()
        return sent

    go_on = gate(log, monkeypatch)
    monkeypatch.setattr(log._producer, "send", hesitates)
    payloads = [b"slow", b"behind", b"last"]
    durable = [outbox.append(PREFERENCES, "k", payload) for payload in payloads]
    go_on.set()
    assert [future.result(timeout=20).where for future in durable] == ["outbox"] * 3
    assert read_until(log, b"last") == [b"first", *payloads]
    outbox.close()


def test_what_is_under_way_is_not_given_up_for_one_that_cannot_be_handed_over(
    kafka_config: TelemetryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(kafka_config)
    send = log._producer.send

    def refuses(topic: str, payload: bytes, key: bytes) -> Any:
        if payload == b"refused":
            raise KafkaTimeoutError("Failed to update metadata")
        return send(topic, payload, key)

    drop, told = log._drop_producer, list[list[bool]]()

    def drops(flush_s: float = 0.0) -> None:
        told.append([future.done() for future in futures])
        drop(flush_s)

    go_on = gate(log, monkeypatch)
    monkeypatch.setattr(log._producer, "send", refuses)
    monkeypatch.setattr(log, "_drop_producer", drops)
    futures = [log.append(PREFERENCES, "k", payload) for payload in (b"one", b"two", b"refused")]
    go_on.set()
    assert [future.result(timeout=20).topic for future in futures] == [PREFERENCES] * 3, "the last by another producer"
    assert told == [[True, True, False]]
    log.close()


def test_an_entry_that_is_acknowledged_does_not_wait_for_a_topic_that_cannot_be_made(
    kafka_config: TelemetryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(kafka_config)
    makes = gate(log, monkeypatch, of=VERSIONS)
    go_on = gate(log, monkeypatch)
    held = log.append(PREFERENCES, "k", b"held")
    verdict, version = log.append(PREFERENCES, "k", b"verdict"), log.append(VERSIONS, "v", b"version")
    go_on.set()
    assert [future.result(timeout=4).topic for future in (held, verdict)] == [PREFERENCES] * 2
    assert not version.done()
    makes.set()
    assert version.result(timeout=20).topic == VERSIONS
    log.close()
