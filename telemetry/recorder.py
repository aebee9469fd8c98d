"""The recorder: event log → preference store → receipts, exactly once. ``python -m telemetry.recorder --config FILE``

A batch is read, decoded (what no build knows goes to the dead-letter topic), committed with its offsets, and then
projected onto receipts; killed anywhere, it continues from the store's offsets. When log, Redis or broker are away
it waits for them. When the log no longer holds its position, or the store is damaged, it stops: that is for a person to
decide.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import redis

from telemetry import logs, metrics
from telemetry.audit import HeadFile
from telemetry.config import TelemetryConfig, open_log, redis_client
from telemetry.configuration import read_table
from telemetry.crashpoints import reach
from telemetry.errors import StoreDamaged
from telemetry.event_log import Entry, EventLog, LogUnavailable, Offsets, PositionLost, Reader
from telemetry.events import (
    DEAD_LETTERS,
    PAIRS,
    PREFERENCES,
    TOPIC_OF,
    TOPICS,
    VERSIONS,
    AnyEvent,
    DeadLetter,
    InvalidEvent,
    PairShown,
    decode_from,
    encode,
    key_of,
)
from telemetry.process import announce_ready, go_without, signing_key
from telemetry.receipts import Receipts
from telemetry.store import Recorded, Store, StoreContended

log = logging.getLogger(__name__)

POLL_S: Final = 0.25
RETRY_S: Final = 0.5
LAG_EVERY_S: Final = 2.0
CATCH_UP_EVENTS: Final = 1000
PROJECTED: Final = (PREFERENCES, VERSIONS)  # topics that receipts depend on
MAX_DEAD_LETTER_BYTES: Final = 700_000  # as base64 it has to fit into an entry of the log
DEAD_LETTER_IDS: Final = uuid.UUID("5f8e2a4c-8f0b-5d8e-9c56-3f1d1f0d6b1e")


def interpret(entry: Entry) -> AnyEvent:
    """The event in the entry, or the dead letter that the entry becomes: always with the same event_id."""
    where = entry.position
    try:
        return decode_from(where.topic, entry.payload)
    except InvalidEvent as error:
        reason = str(error)
    if len(entry.payload) > MAX_DEAD_LETTER_BYTES:
        reason += f"; only the first {MAX_DEAD_LETTER_BYTES} of {len(entry.payload)} bytes are kept"
    name = f"{where.topic}/{where.partition}/{where.offset}"
    return DeadLetter(
        event_id=str(uuid.uuid5(DEAD_LETTER_IDS, name)),
        topic=where.topic,
        partition=where.partition,
        offset=where.offset,
        reason=reason,
        payload=entry.payload[:MAX_DEAD_LETTER_BYTES],
    )


def reached(entries: Iterable[Entry]) -> Offsets:
    """topic → partition → the offset after the last of ``entries``."""
    found: Offsets = {}
    for entry in entries:
        partitions = found.setdefault(entry.position.topic, {})
        partitions[entry.position.partition] = entry.position.offset + 1
    return found


def progress_of(offsets: Offsets) -> dict[str, int]:
    """The receipts' progress once everything before ``offsets`` is projected."""
    return {
        f"{topic}/{partition}": offset for topic in PROJECTED for partition, offset in offsets.get(topic, {}).items()
    }


class Recorder:
    """One consumer loop. ``run`` until ``stop``."""

    def __init__(
        self,
        log: EventLog,
        store_root: Path | str,
        receipts: Receipts,
        *,
        batch_entries: int,
        flush_s: float,
        heads: HeadFile | None = None,
    ) -> None:
        self._log = log
        self._store_root = store_root
        self._receipts, self._heads = receipts, heads
        self._batch_entries = batch_entries
        self._flush_s = flush_s
        self._lag_at = 0.0
        self.is_connected = threading.Event()
        self.stop = threading.Event()

    def run(self) -> None:
        """Record until stopped; raises PositionLost."""
        while not self.stop.is_set():
            try:
                self._session()
            except (LogUnavailable, StoreContended, redis.RedisError, OSError) as error:
                log.warning("%s: trying again", error, extra={"action": "recorder_waits"})
                self.stop.wait(RETRY_S)

    def _session(self) -> None:
        """Open the store and read from where it ends, until something breaks."""
        store = Store(self._store_root, self._heads)
        self._catch_up(store)
        if last := store.tables[PAIRS].last_recorded_at():
            metrics.LAST_STORED.set(last.timestamp())
        reader = self._log.reader(TOPICS, store.offsets())
        try:
            while not self.stop.is_set():
                entries = self._gather(reader)
                self.is_connected.set()
                if entries:
                    self._record(store, entries)
                self._measure_lag(reader)
        finally:
            reader.close()

    def _gather(self, reader: Reader) -> list[Entry]:
        """Entries up to the batch's size, or what came within ``flush_s`` of the first."""
        entries = reader.poll(max_entries=self._batch_entries, timeout_s=POLL_S)
        deadline = time.monotonic() + self._flush_s
        while entries and len(entries) < self._batch_entries:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or self.stop.is_set():
                break
            entries += reader.poll(max_entries=self._batch_entries - len(entries), timeout_s=left_s)
        return entries

    def _record(self, store: Store, entries: Sequence[Entry]) -> None:
        reach("recorder.read")
        recorded = [Recorded(entry, event) for entry in entries if (event := self._valid(entry)) is not None]
        offsets = reached(entries)
        stored, at = store.append(recorded, offsets)
        reach("recorder.committed")
        told = [(item.event, at) for item in recorded if item.entry.position.topic in PROJECTED]
        self._receipts.project(told, progress_of(offsets))
        reach("recorder.projected")
        for item in stored:
            _count(item, at.timestamp())

    def _valid(self, entry: Entry) -> AnyEvent | None:
        """The entry's event; an invalid entry is put on the dead-letter topic instead, durably."""
        event = interpret(entry)
        if not isinstance(event, DeadLetter) or TOPIC_OF[DeadLetter] == entry.position.topic:
            return event
        self._log.append(DEAD_LETTERS, key_of(event), encode(event)).result()
        metrics.DEAD_LETTERS.labels(entry.position.topic).inc()
        log.error(
            "an entry cannot be read: %s", event.reason,
            extra={"action": "dead_letter", "topic": event.topic, "partition": event.partition, "offset": event.offset},
        )  # fmt: skip
        return None

    def _catch_up(self, store: Store) -> None:
        """Project what the store holds and the receipts do not tell yet."""
        progress = self._receipts.progress()
        for topic in PROJECTED:
            start = {p: progress.get(f"{topic}/{p}", 0) for p in store.tables[topic].next_offsets()}
            events: list[tuple[AnyEvent, Any]] = []
            for told in store.tables[topic].events(start, in_order=topic == VERSIONS):
                events.append(told)
                if len(events) == CATCH_UP_EVENTS:
                    self._receipts.project(events, {})
                    events = []
            self._receipts.project(events, {})
        self._receipts.project([], progress_of(store.offsets()))

    def _measure_lag(self, reader: Reader) -> None:
        if time.monotonic() - self._lag_at > LAG_EVERY_S:
            metrics.RECORDER_LAG.set(reader.lag())
            self._lag_at = time.monotonic()


def _count(item: Recorded, at_s: float) -> None:
    metrics.EVENTS_RECORDED.labels(item.entry.position.topic).inc()
    metrics.STORE_SECONDS.observe(max(0.0, at_s - item.event.occurred_at.timestamp()))
    if isinstance(item.event, PairShown):
        metrics.PAIRS_STORED.inc()
        metrics.LAST_STORED.set(at_s)


def serve(config: TelemetryConfig) -> None:
    """Run one recorder until SIGTERM."""
    event_log = open_log(config)
    recorder = Recorder(
        event_log,
        config.store_root,
        Receipts(redis_client(config)),
        batch_entries=config.recorder_batch_entries,
        flush_s=config.recorder_flush_s,
        heads=HeadFile(config.state_path, signing_key(config.state_path)),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: recorder.stop.set())
    port = metrics.expose(config.recorder_metrics_port)
    threading.Thread(target=_announce, args=(recorder, config.state_path, port), daemon=True).start()
    try:
        recorder.run()
    finally:
        event_log.close()


def _announce(recorder: Recorder, state: Path, port: int) -> None:
    recorder.is_connected.wait()
    while True:
        try:
            announce_ready(state, "recorder", metrics_url=f"http://127.0.0.1:{port}/metrics")
            break
        except OSError as error:  # a disk that is full now
            log.warning("cannot announce: %s", error, extra={"action": "not_announced"})
            time.sleep(RETRY_S)
    log.info("recording", extra={"action": "recorder_ready"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m telemetry.recorder", description="Event log to preference store.")
    parser.add_argument("--config", type=Path, required=True, help="the deployment's TOML")
    arguments = parser.parse_args()
    go_without("pandas")  # 60 MB, which pyarrow would load to ask whether a list is a Series
    logs.configure("recorder")
    try:
        serve(read_table(arguments.config, "telemetry", TelemetryConfig))
    except (PositionLost, StoreDamaged) as error:
        action = "position_lost" if isinstance(error, PositionLost) else "store_damaged"
        log.critical("%s", error, extra={"action": action})
        sys.exit(3)


if __name__ == "__main__":
    main()
