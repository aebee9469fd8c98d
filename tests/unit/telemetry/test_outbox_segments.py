"""The outbox's segment files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from telemetry.outbox import Segments, Spooled, _write_all, frame, read_segment

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


def test_zeros_that_a_power_cut_left_behind_are_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "1.segment"
    path.write_bytes(CONTENT + bytes(100))

    assert list(read_segment(path)) == ENTRIES


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


def test_nothing_is_written_behind_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = Segments(tmp_path)
    segments.write(frame(ENTRIES[0]))
    with monkeypatch.context() as patch:
        patch.setattr("telemetry.outbox.os.fsync", _no_space)
        with pytest.raises(OSError, match="no space"):
            segments.write(frame(ENTRIES[1])[:-3])
    segments.write(frame(ENTRIES[2]))

    torn, following = segments.paths()
    assert list(read_segment(torn)) == ENTRIES[:1]
    assert list(read_segment(following)) == ENTRIES[2:3]
    segments.close()


def test_a_file_that_takes_a_few_bytes_at_a_time_gets_them_all() -> None:
    class Slow(io.BytesIO):
        def write(self, content: Any) -> int:
            return super().write(bytes(content[:7]))

    file = Slow()
    _write_all(file, CONTENT)
    assert file.getvalue() == CONTENT


def _no_space(_: int) -> None:
    raise OSError("no space left on device")
