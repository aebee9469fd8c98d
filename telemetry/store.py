"""The preference store: one Delta table per topic, every event in it exactly once.

A commit holds the rows and, as Delta app transactions, the log offsets they end at. delta-rs accepts a replayed
transaction, so the check is ours: always on the one DeltaTable object that also writes; a second writer then fails
its commit. An event_id seen within the window is not stored again. Below the writer are the functions that read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from deltalake import CommitProperties, DeltaTable, QueryBuilder, Schema, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from telemetry.audit import START, Head, HeadFile, link
from telemetry.conversation import conversation, tools_of
from telemetry.crashpoints import reach
from telemetry.datasets import kept_versions
from telemetry.errors import StoreDamaged
from telemetry.event_log import Entry, Offsets
from telemetry.events import AUDIT, PREFERENCES, AnyEvent, PreferenceRecorded, decode, utc_now
from telemetry.rows import SCHEMAS, TABLE_OF, row_of
from telemetry.sealing import Sealer

log = logging.getLogger(__name__)

WINDOW_EVENTS: Final = 100_000  # event_ids remembered per table
WINDOW: Final = timedelta(days=7)  # and for how long
COMPACT_EVERY: Final = 200  # commits
REOPEN_EVERY: Final = 50  # commits
COMPACT_BYTES: Final = 2 << 20  # files above this are left alone; joining takes some seven times as much memory
KEEP_LOG: Final = "delta.enableExpiredLogCleanup"
KEEP_OLD_FILES_H: Final = 1  # so long a reader may hold on to a snapshot


class Recorded(msgspec.Struct, frozen=True):
    """An entry and the valid event in it."""

    entry: Entry
    event: AnyEvent


class StoreContended(RuntimeError):
    """Another process wrote to the store: run one recorder per store; open it again to continue."""


@contextmanager
def readable(table: str) -> Iterator[None]:
    """Raise StoreDamaged for what Arrow or delta-rs say of damaged files."""
    try:
        yield
    except (pa.ArrowInvalid, DeltaError, FileNotFoundError) as error:
        raise StoreDamaged(table, error) from error


def answer(table: DeltaTable, query: str) -> pa.RecordBatchReader:
    """What delta-rs's own SQL engine says about ``table``, called ``t``.

    The recorder reads by it: pyarrow's data sets cost a process 50 MB for their libraries alone, and hold what they
    sort. Raises DeltaError for what is no query, pyarrow.ArrowInvalid for a file that is damaged or gone.
    """
    return pa.RecordBatchReader.from_stream(QueryBuilder().register("t", table).execute(query))


class Table:
    """One topic's table, with its offsets and the event_ids it saw lately."""

    def __init__(self, root: str, topic: str) -> None:
        self._root, self.topic = root, topic
        self.name = TABLE_OF[topic]
        self._schema = SCHEMAS[self.name]
        uri = f"{root}/{self.name}"
        with readable(uri):
            is_new = not DeltaTable.is_deltatable(uri)
            self._delta = DeltaTable.create(uri, schema=self._schema) if is_new else DeltaTable(uri)
            self._add_columns()
            if topic == PREFERENCES:
                self._keep_history()
            self._seen: dict[str, None] = dict.fromkeys(self._recent_ids())
        self._commits = 0

    def next_offsets(self) -> dict[int, int]:
        """partition → next offset to read."""
        partitions = self._delta.transaction_version(f"{self.topic}/partitions") or 0
        found = {partition: self._delta.transaction_version(self._app(partition)) for partition in range(partitions)}
        return {partition: offset for partition, offset in found.items() if offset is not None}

    def append(self, recorded: Sequence[Recorded], reached: Mapping[int, int], at: datetime) -> list[Recorded]:
        """Commit what is new of ``recorded`` together with the offsets ``reached``; what was new."""
        start = self.next_offsets()
        reached = {partition: offset for partition, offset in reached.items() if offset > start.get(partition, 0)}
        if not reached:
            return []
        new: dict[str, Recorded] = {}
        for item in recorded:
            position, event_id = item.entry.position, item.event.event_id
            if position.offset >= start.get(position.partition, 0) and event_id not in self._seen:
                new.setdefault(event_id, item)
        self._commit([row_of(item.event, item.entry, at) for item in new.values()], reached)
        self._remember(new)
        return list(new.values())

    def events(self, start: Mapping[int, int], *, in_order: bool = False) -> Iterator[tuple[AnyEvent, datetime]]:
        """(event, recorded_at) of every stored event at or after ``start``, a partition's ``in_order`` or in none."""
        order = 'order by "offset"' if in_order else ""
        for partition in sorted(self.next_offsets()):
            wanted = f'"partition" = {partition} and "offset" >= {start.get(partition, 0)}'
            for batch in answer(self._delta, f"select event, recorded_at from t where {wanted} {order}"):
                for row in batch.to_pylist():
                    yield decode(row["event"].encode()), row["recorded_at"]

    def last_recorded_at(self) -> datetime | None:
        """When the newest row was stored."""
        actions = pa.table(self._delta.get_add_actions(flatten=True))
        if not actions.num_rows:
            return None
        newest: datetime | None = pc.max(actions.column("max.recorded_at")).as_py()
        return newest

    def compact(self) -> None:
        """Join small files, and delete those that no reader and no data set needs any more."""
        self._delta.optimize.compact(target_size=COMPACT_BYTES, max_concurrent_tasks=1)
        self._delta.vacuum(
            retention_hours=KEEP_OLD_FILES_H,
            dry_run=False,
            enforce_retention_duration=False,
            keep_versions=kept_versions(self._root, self.topic),
        )
        pa.default_memory_pool().release_unused()

    def _add_columns(self) -> None:
        """A table of an earlier version of this program gets the columns that it lacks; old rows hold nothing there."""
        known = {field.name for field in self._delta.schema().fields}
        if missing := [field for field in Schema.from_arrow(self._schema).fields if field.name not in known]:
            self._delta.alter.add_columns(missing)

    def _keep_history(self) -> None:
        """A data set's version can be read as long as its log entries are there: they are never cleaned away."""
        if self._delta.metadata().configuration.get(KEEP_LOG) != "false":
            self._delta.alter.set_table_properties({KEEP_LOG: "false"})

    def _app(self, partition: int) -> str:
        return f"{self.topic}/{partition}"

    def _commit(self, rows: list[dict[str, Any]], reached: Mapping[int, int]) -> None:
        partitions = max([*reached, *self.next_offsets()]) + 1
        transactions = [Transaction(self._app(partition), offset) for partition, offset in reached.items()]
        transactions.append(Transaction(f"{self.topic}/partitions", partitions))
        try:
            write_deltalake(
                self._delta,
                pa.Table.from_pylist(rows, schema=self._schema),
                mode="append",
                commit_properties=CommitProperties(app_transactions=transactions),
            )
        except CommitFailedError as error:
            raise StoreContended(f"{self.name}: {StoreContended.__doc__}") from error
        except DeltaError as error:  # a disk that is full, an object store that is away
            raise OSError(f"{self.name} cannot be written: {str(error).partition(chr(10))[0]}") from error
        self._commits += 1
        try:
            self._tidy()
        except (DeltaError, OSError) as error:  # the commit holds, whatever becomes of what follows it
            log.warning("%s was not tidied up: %s", self.name, error, extra={"action": "store_not_tidied"})

    def _tidy(self) -> None:
        if self._commits % COMPACT_EVERY == 0:
            self.compact()
        if self._commits % REOPEN_EVERY == 0:
            self._reopen()

    def _reopen(self) -> None:
        """Delta-rs keeps some hundred kilobytes for each commit that one object made or saw: begin with a fresh one."""
        version, fresh = self._delta.version(), DeltaTable(f"{self._root}/{self.name}")
        if fresh.version() != version:
            raise StoreContended(f"{self.name}: {StoreContended.__doc__}")
        self._delta = fresh

    def _recent_ids(self) -> list[str]:
        """The newest event_ids, oldest first."""
        recent = f"recorded_at >= timestamp '{(utc_now() - WINDOW).isoformat()}'"
        newest_first = f"order by recorded_at desc limit {WINDOW_EVENTS}"
        found = answer(self._delta, f"select event_id, recorded_at from t where {recent} {newest_first}").read_all()
        ids: list[str] = found.column("event_id").to_pylist()
        return ids[::-1]

    def _remember(self, ids: Mapping[str, Recorded]) -> None:
        self._seen.update(dict.fromkeys(ids))
        for event_id in list(islice(self._seen, max(0, len(self._seen) - WINDOW_EVENTS))):
            del self._seen[event_id]


class AuditTable(Table):
    """The audit trail: rows are chained as they are stored (telemetry/audit.py)."""

    def __init__(self, root: str, heads: HeadFile | None) -> None:
        """A head that is not on the table's chain stays as it is: so entries that are missing stay found out."""
        super().__init__(root, AUDIT)
        newest = answer(self._delta, "select number, hash from t order by number desc limit 1").read_all().to_pylist()
        self._end = Head(newest[0]["number"] + 1, newest[0]["hash"]) if newest else Head(0, START)
        self._heads = self._taken_up(heads) if heads is not None else None

    def _taken_up(self, heads: HeadFile) -> HeadFile | None:
        """``heads``, if its head is on the chain; one is written before the first entry. None, and an error, if not."""
        try:
            head, why = heads.read(), "is missing"
        except ValueError as error:
            head, why = None, str(error)
        if head is None and why == "is missing" and not self._end.rows:
            heads.write(0, START)
            return heads
        if head is not None:
            last = f"select hash from t where number = {head.rows - 1}"
            hashes = answer(self._delta, last).read_all().column("hash").to_pylist() if head.rows else [START]
            if hashes == [head.hash]:
                return heads
            why = f"counts {head.rows} entries, and the trail's {head.rows}th is not the one that it names"
        log.error(
            "the audit trail's signed head %s: it is not written any more, see `tiebreak audit verify`", why,
            extra={"action": "audit_broken"},
        )  # fmt: skip
        return None

    def _commit(self, rows: list[dict[str, Any]], reached: Mapping[int, int]) -> None:
        end = link(rows, self._end)
        super()._commit(rows, reached)
        self._end = end
        if self._heads is not None and rows:
            self._heads.write(end.rows, end.hash)


class Store:
    """Every table under one folder or object-store URL. One process writes."""

    def __init__(self, root: Path | str, heads: HeadFile | None = None) -> None:
        """``heads``: where the audit trail's end is kept, signed."""
        root = str(root)
        if "://" not in root:
            Path(root).mkdir(parents=True, exist_ok=True)
        self.tables = {topic: AuditTable(root, heads) if topic == AUDIT else Table(root, topic) for topic in TABLE_OF}

    def offsets(self) -> Offsets:
        """Where each topic's reader continues."""
        return {topic: offsets for topic, table in self.tables.items() if (offsets := table.next_offsets())}

    def append(self, recorded: Sequence[Recorded], reached: Offsets) -> tuple[list[Recorded], datetime]:
        """Commit a batch, one commit per topic; what was new in it, and the time it was stored."""
        at = utc_now()
        stored: list[Recorded] = []
        for topic, offsets in reached.items():
            items = [item for item in recorded if item.entry.position.topic == topic]
            stored += self.tables[topic].append(items, offsets, at)
            reach("recorder.topic_committed")
        return stored, at


def counts(root: Path | str) -> dict[str, int]:
    """table → rows, from the tables' statistics."""
    return {name: _rows(f"{root}/{name}") for name in TABLE_OF.values()}


def _rows(uri: str) -> int:
    if not DeltaTable.is_deltatable(uri):
        return 0
    actions = pa.table(DeltaTable(uri).get_add_actions(flatten=True))
    return int(pc.sum(actions.column("num_records")).as_py() or 0)


def read(root: Path | str, topic: str, *, columns: Sequence[str] | None = None, wanted: Any = None) -> pa.Table:
    """The rows of a topic's table that are ``wanted`` (an Arrow expression), in no order; none where it does not exist.

    Read by this thread alone: Arrow's own, which call delta-rs's file system, outlive a command that ends at once, and
    the interpreter then aborts (4 to 12 of 25 runs).
    """
    uri = f"{root}/{TABLE_OF[topic]}"
    if not DeltaTable.is_deltatable(uri):
        return SCHEMAS[TABLE_OF[topic]].empty_table().select(columns or SCHEMAS[TABLE_OF[topic]].names)
    with readable(uri):
        dataset = DeltaTable(uri).to_pyarrow_dataset()
        return dataset.to_table(columns=list(columns) if columns else None, filter=wanted, use_threads=False)


def preferences(root: Path | str, *, with_retracted: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of table ``preferences`` that are verdicts; without those taken back later, in no order."""
    uri = f"{root}/{TABLE_OF[PREFERENCES]}"
    if not DeltaTable.is_deltatable(uri):
        return
    is_retraction = pc.field("type") == "PreferenceRetracted"
    retracted = set(
        read(root, PREFERENCES, columns=["preference_id"], wanted=is_retraction)["preference_id"].to_pylist()
    )
    with readable(uri):
        dataset = DeltaTable(uri).to_pyarrow_dataset()
        for batch in dataset.to_batches(filter=pc.field("type") == "PreferenceRecorded", use_threads=False):
            for row in batch.to_pylist():
                if with_retracted or row["preference_id"] not in retracted:
                    yield row


def verdicts(root: Path | str, sealer: Sealer) -> Iterator[PreferenceRecorded]:
    """The verdicts that were not taken back, with their texts; without those of people who are forgotten."""
    return sealer.opened(preferences(root))


def trl_rows(events: Iterable[PreferenceRecorded]) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Chosen/rejected verdicts as rows of TRL's conversational preference data set, with the tools offered."""
    for event in events:
        if event.outcome == "chosen_rejected":
            tools = tools_of(event.prompt)
            yield ({"tools": tools} if tools else {}) | {
                "prompt": conversation(event.prompt),
                "chosen": [{"role": "assistant", "content": event.chosen.text}],
                "rejected": [{"role": "assistant", "content": event.rejected.text}],
            }
