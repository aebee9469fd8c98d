"""The production event log: Kafka, an idempotent producer with acks=all, a reader without a consumer group.

``append`` never blocks: a writer thread connects, makes topics, hands what has gathered to the producer, and resolves
the futures when all of it is acknowledged. (One by one, from the client's own thread, each would wake its waiter while
the client wants the interpreter too.) A failure is told at once, by the client's thread. After a failed delivery the
producer is replaced, so that no sequence gap outlives it. The reader assigns partitions by itself and starts where its
caller says. A topic that was made anew counts its offsets from 0 again, and may have grown past an old position: the
deployment notes the id of each topic that it reads, in ``<state>/kafka``, and a position in another one is lost.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition  # type: ignore[import-untyped]
from kafka.errors import (  # type: ignore[import-untyped]
    KafkaError,
    LogTruncationError,
    OffsetOutOfRangeError,
    TopicAlreadyExistsError,
)

from telemetry.append_queue import Append, AppendQueue
from telemetry.config import TelemetryConfig
from telemetry.crashpoints import reach
from telemetry.event_log import Entry, LogUnavailable, Offsets, Position, PositionLost
from telemetry.events import AUDIT, DEAD_LETTERS, VERSIONS
from telemetry.process import sync

log = logging.getLogger(__name__)

RECONNECT_S: Final = 0.2
CHECK_S: Final = 0.5  # a reader asks this often whether brokers, position and partitions are still as they were
READ_TIMEOUT_S: Final = 5.0
MAX_REQUEST_BYTES: Final = 1_048_576  # the brokers' default message.max.bytes
WATCH_S: Final = 1.0
MAX_GROUP: Final = 256  # entries under way at a time
KEPT_FOR_EVER: Final = frozenset({VERSIONS, AUDIT})  # small, and what a new trainer or store begins with
ONE_PARTITION: Final = frozenset({VERSIONS, DEAD_LETTERS, AUDIT})


Handed = tuple[Append, Any]  # and the client's own future


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach the brokers and what new topics look like."""

    client: dict[str, Any]  # kafka-python's connection settings
    partitions: int
    replication: int
    prefix: str
    retention_days: int
    ids: Path  # folder: a file for each topic that was ever read, with its id

    def require(self, timeout_s: float) -> None:
        """Raise OSError when no bootstrap address accepts a connection: clients that fail to start leak threads."""
        addresses: list[str] = self.client["bootstrap_servers"]
        for address in addresses:
            host, port = address.rsplit(":", 1)
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
                return
            except OSError as error:
                refused = error
        raise ConnectionError(f"no broker at {', '.join(addresses)}: {refused}")

    def name(self, topic: str) -> str:
        return self.prefix + topic

    def admin(self, connect_s: float) -> KafkaAdminClient:
        self.require(connect_s)
        timeouts = {"bootstrap_timeout_ms": int(connect_s * 1000), "request_timeout_ms": int(READ_TIMEOUT_S * 1000)}
        return KafkaAdminClient(**self.client, **timeouts)

    def settings(self, topic: str) -> dict[str, str]:
        """Of a new topic. Never compacted: entries of one key are no versions of each other, every one counts."""
        kept_ms = -1 if topic in KEPT_FOR_EVER else self.retention_days * 86_400_000
        return {
            "cleanup.policy": "delete",
            "retention.ms": str(kept_ms),
            "retention.bytes": "-1",
            "min.insync.replicas": str(max(1, self.replication - 1)),
        }

    def make_topics(self, admin: KafkaAdminClient, topics: Sequence[str]) -> None:
        """Create those of ``topics`` that are missing, and wait until their partitions have leaders."""
        present = set(admin.list_topics())
        for topic in topics:
            name = self.name(topic)
            partitions = 1 if topic in ONE_PARTITION else self.partitions
            size = {"num_partitions": partitions, "replication_factor": self.replication}
            wanted = {name: size | {"configs": self.settings(topic)}}
            if name in present:
                continue
            try:
                admin.create_topics(wanted, wait_for_metadata=True)
            except TopicAlreadyExistsError:  # another process was faster
                admin.wait_for_topics([name])

    def known_id(self, name: str, topic_id: str) -> str:
        """The id that the topic ``name`` had when this deployment first read it; that is now, where it never did."""
        note = self.ids / f"{name}.id"
        if not note.exists():
            self.ids.mkdir(parents=True, exist_ok=True)
            staging = note.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
            staging.write_text(topic_id)
            sync(staging)
            with suppress(FileExistsError):  # another process was faster
                os.link(staging, note)
            staging.unlink()
        return note.read_text()


def kafka_log(config: TelemetryConfig) -> KafkaLog:
    """The log that ``[telemetry]`` describes."""
    return KafkaLog(cluster_of(config), config.append_timeout_s)


def cluster_of(config: TelemetryConfig) -> Cluster:
    """The cluster that ``[telemetry]`` describes; reads the password's file."""
    client: dict[str, Any] = {
        "bootstrap_servers": [address.strip() for address in config.kafka_bootstrap.split(",")],
        "security_protocol": config.kafka_security_protocol,
        "reconnect_backoff_max_ms": 500,
    }
    for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile", "sasl_mechanism"):
        client[name] = getattr(config, f"kafka_{name}") or None
    if config.kafka_sasl_mechanism:
        client["sasl_plain_username"] = config.kafka_sasl_username
        client["sasl_plain_password"] = Path(config.kafka_sasl_password_file).read_text().strip()
    return Cluster(
        client=client,
        partitions=config.kafka_partitions,
        replication=config.kafka_replication,
        prefix=config.kafka_topic_prefix,
        retention_days=config.kafka_retention_days,
        ids=config.state_path / "kafka",
    )


class KafkaLog:
    """``EventLog`` on Kafka. Connects in the background; a lost connection is made again by itself."""

    def __init__(self, cluster: Cluster, append_timeout_s: float = 1.0) -> None:
        self._cluster = cluster
        self._timeout_s = append_timeout_s
        self._most_s = max(5.0, 3 * append_timeout_s)  # what is neither delivered nor failed by then is given up
        self._queue = AppendQueue(self._write, append_timeout_s, "kafka-log-writer")
        self._has_failed = threading.Event()
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, name="kafka-log-watch", daemon=True).start()
        # The writer thread's own:
        self._handed: list[Handed] = []  # to the producer, in order; not told yet
        self._producer: KafkaProducer | None = None
        self._unclosed: list[KafkaProducer] = []  # dropped with entries under way
        self._topics: set[str] = set()  # known to exist
        self._trouble: Exception | None = None  # why the last try to hand over an entry failed

    def append(self, topic: str, key: str, payload: bytes) -> Future[Position]:
        return self._queue.put(topic, key, payload)

    def append_all(self, entries: Iterable[tuple[str, str, bytes]]) -> list[Future[Position]]:
        return self._queue.put_all(entries)

    def reader(self, topics: Sequence[str], start: Offsets) -> KafkaReader:
        return KafkaReader(self._cluster, topics, start)

    def close(self) -> None:
        self._queue.close()
        self._is_over.set()

    def _watch(self) -> None:
        """Thread: an entry that is neither delivered nor failed long after it should be is given up."""
        while not self._is_over.wait(WATCH_S):
            if (future := self._queue.overdue(self._most_s)) is not None:
                self._give_up(future, TimeoutError("the client says nothing"))

    def _write(self) -> None:
        is_last = False
        while not is_last:
            group, is_last = self._queue.get_group(MAX_GROUP)
            for item in group:
                try:
                    self._send(item)
                except Exception as error:
                    log.exception("an entry was not sent", extra={"action": "append_failed", "topic": item.topic})
                    self._queue.fail(item.future, _unavailable(error))
            self._settle()
        self._drop_producer(flush_s=self._timeout_s)

    def _send(self, item: Append) -> None:
        """Hand the entry to the producer, connecting as long as the entry has time.

        What was handed over before is settled before anything is done to its producer: another one could be quicker
        with this entry than the old one with the news that those before it have failed.
        """
        if self._unclosed:
            self._close_dropped()
        while not item.future.done():  # it may have been given up
            if self._trouble is not None and time.monotonic() > item.deadline:
                self._queue.fail(item.future, _unavailable(self._trouble))
                return
            if self._handed and not self._is_connected(item.topic):
                self._settle()
                continue
            try:
                producer = self._connected(item.topic)
                reach("producer.handing_over")
                with self._queue.failing:
                    if self._has_failed.is_set():
                        continue  # what failed a moment ago may have been before this one
                    sent = producer.send(self._cluster.name(item.topic), item.payload, item.key.encode())
            except (KafkaError, OSError, ValueError) as error:  # ValueError: partitions not known yet
                self._trouble = error
                self._settle()
                self._drop_producer()
                time.sleep(RECONNECT_S)
                continue
            self._trouble = None
            self._handed.append((item, sent))
            sent.add_errback(self._on_failed, item, producer)
            return

    def _on_failed(self, item: Append, producer: KafkaProducer, error: BaseException) -> None:
        """The client's thread: before another entry of this key can be handed over, or sent.

        What waits in the client behind a batch that has failed it would send next, ahead of that one's next try. Its
        public way to stop, ``close(timeout=0)``, refuses exactly then.
        """
        with self._queue.failing:
            self._give_up(item.future, error)
            producer._accumulator.abort_undrained_batches(error)

    def _settle(self) -> None:
        """Wait until all that was handed over is acknowledged, and say so; what is behind a failure has failed, too."""
        handed, self._handed = self._handed, []
        acknowledged: list[Any] = []
        failure: Exception | None = None
        for item, sent in handed:
            try:
                acknowledged.append(sent.get(timeout=self._most_s))
            except Exception as error:
                if not isinstance(error, KafkaError):  # nothing that the client is known to raise
                    log.exception("not acknowledged", extra={"action": "append_failed", "topic": item.topic})
                failure = error
                break
        if acknowledged:
            reach("producer.acknowledged")
        for (item, _), metadata in zip(handed, acknowledged, strict=False):
            with suppress(InvalidStateError):  # it was given up
                item.future.set_result(Position(item.topic, metadata.partition, metadata.offset))
        if failure is not None:
            self._give_up(handed[len(acknowledged)][0].future, failure)

    def _give_up(self, future: Future[Position], error: BaseException) -> None:
        with self._queue.failing:
            self._has_failed.set()
            self._queue.fail(future, _unavailable(error))

    def _is_connected(self, topic: str) -> bool:
        return self._producer is not None and topic in self._topics and not self._has_failed.is_set()

    def _connected(self, topic: str) -> KafkaProducer:
        """A producer that has not failed yet, with ``topic`` known to exist."""
        if self._has_failed.is_set():
            self._drop_producer()
        is_new = topic not in self._topics
        if is_new:
            with self._cluster.admin(self._timeout_s) as admin:
                self._cluster.make_topics(admin, [topic])
        if self._producer is None:
            self._cluster.require(self._timeout_s)
            self._producer = self._new_producer()
        if is_new:
            self._producer.partitions_for(self._cluster.name(topic))  # waits for it here, so that no send has to
            self._topics.add(topic)
        return self._producer

    def _new_producer(self) -> KafkaProducer:
        timeout_ms = max(500, int(self._timeout_s * 1000))
        return KafkaProducer(
            **self._cluster.client,
            acks="all",
            enable_idempotence=True,
            linger_ms=0,
            max_request_size=MAX_REQUEST_BYTES,
            max_block_ms=timeout_ms,
            delivery_timeout_ms=timeout_ms,
            request_timeout_ms=int(timeout_ms * 0.8),
            bootstrap_timeout_ms=timeout_ms,
            retry_backoff_ms=50,
            metrics_enabled=False,  # nobody reads them
        )

    def _drop_producer(self, flush_s: float = 0.0) -> None:
        producer, self._producer = self._producer, None
        self._topics.clear()  # they may have to be made again
        if producer is not None:
            self._unclosed.append(producer)
        self._close_dropped(flush_s)
        self._has_failed.clear()

    def _close_dropped(self, flush_s: float = 0.0) -> None:
        """End the threads of dropped producers; one with entries under way refuses until these have failed."""
        dropped, self._unclosed = self._unclosed, []
        for producer in dropped:
            try:
                producer.close(timeout=flush_s)
            except KafkaError:  # what it could not flush in time it fails, or the watch does
                self._unclosed.append(producer)


def _unavailable(error: BaseException) -> LogUnavailable:
    return LogUnavailable(
        f"Kafka did not take the entry: {type(error).__name__} {error}; are the brokers up, and enough in sync?"
    )


class KafkaReader:
    """``Reader`` over every partition of its topics; after LogUnavailable the next poll connects again."""

    def __init__(self, cluster: Cluster, topics: Sequence[str], start: Offsets) -> None:
        self._cluster = cluster
        self._names = {cluster.name(topic): topic for topic in topics}
        self._next: dict[TopicPartition, int] = {
            TopicPartition(cluster.name(topic), partition): offset
            for topic, partitions in start.items()
            if topic in topics
            for partition, offset in partitions.items()
        }
        self._ids: dict[str, str] = {}  # of the topics that our positions are in
        self._consumer: KafkaConsumer | None = None
        self._checked_at = 0.0

    def poll(self, *, max_entries: int, timeout_s: float) -> list[Entry]:
        try:
            consumer = self._consumer or self._connect()
            batches = consumer.poll(timeout_ms=int(timeout_s * 1000), max_records=max_entries)
            if time.monotonic() - self._checked_at > CHECK_S:
                self._check(consumer)
        except (OffsetOutOfRangeError, LogTruncationError) as error:
            raise _lost(str(error)) from error
        except (KafkaError, OSError) as error:
            self.close()
            raise LogUnavailable(f"Kafka cannot be read: {type(error).__name__} {error}") from error
        return [self._entry(record) for records in batches.values() for record in records]

    def _entry(self, record: Any) -> Entry:
        self._next[TopicPartition(record.topic, record.partition)] = record.offset + 1
        position = Position(self._names[record.topic], record.partition, record.offset)
        return Entry(position, (record.key or b"").decode(), record.value or b"")

    def _connect(self) -> KafkaConsumer:
        """Make the topics if need be, check every position against the log, and seek."""
        with self._cluster.admin(READ_TIMEOUT_S) as admin:
            self._cluster.make_topics(admin, list(self._names.values()))
            described = admin.describe_topics(list(self._names))
        self._require_the_same(described)
        partitions = [
            TopicPartition(topic["name"], partition["partition_index"])
            for topic in described
            for partition in topic["partitions"]
        ]
        timeout_ms = int(READ_TIMEOUT_S * 1000)
        consumer = KafkaConsumer(
            **self._cluster.client,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            request_timeout_ms=timeout_ms,
            bootstrap_timeout_ms=timeout_ms,
            fetch_max_wait_ms=250,
            metadata_max_age_ms=int(READ_TIMEOUT_S * 1000),  # how soon new partitions are seen
        )
        self._consumer = consumer
        consumer.assign(partitions)
        beginnings = consumer.beginning_offsets(partitions, timeout_ms=timeout_ms)
        for partition in partitions:
            offset = self._next.setdefault(partition, beginnings[partition])
            if offset < beginnings[partition]:
                raise _lost(f"{partition} starts at {beginnings[partition]} now, {offset} was next")
            consumer.seek(partition, offset)
        self._ends(consumer)
        return consumer

    def _require_the_same(self, described: Sequence[dict[str, Any]]) -> None:
        """Raise PositionLost for a position in a topic that was made anew since."""
        for topic in described:
            name, found = topic["name"], str(topic["topic_id"])
            noted = self._cluster.known_id(name, found)
            known = self._ids.get(name, noted)
            is_under_way = any(offset for partition, offset in self._next.items() if partition.topic == name)
            if known != found and is_under_way:
                raise _lost(f"{name} has the id {found}, and had {known}")
            self._ids[name] = found

    def _check(self, consumer: KafkaConsumer) -> None:
        """Are the brokers there, our positions inside the log, and all of its partitions ours?"""
        self._checked_at = time.monotonic()
        self._ends(consumer)
        if sum(len(consumer.partitions_for_topic(name)) for name in self._names) > len(self._next):
            self.close()  # the topic has grown: the next poll assigns anew, from where we are

    def _ends(self, consumer: KafkaConsumer) -> dict[TopicPartition, int]:
        """The offset after the last entry of each partition; raises PositionLost where it is behind ours."""
        ends: dict[TopicPartition, int] = consumer.end_offsets(list(self._next), timeout_ms=int(READ_TIMEOUT_S * 1000))
        for partition, end in ends.items():
            if end < self._next[partition]:
                raise _lost(f"{partition} ends at {end}, {self._next[partition]} was next")
        return ends

    def lag(self) -> int:
        try:
            ends = self._ends(self._consumer or self._connect())
        except (KafkaError, OSError) as error:
            self.close()
            raise LogUnavailable(f"Kafka cannot be read: {type(error).__name__} {error}") from error
        return sum(end - self._next[partition] for partition, end in ends.items())

    def close(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close(autocommit=False)


def _lost(what: str) -> PositionLost:
    return PositionLost(
        f"{what}: the topic was trimmed or made anew; restore it, or remove the states of all that read it, while they "
        "are stopped, and the topic's file in STATE/kafka, to read from the beginning"
    )
