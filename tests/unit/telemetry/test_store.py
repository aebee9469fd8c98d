"""The preference store on a local folder."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from deltalake import DeltaTable, write_deltalake

from telemetry import rows as store_rows
from telemetry.errors import StoreDamaged
from telemetry.event_log import Entry, Offsets, Position
from telemetry.events import (
    PREFERENCES,
    TOPIC_OF,
    TOPICS,
    AnyEvent,
    DeadLetter,
    Message,
    ToolCall,
    decode,
    encode,
    key_of,
)
from telemetry.recorder import interpret, progress_of, reached
from telemetry.rows import TABLE_OF
from telemetry.sealing import Sealer
from telemetry.store import COMPACT_EVERY, Recorded, Store, StoreContended, counts, preferences, trl_rows, verdicts
from tests import examples
from tests.tool_model import SCHEMAS, tool


def recorded(*events: AnyEvent, start: int = 0, partition: int = 0) -> list[Recorded]:
    return [
        Recorded(Entry(Position(TOPIC_OF[type(event)], partition, start + n), key_of(event), encode(event)), event)
        for n, event in enumerate(events)
    ]


def append(store: Store, items: list[Recorded]) -> int:
    stored, _ = store.append(items, reached(item.entry for item in items))
    return len(stored)


def test_offsets_are_committed_with_the_rows(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.offsets() == {}

    append(store, recorded(examples.preference(1), examples.preference(2), start=7))
    append(store, recorded(examples.preference(3), start=100, partition=3))

    expected: Offsets = {PREFERENCES: {0: 9, 3: 101}}
    assert store.offsets() == expected
    assert Store(tmp_path).offsets() == expected


def test_rows_are_stored_though_a_lost_file_keeps_small_ones_from_being_joined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    for number in range(COMPACT_EVERY + 1):
        if number == COMPACT_EVERY - 1:
            next((tmp_path / TABLE_OF[PREFERENCES]).rglob("*.parquet")).unlink()
        append(store, recorded(examples.preference(number), start=number))
    assert store.offsets() == {PREFERENCES: {0: COMPACT_EVERY + 1}}
    assert "was not tidied up" in caplog.text


def test_entries_before_the_stored_offset_are_not_stored_again(tmp_path: Path) -> None:
    items = recorded(*(examples.preference(n) for n in range(4)))
    append(Store(tmp_path), items[:3])

    store = Store(tmp_path)
    store.tables[PREFERENCES]._seen.clear()  # as when the window was too short: the offsets alone must do
    assert append(store, items) == 1
    assert counts(tmp_path)["preferences"] == 4


def test_one_event_at_two_offsets_is_stored_once_also_after_a_restart(tmp_path: Path) -> None:
    event = examples.preference(1)
    store = Store(tmp_path)
    assert append(store, recorded(event, event)) == 1
    assert append(store, recorded(event, start=2)) == 0
    assert append(Store(tmp_path), recorded(event, start=3)) == 0
    assert counts(tmp_path)["preferences"] == 1
    assert Store(tmp_path).offsets() == {PREFERENCES: {0: 4}}


def test_a_batch_of_nothing_valid_moves_the_offset(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stored, _ = store.append([], {PREFERENCES: {0: 5}})
    assert stored == []
    assert Store(tmp_path).offsets() == {PREFERENCES: {0: 5}}


def test_a_table_of_an_earlier_version_gets_the_columns_that_it_lacks(tmp_path: Path) -> None:
    schema = store_rows.SCHEMAS["versions"]
    older = schema.remove(schema.get_field_index("replayed_ids"))
    DeltaTable.create(tmp_path / "versions", schema=older)
    write_deltalake(tmp_path / "versions", pa.table({"event_id": ["old"], "step": pa.array([1], pa.int64())}),
                    mode="append", schema_mode="merge")  # fmt: skip

    event = msgspec.structs.replace(examples.batch(2, ["a"]), replayed_ids=("b",))
    append(Store(tmp_path), recorded(event))

    rows = DeltaTable(tmp_path / "versions").to_pyarrow_table().to_pylist()
    assert {row["event_id"]: row["replayed_ids"] for row in rows} == {"old": None, event.event_id: ["b"]}


def test_a_second_writer_is_refused_and_stores_nothing(tmp_path: Path) -> None:
    first, second = Store(tmp_path), Store(tmp_path)
    append(first, recorded(examples.preference(1)))

    with pytest.raises(StoreContended, match="one recorder per store"):
        append(second, recorded(examples.preference(2)))

    assert counts(tmp_path)["preferences"] == 1


def test_compaction_joins_files_and_loses_neither_rows_nor_offsets(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for n in range(12):
        append(store, recorded(examples.preference(n), start=n))

    store.tables[PREFERENCES].compact()

    assert len(DeltaTable(tmp_path / "preferences").file_uris()) == 1
    assert append(store, recorded(examples.preference(12), start=12)) == 1
    assert {row["pair_id"] for row in preferences(tmp_path)} == {f"pair-{n}" for n in range(13)}
    assert Store(tmp_path).offsets() == {PREFERENCES: {0: 13}}


def test_every_kind_of_event_has_its_columns_and_comes_back_whole(tmp_path: Path) -> None:
    verdict = examples.preference(1)
    dead = DeadLetter(topic=PREFERENCES, partition=0, offset=1, reason="nonsense", payload=b"\xff\x00")
    events: list[AnyEvent] = [
        examples.pair(1), verdict, examples.retraction(verdict), examples.feedback(1), examples.served(1),
        examples.batch(1, [verdict.event_id]), examples.published("v000001-aaaaaaaa", [verdict.event_id]),
        examples.release("v000001-aaaaaaaa", "stable"), dead, examples.audit(1),
    ]  # fmt: skip
    store = Store(tmp_path)
    for n, event in enumerate(events):
        assert append(store, recorded(event, start=n)) == 1

    assert counts(tmp_path) == {
        "pairs": 1, "preferences": 2, "feedback": 1, "completions": 1, "versions": 3, "dead_letters": 1,
        "audit": 1,
    }  # fmt: skip
    found = [event for topic in TOPICS for event, _ in store.tables[topic].events({}, in_order=True)]
    assert {event.event_id: event for event in found} == {event.event_id: event for event in events}
    row = next(preferences(tmp_path, with_retracted=True))
    assert (row["chosen_text"], row["rejected_text"], row["outcome"]) == ("good 1", "bad 1", "chosen_rejected")
    assert row["shown_at"] == examples.SHOWN_AT
    assert row["reasons"] == ["shorter"]
    assert DeltaTable(tmp_path / "dead_letters").to_pyarrow_table()["payload"][0].as_py() == b"\xff\x00"


def test_the_export_holds_verdicts_that_say_what_is_better_and_were_not_taken_back(tmp_path: Path) -> None:
    kept, taken_back = examples.preference(1), examples.preference(2)
    tie = examples.preference(3, outcome="tie")
    append(Store(tmp_path), recorded(kept, taken_back, tie, examples.retraction(taken_back)))

    assert list(trl_rows(verdicts(tmp_path, Sealer(None)))) == [
        {
            "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "question 1?"}],
            "chosen": [{"role": "assistant", "content": "good 1"}],
            "rejected": [{"role": "assistant", "content": "bad 1"}],
        }
    ]


def test_an_export_has_the_tools_and_calls_that_the_prompt_had(tmp_path: Path) -> None:
    offered = tool()
    asked = Message("user", "How is Bern?", tools=(offered,))
    call = ToolCall("call_1", "get_weather", '{"city": "Bern"}')
    talk = (asked, Message("assistant", "", tool_calls=(call,)), Message("tool", "sunny", tool_call_id="call_1"))
    append(Store(tmp_path), recorded(msgspec.structs.replace(examples.preference(1), prompt=talk)))

    (row,) = trl_rows(verdicts(tmp_path, Sealer(None)))
    function = {"name": "get_weather", "description": offered.description, "parameters": SCHEMAS["get_weather"]}
    assert row["tools"] == [{"type": "function", "function": function}]
    assert row["prompt"][1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": {"city": "Bern"}}
    assert row["prompt"][2] == {"role": "tool", "content": "sunny", "tool_call_id": "call_1"}


def test_an_empty_store_exports_nothing(tmp_path: Path) -> None:
    assert list(trl_rows(verdicts(tmp_path / "none", Sealer(None)))) == []
    assert set(counts(tmp_path / "none").values()) == {0}


def test_an_invalid_entry_becomes_the_same_dead_letter_every_time() -> None:
    entry = Entry(Position(PREFERENCES, 2, 40), "k", b"{}")

    letter = interpret(entry)

    assert isinstance(letter, DeadLetter)
    assert (letter.topic, letter.partition, letter.offset, letter.payload) == (PREFERENCES, 2, 40, b"{}")
    assert letter.event_id == interpret(entry).event_id
    other = interpret(msgspec.structs.replace(entry, position=Position(PREFERENCES, 2, 41)))
    assert other.event_id != letter.event_id


def test_an_oversized_invalid_entry_still_fits_into_the_log() -> None:
    letter = interpret(Entry(Position(PREFERENCES, 0, 1), "k", b"x" * 1_000_000))

    assert isinstance(letter, DeadLetter)
    assert "first 700000 of 1000000 bytes" in letter.reason
    assert len(encode(letter)) < 1_000_000
    assert decode(encode(letter)) == letter


def test_progress_names_the_partitions_receipts_depend_on() -> None:
    items = recorded(examples.pair(1), examples.preference(1)) + recorded(examples.preference(2), start=9, partition=1)

    assert progress_of(reached(item.entry for item in items)) == {
        "tiebreak.preferences.v1/0": 2,
        "tiebreak.preferences.v1/1": 10,
    }


@pytest.mark.parametrize("damage", ["half a file", "no file", "half a log entry"])
def test_a_damaged_store_says_which_table_and_what_to_do(damage: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    append(store, recorded(examples.preference(1)))
    pattern = "_delta_log/*.json" if damage == "half a log entry" else "*.parquet"
    victim = sorted((tmp_path / "preferences").glob(pattern))[-1]
    victim.unlink() if damage == "no file" else victim.write_bytes(victim.read_bytes()[:40])
    for look in (lambda: Store(tmp_path), lambda: list(verdicts(tmp_path, Sealer(None)))):
        with pytest.raises(StoreDamaged, match=r"preferences: .*restore it.*log still holds is not lost"):
            look()


def test_events_are_read_in_order_from_where_they_are_asked_for(tmp_path: Path) -> None:
    store, given = Store(tmp_path), [examples.preference(n) for n in range(4)]
    for n, event in enumerate(given):
        append(store, recorded(event, start=n))

    found = [event for event, _ in store.tables[PREFERENCES].events({0: 1}, in_order=True)]

    assert found == given[1:]


def test_a_store_that_is_opened_again_remembers_the_newest_events_and_forgets_the_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("telemetry.store.WINDOW_EVENTS", 2)
    store, given = Store(tmp_path), [examples.preference(n) for n in range(4)]
    for n, event in enumerate(given[:3]):
        append(store, recorded(event, start=n))

    store = Store(tmp_path)

    assert append(store, recorded(given[3], start=3)) == 1
    assert append(store, recorded(given[2], start=4)) == 0, "remembered"
    assert append(store, recorded(given[1], start=5)) == 1, "no longer"
