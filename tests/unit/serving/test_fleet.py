"""What the control loop decides from a routing table and a replica's status."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from redis.asyncio import Redis

from serving.fleet import LINGER_S, REPEAT_S, Fleet, Step, replica_record, steps_for, wanted_versions
from serving.wire import ReplicaStatus
from telemetry.routing import ReplicaTable, RoutingTable, VariantRoute, decode_replicas


def status(*versions: str, free_slots: int = 8, **changes: object) -> ReplicaStatus:
    fields: dict[str, object] = {
        "replica_id": "r1", "base": "tiny", "versions": ("base", *versions), "loading": (), "draining": (),
        "failed": {}, "in_flight": {}, "free_slots": free_slots, "queued": 0,
    }  # fmt: skip
    return ReplicaStatus(**(fields | changes))  # type: ignore[arg-type]


def route(variant: str, base: str, **channels: str) -> VariantRoute:
    fields = {"base_version": "base", "stable": "base", "previous": "base"} | channels
    return VariantRoute(variant=variant, base=base, **fields)


def test_wanted_are_all_channels_of_all_variants_of_the_base_but_not_the_base_itself() -> None:
    table = RoutingTable(
        1,
        {
            "chat": (route("main", "tiny", stable="v3", previous="v2", canary="v4"), route("calm", "tiny")),
            "other": (route("big", "large", stable="v9"), route("small", "tiny", shadow="v7")),
        },
    )
    assert wanted_versions(table, "tiny") == {"v2": "main", "v3": "main", "v4": "main", "v7": "small"}


def test_a_replica_that_holds_what_is_wanted_is_left_alone() -> None:
    assert steps_for({"v1": "main"}, status("v1")) == []


def test_unwanted_versions_go_and_missing_ones_come() -> None:
    steps = steps_for({"v2": "main", "v3": "calm"}, status("v1", "v2"))
    assert steps == [Step("DELETE", "v1", "/v1/versions/v1"), Step("PUT", "v3", "/v1/versions/calm/v3")]


def test_loading_and_draining_versions_are_waited_for() -> None:
    busy = status(loading=("v1",), draining=("v2",))
    assert steps_for({"v1": "main", "v2": "main"}, busy) == []


def test_nothing_is_loaded_into_a_full_replica() -> None:
    assert steps_for({"v1": "main", "v2": "main"}, status("v1", free_slots=0)) == []


def test_a_restarted_replica_gets_everything_back() -> None:
    verbs = [step.verb + step.version for step in steps_for({"v1": "main", "v2": "main"}, status())]
    assert verbs == ["PUTv1", "PUTv2"]


async def test_an_unwanted_version_stays_until_every_router_has_read_the_new_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr("serving.fleet.time.monotonic", lambda: now_s)
    begun: list[Step] = []

    async def carry_out(_: Fleet, url: str, step: Step) -> None:
        begun.append(step)

    monkeypatch.setattr(Fleet, "_carry_out", carry_out)
    async with aiohttp.ClientSession() as session, Redis() as nothing:
        fleet = Fleet({}, _nowhere, nothing, session)
        unload, load = steps_for({"v2": "main"}, status("v1"))

        async def look(*steps: Step) -> list[str]:
            begun.clear()
            fleet._begin("http://r1", list(steps))
            await asyncio.sleep(0)
            return [step.verb + step.version for step in begun]

        assert await look(unload, load) == ["PUTv2"]
        now_s += LINGER_S - 0.1
        assert await look(unload) == []
        assert await look() == []  # wanted again: the time starts anew
        assert await look(unload) == []
        now_s += LINGER_S
        assert await look(unload) == ["DELETEv1"]


async def _nowhere(_: str) -> list[str]:
    return []


async def test_a_change_of_the_fleet_is_written_at_once_and_its_load_now_and_then() -> None:
    written: list[float] = []

    class Table:
        async def set(self, _: str, payload: bytes) -> None:
            written.append(decode_replicas(payload).updated_at_s)

    def seen(at_s: float, in_flight: int, *, is_ready: bool = True) -> ReplicaTable:
        busy = status(in_flight={"base": in_flight})
        return ReplicaTable(at_s, (replica_record("http://r1", busy, is_ready=is_ready),))

    async with aiohttp.ClientSession() as session:
        fleet = Fleet({}, _nowhere, Table(), session)  # type: ignore[arg-type]
        for table in (seen(10.0, 0), seen(10.5, 3), seen(11.0, 3, is_ready=False), seen(11.5, 1, is_ready=False)):
            await fleet._publish(table)
        assert written == [10.0, 11.0]
        await fleet._publish(seen(11.0 + REPEAT_S, 5, is_ready=False))
    assert written == [10.0, 11.0, 11.0 + REPEAT_S]
