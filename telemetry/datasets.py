"""Versioned data sets: which verdicts, exactly, for ever. An id is a table version, a filter and a digest.

A data set copies nothing. It names a version of the table ``preferences``, which keeps that version's files as long
as a data set does (``Table.compact``), and a filter; read again, it gives the same verdicts, or fails where a byte
differs. Of a person who was erased meanwhile the verdicts are still counted and still have their digest; their texts
are gone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError

from telemetry.events import PREFERENCES, PreferenceRecorded, PreferenceRetracted, utc_now
from telemetry.rows import TABLE_OF
from telemetry.sealing import Sealer

TABLE: Final = "datasets"
_TIME: Final = pa.timestamp("us", tz="UTC")
_SCHEMA: Final = pa.schema(
    [
        ("id", pa.string()), ("created_at", _TIME), ("created_by", pa.string()), ("table_version", pa.int64()),
        ("filter", pa.string()), ("verdicts", pa.int64()), ("digest", pa.string()), ("note", pa.string()),
    ]
)  # fmt: skip


Stratum = Literal["cohort", "source", "cluster", "variants"]
STRATA: Final[tuple[Stratum, ...]] = get_args(Stratum)
_STRATA: Final[dict[Stratum, tuple[str, ...]]] = {
    "cohort": ("cohort",),
    "source": ("source",),
    "cluster": ("cluster",),
    "variants": ("chosen_variant", "rejected_variant"),
}


class Filter(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Which verdicts; what is empty does not choose."""

    policy: str = ""
    cohort: str = ""
    cluster: str = ""  # of similar prompts, as `export --format events` or a query of the table shows it
    source: str = ""
    labeler: str = ""
    outcome: str = ""
    variant: str = ""  # that is one of the two sides
    against: str = ""  # that is the other one
    version: str = ""  # that is one of the two sides
    since: datetime | None = None  # given then or later
    until: datetime | None = None  # given before
    sample: int = 0  # of these at most so many, at random
    seed: int = 0
    per: Stratum | None = None  # as many of each cohort, source, cluster or pair of variants, as far as there are any

    def wanted(self) -> Any:
        """The filter as an Arrow expression over table ``preferences``."""
        found = pc.field("type") == PreferenceRecorded.__name__
        for name in ("policy", "cohort", "cluster", "source", "labeler", "outcome"):
            if value := getattr(self, name):
                found &= pc.field(name) == value
        for name, value in (("variant", self.variant), ("variant", self.against), ("version", self.version)):
            if value:
                found &= (pc.field(f"chosen_{name}") == value) | (pc.field(f"rejected_{name}") == value)
        if self.against and self.against == self.variant:  # then it is both sides
            found &= pc.field("chosen_variant") == pc.field("rejected_variant")
        if self.since is not None:
            found &= pc.field("occurred_at") >= pa.scalar(self.since, _TIME)
        if self.until is not None:
            found &= pc.field("occurred_at") < pa.scalar(self.until, _TIME)
        return found


class Dataset(msgspec.Struct, frozen=True):
    """A data set as it was made."""

    id: str
    created_at: datetime
    created_by: str
    table_version: int
    filter: Filter
    verdicts: int
    digest: str  # SHA-256 over every verdict's id and event
    note: str = ""


class DatasetUnknown(LookupError):
    """no data set, or more than one, is called that; `tiebreak datasets list` names them"""

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.__doc__}"


class DatasetChanged(RuntimeError):
    """The table no longer gives what the data set was made of: restore the store."""


class Datasets:
    """The data sets of one store. Several processes may make some at once."""

    def __init__(self, store_root: str | Path) -> None:
        self._root = str(store_root)

    def create(self, chosen: Filter, *, by: str, note: str = "") -> Dataset:
        """Make one of what the store holds now; the same again is the one that is there. Raises DatasetUnknown."""
        if not DeltaTable.is_deltatable(self._table):
            raise DatasetUnknown(f"verdicts in {self._root}")
        version = DeltaTable(self._table).version()
        digest, ids = _digest(self._rows(version, chosen))
        name = f"ds-{hashlib.sha256(msgspec.json.encode([chosen, digest])).hexdigest()[:12]}"
        for known in self.all():
            if known.id == name:
                return known
        made = Dataset(name, utc_now(), by, version, chosen, len(ids), digest, note)
        row = msgspec.structs.asdict(made) | {"filter": msgspec.json.encode(chosen).decode()}
        write_deltalake(f"{self._root}/{TABLE}", pa.Table.from_pylist([row], schema=_SCHEMA), mode="append")
        return made

    def all(self) -> list[Dataset]:
        """Every data set, oldest first."""
        uri = f"{self._root}/{TABLE}"
        if not DeltaTable.is_deltatable(uri):
            return []
        rows = DeltaTable(uri).to_pyarrow_dataset().to_table(use_threads=False).to_pylist()
        found = [Dataset(**row | {"filter": msgspec.json.decode(row["filter"], type=Filter)}) for row in rows]
        first: dict[str, Dataset] = {}
        for each in sorted(found, key=lambda each: each.created_at):
            first.setdefault(each.id, each)  # made twice at once: the same
        return list(first.values())

    def named(self, name: str) -> Dataset:
        """The one called ``name``, or by a beginning of it that is no other's. Raises DatasetUnknown."""
        found = [each for each in self.all() if each.id.startswith(name)]
        if len(found) != 1:
            raise DatasetUnknown(name)
        return found[0]

    def ids(self, dataset: Dataset) -> set[str]:
        """Its preference ids. Raises DatasetChanged."""
        return set(self._require(dataset, self._rows(dataset.table_version, dataset.filter)))

    def verdicts(self, dataset: Dataset, sealer: Sealer) -> Iterator[PreferenceRecorded]:
        """Its verdicts with their texts, by id; without those of people who are forgotten. Raises DatasetChanged."""
        rows = self._rows(dataset.table_version, dataset.filter)
        self._require(dataset, rows)
        return sealer.opened(sorted(rows, key=lambda row: row["preference_id"]))

    def payloads(self, dataset: Dataset) -> list[bytes]:
        """Its verdicts as they were logged, with sealed texts, in the order in which they were given."""
        rows = self._rows(dataset.table_version, dataset.filter)
        self._require(dataset, rows)
        rows.sort(key=lambda row: (row["occurred_at"], row["preference_id"]))
        return [row["event"].encode() for row in rows]

    def _require(self, dataset: Dataset, rows: list[dict[str, Any]]) -> list[str]:
        """The ids in ``rows``. Raises DatasetChanged where they are not what it was made of."""
        digest, ids = _digest(rows)
        if digest != dataset.digest:
            raise DatasetChanged(f"{dataset.id}: {DatasetChanged.__doc__}")
        return ids

    @property
    def _table(self) -> str:
        return f"{self._root}/{TABLE_OF[PREFERENCES]}"

    def _rows(self, version: int, chosen: Filter) -> list[dict[str, Any]]:
        """The chosen verdicts that nobody had taken back in that version of the table."""
        try:
            data = DeltaTable(self._table, version=version).to_pyarrow_dataset()
            columns = ["preference_id", "event", "occurred_at", *(_STRATA[chosen.per] if chosen.per else ())]
            rows = data.to_table(columns=columns, filter=chosen.wanted(), use_threads=False).to_pylist()
            is_retraction = pc.field("type") == PreferenceRetracted.__name__
            taken_back = data.to_table(columns=columns[:1], filter=is_retraction, use_threads=False)
        except (OSError, pa.ArrowInvalid, DeltaError) as error:
            raise DatasetChanged(f"version {version} of {self._table} cannot be read: {error}") from error
        gone = set(taken_back["preference_id"].to_pylist())
        return _sampled([row for row in rows if row["preference_id"] not in gone], chosen)


def _sampled(rows: list[dict[str, Any]], chosen: Filter) -> list[dict[str, Any]]:
    """At most ``chosen.sample`` of ``rows``, at random, the same ones each time: of each stratum one, then another."""
    if not chosen.sample:
        return rows

    def place(row: dict[str, Any]) -> bytes:
        return hashlib.sha256(f"{chosen.seed}/{row['preference_id']}".encode()).digest()

    turns: Counter[tuple[str, ...]] = Counter()
    dealt: list[tuple[int, bytes, dict[str, Any]]] = []
    for at, row in sorted(((place(row), row) for row in rows), key=lambda each: each[0]):
        stratum = tuple(sorted(row[name] for name in _STRATA[chosen.per])) if chosen.per else ()
        dealt.append((turns[stratum], at, row))
        turns[stratum] += 1
    dealt.sort(key=lambda each: each[:2])
    return [row for _, _, row in dealt[: chosen.sample]]


def _digest(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """SHA-256 over every verdict's id and event, in the order of ids; and the ids."""
    found = hashlib.sha256()
    ordered = sorted(rows, key=lambda row: row["preference_id"])
    for row in ordered:
        found.update(hashlib.sha256(row["preference_id"].encode()).digest())
        found.update(hashlib.sha256(row["event"].encode()).digest())
    return found.hexdigest(), [row["preference_id"] for row in ordered]


def kept_versions(root: str, topic: str) -> list[int]:
    """Versions of a topic's table whose files a data set needs."""
    return sorted({each.table_version for each in Datasets(root).all()}) if topic == PREFERENCES else []
