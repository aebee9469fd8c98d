"""Who answers now: the routing table that the release controller writes and router and serving read.

One JSON document under one Redis key; ``revision`` only grows. Serving keeps loaded whatever
``wanted`` names; the router sends traffic only to versions that every replica reports ready.
"""

from __future__ import annotations

import msgspec

ROUTING_KEY = "tiebreak:routing"
REPLICAS_KEY = "tiebreak:replicas"
HISTORY_KEY = "tiebreak:releases:history"  # the latest changes, newest first; the controller writes
COMMANDS_KEY = "tiebreak:releases:commands"  # what operators ask of the controller


class VariantRoute(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One variant's channels. Version names are never reused."""

    variant: str
    base: str  # name of the base model's deployment in serving
    base_version: str  # v000000-…: the base without an adapter
    stable: str
    previous: str  # the stable before this one: stays loaded, so that rollback needs no load
    canary: str = ""
    canary_ratio: float = 0.0  # share of traffic, 0–1
    shadow: str = ""  # loaded and probed, no user traffic
    temperature: float = 0.7
    top_p: float = 0.95
    prompt_cost: float = 0.0  # of a million tokens, in the deployment's currency
    completion_cost: float = 0.0

    def wanted(self) -> tuple[str, ...]:
        """Every adapter version that replicas must hold, the base version left out, in no special order."""
        names = {self.stable, self.previous, self.canary, self.shadow} - {"", self.base_version}
        return tuple(sorted(names))


class RoutingTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole table: policy → its variants, first one is the default."""

    revision: int
    policies: dict[str, tuple[VariantRoute, ...]]


class Replica(msgspec.Struct, frozen=True):
    """One serving replica as the control plane sees it."""

    replica_id: str
    base: str
    url: str  # http://127.0.0.1:30000, the replica's own listener
    is_ready: bool
    versions: tuple[str, ...]  # loaded and ready, the base version included
    in_flight: int
    free_slots: int
    loading: tuple[str, ...] = ()
    draining: tuple[str, ...] = ()  # taken out, still answering what was asked before
    failed: dict[str, str] = {}  # version → why it was refused
    in_flight_by_version: dict[str, int] = {}
    takes_tools: bool = False  # its base's chat template renders tools and their calls
    scores_answers: bool = False  # it says how likely its base finds an answer


class ReplicaTable(msgspec.Struct, frozen=True):
    """What serving's control loop last saw; kept in use when the control plane is away."""

    updated_at_s: float  # unix time
    replicas: tuple[Replica, ...]


def decode_routing(payload: bytes) -> RoutingTable:
    return msgspec.json.decode(payload, type=RoutingTable)


def decode_replicas(payload: bytes) -> ReplicaTable:
    return msgspec.json.decode(payload, type=ReplicaTable)
