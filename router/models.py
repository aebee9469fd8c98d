"""``/v1/models``: every policy, and every channel, variant and version that can be pinned now. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from router.answers import Model, ModelList
from router.arms import Arm, pins
from router.errors import NotFound
from telemetry.routing import RoutingTable


def list_models(table: RoutingTable, created: int) -> ModelList:
    """All of them; the policy itself stands before its pins."""
    return ModelList(tuple(_models(table, created)))


def find_model(table: RoutingTable, created: int, model_id: str) -> Model:
    """One of them; raises NotFound."""
    for model in _models(table, created):
        if model.id == model_id:
            return model
    raise NotFound("There is no such model; GET /v1/models lists them.", code="model_not_found", param="model")


def _models(table: RoutingTable, created: int) -> Iterator[Model]:
    for policy, routes in table.policies.items():
        if not routes:
            continue
        is_base = {(route.base, route.base_version) for route in routes}
        arms: dict[str, Arm] = {}
        for name, arm in pins(routes):
            arms.setdefault(name, arm)
        for name, arm in [("", arms["stable"]), *arms.items()]:
            parent = None if (arm.base, arm.version) in is_base else arm.base
            yield Model(f"{policy}@{name}" if name else policy, created, arm.version, parent)
