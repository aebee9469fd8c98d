"""The pure state machine of one variant: (state, input, world) → (state, changes). No clock, no I/O.

``advance`` takes one input and then lets everything move that may: probation ends or falls back, the canary is decided
or makes room, the shadow takes its place, the waiting version gets its turn. The next version is loaded and probed
while users still judge the one before it. ``stable`` only ever becomes a version that every replica held at that
moment, a predecessor that was stable, or the base.
"""

from __future__ import annotations

from msgspec.structs import replace

from deploy.release import moves
from deploy.release.commands import obey
from deploy.release.config import CanaryConfig, ReleaseConfig, VariantConfig
from deploy.release.evidence import remember
from deploy.release.guards import Decision, Score, judge_canary, judge_probes, judge_watch, offline_gate
from deploy.release.moves import Moved
from deploy.release.state import (
    Canary,
    Candidate,
    Commanded,
    Input,
    Judged,
    Probed,
    Published,
    Served,
    Stepped,
    VariantState,
    World,
)
from telemetry.routing import VariantRoute

TRACES = 64  # traces told about one version


def initial(variant: VariantConfig, base_version: str) -> VariantState:
    """A variant at its first start: the base answers."""
    route = VariantRoute(variant.variant, variant.base, base_version, stable=base_version, previous=base_version)
    return VariantState(route=configured(route, variant))


def configured(route: VariantRoute, variant: VariantConfig) -> VariantRoute:
    """``route`` with what the configuration says of its variant."""
    return replace(
        route,
        base=variant.base,
        temperature=variant.temperature,
        top_p=variant.top_p,
        prompt_cost=variant.prompt_cost,
        completion_cost=variant.completion_cost,
    )


def advance(state: VariantState, event: Input, world: World, limits: ReleaseConfig) -> Moved:
    """``state`` after ``event``, and the changes to announce, in order."""
    state, changes = _take(state, event, world, limits)
    for settle in (_settle_watch, _settle_canary, _settle_shadow, _settle_waiting):
        state, further = settle(state, world, limits)
        changes += further
    return state, changes


def due_probe(state: VariantState, world: World, limits: ReleaseConfig) -> str:
    """The version whose answers to the probe prompts are wanted now; empty when none."""
    route, shadow, watch = state.route, state.shadow, state.watch
    ready = world.ready or frozenset()
    if not state.base_probe and route.base_version in ready:
        return route.base_version
    if shadow and not (shadow.proof or shadow.is_forced) and shadow.candidate.version in ready:
        return shadow.candidate.version
    if watch and watch.probes_left and route.stable in ready:
        is_due = world.now_s >= watch.probed_at_s + limits.watch.probe_interval_s
        return route.stable if is_due else ""
    return ""


def total(canary: Canary) -> Score:
    """All users' verdicts on the canary together."""
    scores = canary.verdicts.values()
    return Score(sum(score.wins for score in scores), sum(score.verdicts for score in scores))


def _take(state: VariantState, event: Input, world: World, limits: ReleaseConfig) -> Moved:
    match event:
        case Published(candidate):
            return _publish(state, candidate, limits)
        case Stepped(traces):
            return replace(state, untold=(*state.untold, *traces)[-TRACES:]), ()
        case Served():
            return _serve(state, event), ()
        case Judged():
            return _judge(state, event, limits), ()
        case Probed():
            return _probe(state, event, world, limits)
        case Commanded():
            return obey(state, event, world)
        case _:
            return state, ()


def _publish(state: VariantState, candidate: Candidate, limits: ReleaseConfig) -> Moved:
    """The offline gate. A version that is known already was decided on before."""
    if candidate.version in state.known or candidate.version == state.route.base_version:
        return state, ()
    candidate = replace(candidate, traces=state.untold)
    state = moves.learn(state, candidate)
    if bad := moves.bad_ancestor(state, candidate):
        return moves.reject(state, candidate.version, Decision("fail", f"descends from {bad}"))
    decision = offline_gate(candidate.metrics, limits.gate)
    if decision.action != "pass":
        return moves.reject(state, candidate.version, decision)
    gated = moves.change(state, candidate.version, "gated", decision.reason, evidence=decision.evidence)
    return moves.wait(state, candidate, (gated,))


def _serve(state: VariantState, event: Served) -> VariantState:
    """Evidence counts from the moment at which a version got the role it is judged in."""
    canary, watch = state.canary, state.watch
    if event.version == state.route.stable and (watch is None or event.seen.at_s >= watch.since_s):
        return replace(state, window=remember(state.window, event.seen))
    if canary and canary.candidate.version == event.version and event.seen.at_s >= canary.since_s:
        return replace(state, canary=replace(canary, window=remember(canary.window, event.seen)))
    return state


def _judge(state: VariantState, event: Judged, limits: ReleaseConfig) -> VariantState:
    canary = state.canary
    if canary is None or {event.winner, event.loser} != {canary.candidate.version, state.route.stable}:
        return state
    score = canary.verdicts.get(event.user, Score())
    if event.shown_at_s < canary.since_s or score.verdicts >= limits.canary.max_verdicts_per_user:
        return state
    won = 0.5 if event.is_tie else float(event.winner == canary.candidate.version)
    verdicts = canary.verdicts | {event.user: Score(score.wins + won, score.verdicts + 1)}
    return replace(state, canary=replace(canary, verdicts=verdicts))


def _probe(state: VariantState, event: Probed, world: World, limits: ReleaseConfig) -> Moved:
    """The base's answers become the yardstick; a shadow is proven by them, a forced stable is checked by them."""
    route, shadow, watch = state.route, state.shadow, state.watch
    if event.version == route.base_version and not state.base_probe:
        state = replace(state, base_probe=event.window)
    decision = judge_probes(event.window, state.base_probe, limits.text)
    is_shadow = shadow is not None and shadow.candidate.version == event.version
    if shadow and is_shadow and state.base_probe and _is_ready(world, event.version):
        if decision.action == "fail":
            return moves.end_shadow(state, shadow, decision)
        proof = decision if decision.action == "pass" else None
        return replace(state, shadow=replace(shadow, proof=proof)), ()
    if watch and watch.probes_left and event.version == route.stable:
        if decision.action == "fail":
            return moves.roll_back(state, decision)
        watch = replace(watch, probes_left=watch.probes_left - 1, probed_at_s=world.now_s)
        return replace(state, watch=watch), ()
    return state, ()


def _settle_watch(state: VariantState, world: World, limits: ReleaseConfig) -> Moved:
    watch = state.watch
    if watch is None:
        return state, ()
    age_s = world.now_s - watch.since_s
    decision = judge_watch(state.window, watch.baseline, age_s, limits.text, limits.watch)
    if decision.action == "fail" and state.route.stable != state.route.previous:
        return moves.roll_back(state, decision)
    return (replace(state, watch=None) if decision.action == "pass" else state), ()


def _settle_canary(state: VariantState, world: World, limits: ReleaseConfig) -> Moved:
    """Decided by its answers and verdicts, or else it makes room for a shadow that is proven, after its time."""
    canary, shadow = state.canary, state.shadow
    if canary is None:
        return state, ()
    age_s, quiet_s = world.now_s - canary.since_s, world.now_s - max(canary.since_s, world.asked_s)
    decision = judge_canary(canary.window, state.window, total(canary), canary.candidate.metrics, limits, quiet_s)
    if decision.action == "fail":
        return moves.end_canary(state, canary, decision)
    if decision.action == "pass" and _is_ready(world, canary.candidate.version):
        return moves.promote(state, canary, decision, world, limits)
    hold_s = _hold_s(state.undecided, limits.canary)
    is_deserted = quiet_s >= max(limits.canary.quiet_s, hold_s / 2)  # waiting longer brings no evidence
    if shadow and shadow.proof and _is_ready(world, shadow.candidate.version) and (age_s >= hold_s or is_deserted):
        state = replace(state, undecided=state.undecided + 1)
        why = f"{shadow.candidate.version} is newer; {decision.reason}"
    elif age_s >= limits.canary.max_s:
        why = f"no proof within {limits.canary.max_s:.0f} s, its traffic goes back to stable; {decision.reason}"
    else:
        return state, ()
    return moves.supersede_canary(state, canary, Decision("wait", why, decision.evidence))


def _settle_shadow(state: VariantState, world: World, limits: ReleaseConfig) -> Moved:
    """Load everywhere, be probed, take the canary's place. Time without replicas is nobody's fault: not counted."""
    shadow, now_s = state.shadow, world.now_s
    if shadow is None:
        return state, ()
    if world.ready is None:
        return replace(state, shadow=replace(shadow, since_s=now_s, ready_since_s=None)), ()
    version = shadow.candidate.version
    if version not in world.ready:
        since_s = now_s if shadow.ready_since_s is not None else shadow.since_s  # held once: it is loaded anew
        if now_s - since_s > limits.shadow.load_timeout_s:
            reason = f"shadow: not ready on every replica within {limits.shadow.load_timeout_s:.0f} s"
            return moves.end_shadow(state, shadow, Decision("fail", reason))
        return replace(state, shadow=replace(shadow, since_s=since_s, ready_since_s=None)), ()
    if shadow.is_forced:
        return moves.force(state, shadow, Decision("pass", f"forced: {shadow.reason}"), world, limits)
    if shadow.proof and state.canary is None:
        return moves.show(state, shadow, shadow.proof, world, limits)
    if shadow.proof and state.waiting:
        decision = Decision("wait", f"{state.waiting.version} is newer; it waited for the canary's place")
        return moves.supersede_shadow(state, shadow, decision)
    since_s = now_s if shadow.ready_since_s is None else shadow.ready_since_s
    if not shadow.proof and now_s - since_s > limits.shadow.probe_timeout_s:
        reason = f"shadow: probes were not answered within {limits.shadow.probe_timeout_s:.0f} s"
        return moves.end_shadow(state, shadow, Decision("fail", reason))
    return replace(state, shadow=replace(shadow, ready_since_s=since_s)), ()


def _hold_s(undecided: int, limits: CanaryConfig) -> float:
    """Fresh versions come first, but where verdicts are rare some canary has to stay long enough to be judged."""
    return min(limits.hold_s * 2.0 ** min(undecided, 32), max(limits.hold_s, limits.longest_hold_s))


def _settle_waiting(state: VariantState, world: World, _: ReleaseConfig) -> Moved:
    if state.shadow or state.waiting is None:
        return state, ()
    return moves.start(state, state.waiting, world)


def _is_ready(world: World, version: str) -> bool:
    return world.ready is not None and version in world.ready
