"""Who answers, decided without I/O: routing table, a random source and wishes in; ``Arms`` out.

A plain request goes to the policy's first variant: its canary with ``canary_ratio``, else its stable.
A pair is mostly two answers of that variant (canary against stable, or stable against itself), now and
then its stable against another variant's. A pin (``chat@stable``, ``chat@v000012-1a2b3c4d``) leaves no choice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import msgspec

from router.errors import NotFound, Unavailable
from telemetry.events import Channel
from telemetry.routing import RoutingTable, VariantRoute


class Arm(msgspec.Struct, frozen=True):
    """One version that may answer, with its variant's decoding defaults."""

    variant: str
    base: str
    version: str
    channel: Channel
    temperature: float
    top_p: float
    prompt_cost: float = 0.0  # of a million tokens
    completion_cost: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost, in the deployment's currency."""
        return (self.prompt_cost * prompt_tokens + self.completion_cost * completion_tokens) / 1e6


class Arms(msgspec.Struct, frozen=True):
    """One arm, or two for a pair (not yet in position), and how likely this draw was."""

    sides: tuple[Arm, ...]
    propensity: float


class PairRatios(msgspec.Struct, frozen=True):
    """How pairs are mixed; see RouterConfig."""

    canary: float
    cross_variant: float


HasVersion = Callable[[str, str], bool]  # (base, version) → some replica holds it ready


def parse_model(model: str) -> tuple[str, str]:
    """``chat@stable`` → ("chat", "stable"); ``chat`` → ("chat", "")."""
    policy, _, pin = model.partition("@")
    return policy, pin


def pins(routes: tuple[VariantRoute, ...]) -> Iterator[tuple[str, Arm]]:
    """Every pin of a policy and what it answers with; the first variant wins where names coincide."""
    first = routes[0]
    yield "stable", _arm(first, first.stable, "stable")
    yield "base", _arm(first, first.base_version, "base")
    if first.canary:
        yield "canary", _arm(first, first.canary, "canary")
    for route in routes:
        yield route.variant, _arm(route, route.stable, "pinned")
        for version in dict.fromkeys((route.stable, route.canary, route.shadow, route.previous, route.base_version)):
            if version:
                yield version, _arm(route, version, "pinned")


def choose_arms(
    table: RoutingTable, model: str, *, wants_pair: bool, ratios: PairRatios, has: HasVersion, draw: random.Random
) -> Arms:
    """The arms for one request. Raises NotFound for a model that is not in the table, Unavailable before there is one.

    A canary or another variant that no replica holds yet gets no traffic; stable is chosen regardless.
    """
    policy, pin = parse_model(model)
    routes = table.policies.get(policy)
    if not table.revision and not table.policies:  # none was read yet
        message = "No model is known yet: the gateway is starting."
        raise Unavailable(message, code="starting", retry_after_s=1.0)
    if not routes:
        raise NotFound("There is no such model; GET /v1/models lists them.", param="model", code="model_not_found")
    if pin:
        arm = next((arm for name, arm in pins(routes) if name == pin), None)
        if arm is None:
            message = "This version or channel is not loaded; GET /v1/models lists what can be pinned."
            raise NotFound(message, param="model", code="model_not_found")
        return Arms((arm, arm) if wants_pair else (arm,), 1.0)
    return _pair(routes, ratios, has, draw) if wants_pair else _single(routes[0], has, draw)


def _single(route: VariantRoute, has: HasVersion, draw: random.Random) -> Arms:
    ratio = route.canary_ratio if route.canary and has(route.base, route.canary) else 0.0
    if ratio > 0.0 and draw.random() < ratio:
        return Arms((_arm(route, route.canary, "canary"),), ratio)
    return Arms((_arm(route, route.stable, "stable"),), 1.0 - ratio)


def _pair(routes: tuple[VariantRoute, ...], ratios: PairRatios, has: HasVersion, draw: random.Random) -> Arms:
    first = routes[0]
    stable = _arm(first, first.stable, "stable")
    others = [route for route in routes[1:] if has(route.base, route.stable)]
    cross = ratios.cross_variant if others else 0.0
    canary = ratios.canary if first.canary and has(first.base, first.canary) else 0.0
    if draw.random() < cross:
        other = draw.choice(others)
        return Arms((stable, _arm(other, other.stable, "stable")), cross / len(others))
    if draw.random() < canary:
        return Arms((_arm(first, first.canary, "canary"), stable), (1.0 - cross) * canary)
    return Arms((stable, stable), (1.0 - cross) * (1.0 - canary))


def _arm(route: VariantRoute, version: str, channel: Channel) -> Arm:
    return Arm(
        route.variant,
        route.base,
        version,
        channel,
        route.temperature,
        route.top_p,
        route.prompt_cost,
        route.completion_cost,
    )
