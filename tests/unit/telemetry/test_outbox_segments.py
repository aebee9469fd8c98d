"""The outbox's segment files."""

from __future__ import annotations

from pathlib import Path

import pytest

from telemetry.outbox import Segments, Spooled, frame, read_segment

ENTRIES = [Spooled("topic", f"key-{n}", bytes([n]) * n) for n in range(5)]
CONTENT = b"".join(frame(entry) for entry in ENTRIES)


def test_entries_come_back_as_they_were_written(tmp_path: Path) -> None:
    segments = Segments(tmp_path)
    for entry in ENTRIES:
        segments.write(frame(entry))

    path = segments.oldest()

    assert path is not None
    assert list(read_segment(path)) == ENTRIES
    segments.close()


@pytest.mark.parametrize("cut", range(1, len(frame(ENTRIES[-1]))))
def test_a_segment_torn_anywhere_in_its_last_entry_gives_the_others(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "1.segment"
    path.write_bytes(CONTENT[:-cut])

    assert list(read_segment(path)) == ENTRIES[:-1]


def test_a_damaged_entry_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "1.segment"
    path.write_bytes(CONTENT[:-1] + b"\xff")

    assert list(read_segment(path)) == ENTRIES[:-1]


def test_what_is_written_after_the_oldest_was_taken_goes_to_another_segment(tmp_path: Path) -> None:
    segments = Segments(tmp_path)
    segments.write(frame(ENTRIES[0]))
    taken = segments.oldest()
    segments.write(frame(ENTRIES[1]))

    assert taken is not None
    assert list(read_segment(taken)) == ENTRIES[:1]
    taken.unlink()
    following = segments.oldest()
    assert following is not None
    assert list(read_segment(following)) == ENTRIES[1:2]
    segments.close()


def test_a_new_owner_never_appends_to_an_old_segment(tmp_path: Path) -> None:
    first = Segments(tmp_path)
    first.write(frame(ENTRIES[0]))
    first.close()
    second = Segments(tmp_path)
    second.write(frame(ENTRIES[1]))

    assert [list(read_segment(path)) for path in second.paths()] == [ENTRIES[:1], ENTRIES[1:2]]
    second.close()
