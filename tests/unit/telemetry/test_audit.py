"""The audit trail: any row that is changed, removed, added or moved is found, and rows cut off the end are missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable, write_deltalake

from telemetry.audit import HeadFile, faults
from telemetry.event_log import Entry, Position
from telemetry.events import AUDIT, AuditRecorded, encode
from telemetry.store import Recorded, Store, read

KEY = b"k" * 32
Rows = list[dict[str, Any]]


def stored(root: Path, count: int, *, start: int = 0) -> Store:
    """A store whose trail has entries ``start`` to ``start + count``, each stored alone."""
    store = Store(root / "store", HeadFile(root, KEY))
    for offset in range(start, start + count):
        event = AuditRecorded(actor="ann", action="exported", subject=f"set {offset}", details={"rows": str(offset)})
        entry = Entry(Position(AUDIT, 0, offset), "ann", encode(event))
        store.append([Recorded(entry, event)], {AUDIT: {0: offset + 1}})
    return store


def trail(root: Path) -> Rows:
    rows: Rows = read(root / "store", AUDIT).to_pylist()
    return sorted(rows, key=lambda row: row["number"])


def found(root: Path, rows: Rows | None = None) -> list[str]:
    return list(faults(trail(root) if rows is None else rows, HeadFile(root, KEY).read()))


def test_a_whole_trail_has_no_faults_also_when_the_recorder_starts_again_and_files_are_joined(tmp_path: Path) -> None:
    stored(tmp_path, 3)
    store = stored(tmp_path, 4, start=3)
    store.tables[AUDIT].compact()
    assert [row["number"] for row in trail(tmp_path)] == list(range(7))
    assert found(tmp_path) == []
    assert list(faults([], None)) == []


def changed_subject(rows: Rows) -> None:
    rows[2]["event"] = rows[2]["event"].replace("set 2", "set 9")


def changed_column(rows: Rows) -> None:
    rows[2]["actor"] = "bob"


def changed_time(rows: Rows) -> None:
    rows[2]["recorded_at"] = rows[3]["recorded_at"]


def removed(rows: Rows) -> None:
    del rows[2]


def swapped(rows: Rows) -> None:
    for name in ("event", "recorded_at", "event_id", "subject", "details", "occurred_at", "offset"):
        rows[2][name], rows[3][name] = rows[3][name], rows[2][name]


def renumbered(rows: Rows) -> None:
    rows[2]["number"], rows[3]["number"] = 3, 2


def doubled(rows: Rows) -> None:
    rows.append(dict(rows[2]))


def cut_off(rows: Rows) -> None:
    del rows[-1]


def emptied(rows: Rows) -> None:
    rows.clear()


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (changed_subject, r"entry 2 .* was changed"),
        (changed_column, r"entry 2 .*actor"),
        (changed_time, r"entry 2 .* was changed"),
        (removed, r"entry 3 .* some are missing"),
        (swapped, r"entry 2 .* was changed"),
        (renumbered, r"entry 2 .* does not follow"),
        (doubled, r"entry 2 .* is there twice"),
        (cut_off, r"1 entries are missing at the end"),
        (emptied, r"5 entries are missing at the end"),
    ],
)
def test_every_tampering_is_found(tamper: Callable[[Rows], None], told: str, tmp_path: Path) -> None:
    stored(tmp_path, 5)
    rows = trail(tmp_path)
    tamper(rows)
    assert any(pytest.importorskip("re").match(told, fault) for fault in found(tmp_path, rows)), found(tmp_path, rows)


def test_a_trail_forged_anew_does_not_have_the_signed_head(tmp_path: Path) -> None:
    stored(tmp_path, 3)
    other = tmp_path / "other"
    stored(other, 3)
    assert trail(tmp_path) != trail(other)
    assert list(faults(trail(other), HeadFile(tmp_path, KEY).read())) == ["the signed head names another last entry"]
    with pytest.raises(ValueError, match="not signed"):
        HeadFile(tmp_path, b"x" * 32).read()


def test_a_missing_head_is_said(tmp_path: Path) -> None:
    stored(tmp_path, 1)
    (tmp_path / "audit.head").unlink()
    assert found(tmp_path) == ["the signed head is missing: whether entries are missing at the end cannot be told"]


def test_entries_cut_off_are_missed_also_after_further_ones(tmp_path: Path) -> None:
    stored(tmp_path, 5)
    DeltaTable(str(tmp_path / "store" / "audit")).delete("number >= 3")
    stored(tmp_path, 4, start=5)
    assert [row["number"] for row in trail(tmp_path)] == list(range(7))
    assert found(tmp_path) == ["the signed head names another last entry"]


def test_a_head_that_was_removed_does_not_come_back(tmp_path: Path) -> None:
    stored(tmp_path, 2)
    (tmp_path / "audit.head").unlink()
    stored(tmp_path, 1, start=2)
    assert found(tmp_path) == ["the signed head is missing: whether entries are missing at the end cannot be told"]


def test_a_recorder_killed_before_it_wrote_the_head_goes_on(tmp_path: Path) -> None:
    stored(tmp_path, 2)
    head = (tmp_path / "audit.head").read_bytes()
    stored(tmp_path, 1, start=2)
    (tmp_path / "audit.head").write_bytes(head)
    stored(tmp_path, 1, start=3)
    assert found(tmp_path) == []
    assert HeadFile(tmp_path, KEY).read().rows == 4  # type: ignore[union-attr]


def test_tampering_in_the_table_itself_is_found(tmp_path: Path) -> None:
    """Through the files, as somebody would do it."""
    stored(tmp_path, 4)
    uri = str(tmp_path / "store" / "audit")
    table = DeltaTable(uri).to_pyarrow_table()
    kept = table.filter([value != 1 for value in table["number"].to_pylist()])
    write_deltalake(uri, kept, mode="overwrite")
    assert any("some are missing" in fault for fault in found(tmp_path))
