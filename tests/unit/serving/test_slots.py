"""The slot table: reserve, ready, pin, drain, free."""

from __future__ import annotations

import pytest

from serving.errors import InvalidRequest, NoFreeSlot, VersionNotReady, VersionUnknown
from serving.slots import SlotTable


def ready(table: SlotTable, *versions: str) -> None:
    for version in versions:
        table.reserve(version)
        table.set_ready(version)


def test_the_base_sits_in_slot_zero_and_is_always_ready() -> None:
    table = SlotTable(2, "base")
    assert table.pin("base") == 0
    assert table.names("ready") == ("base",)
    with pytest.raises(InvalidRequest):
        table.drain("base")


def test_a_loading_version_takes_no_request_but_its_warming_one() -> None:
    table = SlotTable(2, "base")
    slot = table.reserve("v1")
    with pytest.raises(VersionNotReady, match="loading"):
        table.pin("v1")
    assert table.pin("v1", is_warming=True) == slot


def test_slots_run_out_and_come_back() -> None:
    table = SlotTable(2, "base")
    ready(table, "v1", "v2")
    with pytest.raises(NoFreeSlot, match="v1, v2"):
        table.reserve("v3")
    table.drain("v1").result(0)
    table.free("v1")
    assert table.reserve("v3") is not None


def test_a_drain_ends_with_the_last_request_and_not_before() -> None:
    table = SlotTable(1, "base")
    ready(table, "v1")
    table.pin("v1")
    table.pin("v1")
    idle = table.drain("v1")
    table.unpin("v1")
    assert not idle.done()
    assert table.free("v1") is None
    table.unpin("v1")
    assert idle.done()
    assert table.free("v1") is not None
    assert table.free_slots() == 1


def test_a_failed_load_gives_its_slot_back_and_its_reason_out_until_it_succeeds() -> None:
    table = SlotTable(1, "base")
    table.reserve("v1")
    table.fail("v1", "wrong shape")
    assert (table.free_slots(), table.failed()) == (1, {"v1": "wrong shape"})
    ready(table, "v1")
    assert table.failed() == {}


def test_a_version_that_is_not_held_cannot_be_drained() -> None:
    with pytest.raises(VersionUnknown):
        SlotTable(1, "base").drain("v1")
