"""What operators see of the fleet: routing and replica table joined. Pure."""

from __future__ import annotations

from router.admin import held_versions
from telemetry.routing import Replica, ReplicaTable, RoutingTable, VariantRoute

BASE, STABLE, CANARY, BAD, OLD = (f"v{number:06d}-1a2b3c4d" for number in range(5))
ROUTE = VariantRoute(
    variant="main", base="small", base_version=BASE, stable=STABLE, previous=BASE, canary=CANARY, shadow=BAD
)


def test_each_version_shows_its_state_its_load_and_what_it_is_there_for() -> None:
    replica = Replica(
        replica_id="r1", base="small", url="http://r1", is_ready=True, versions=(BASE, STABLE), in_flight=3,
        free_slots=1, loading=(CANARY,), draining=(OLD,), failed={BAD: "wrong shapes"},
        in_flight_by_version={STABLE: 2, OLD: 1},
    )  # fmt: skip
    seen = held_versions(RoutingTable(1, {"chat": (ROUTE,)}), ReplicaTable(7.0, (replica,)))
    assert (seen.updated_at_s, seen.replicas[0].free_slots, seen.replicas[0].in_flight) == (7.0, 1, 3)
    rows = {held.version: (held.state, held.in_flight, held.wanted_by) for held in seen.replicas[0].versions}
    assert rows == {
        BASE: ("ready", 0, ("main previous", "main base")),
        STABLE: ("ready", 2, ("main stable",)),
        CANARY: ("loading", 0, ("main canary",)),
        BAD: ("failed", 0, ("main shadow",)),
        OLD: ("draining", 1, ()),
    }
    assert [held.reason for held in seen.replicas[0].versions if held.state == "failed"] == ["wrong shapes"]


def test_a_version_of_another_base_is_wanted_by_nobody_here() -> None:
    replica = Replica("r1", "large", "http://r1", True, (BASE,), 0, 4)
    seen = held_versions(RoutingTable(1, {"chat": (ROUTE,)}), ReplicaTable(7.0, (replica,)))
    assert seen.replicas[0].versions[0].wanted_by == ()
