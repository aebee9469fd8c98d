"""The moves a version can make: each takes a variant's state and returns the next, with the changes to announce.

Pure, and the only place where a route is changed. ``machine`` decides when, ``commands`` lets an operator decide.
"""

from __future__ import annotations

from msgspec.structs import replace

from deploy.release.config import ReleaseConfig
from deploy.release.guards import Decision
from deploy.release.state import (
    Canary,
    Candidate,
    Change,
    ChangeState,
    Commanded,
    Shadow,
    VariantState,
    Watch,
    World,
)

KNOWN = 64  # published versions remembered per variant
Moved = tuple[VariantState, tuple[Change, ...]]


def learn(state: VariantState, candidate: Candidate) -> VariantState:
    """Remember a published version and the verdicts that only it has learned so far."""
    known = state.known | {candidate.version: candidate}
    route = state.route
    in_use = {route.stable, route.previous, route.canary, route.shadow}
    surplus = [version for version in known if version not in in_use][: max(0, len(known) - KNOWN)]
    return replace(state, known={name: item for name, item in known.items() if name not in surplus}, untold=())


def wait(state: VariantState, candidate: Candidate, changes: tuple[Change, ...] = ()) -> Moved:
    """The newest version waits for its turn; the one that waited before is superseded."""
    if state.waiting and state.waiting.version != candidate.version:
        changes += (change(state, state.waiting.version, "superseded", f"{candidate.version} is newer"),)
    return replace(state, waiting=candidate), changes


def start(state: VariantState, candidate: Candidate, world: World, command: Commanded | None = None) -> Moved:
    """Load a version on every replica, out of users' sight; a canary stays beside it."""
    shadow = Shadow(candidate=candidate, since_s=world.now_s)
    reason = "loading on every replica"
    if command:
        shadow = replace(shadow, is_forced=command.force, actor=command.actor, reason=command.reason)
        reason = f"{command.command}: {command.reason}"
    waiting = None if state.waiting and state.waiting.version == candidate.version else state.waiting
    route = replace(state.route, shadow=candidate.version)
    state = replace(state, route=route, shadow=shadow, waiting=waiting)
    return state, (change(state, candidate.version, "shadow", reason, actor=shadow.actor),)


def show(state: VariantState, shadow: Shadow, decision: Decision, world: World, limits: ReleaseConfig) -> Moved:
    """From shadow to canary: a share of users gets the version's answers."""
    candidate = shadow.candidate
    state = without_shadow(state)
    route = replace(state.route, canary=candidate.version, canary_ratio=limits.canary.ratio)
    canary = Canary(candidate=candidate, since_s=world.now_s)
    return _live(replace(state, route=route, canary=canary), candidate.version, "canary", decision)


def promote(state: VariantState, canary: Canary, decision: Decision, world: World, limits: ReleaseConfig) -> Moved:
    """The canary becomes stable, on probation; what was proven before stays loaded behind it."""
    watch = Watch(since_s=world.now_s, answers_before=len(canary.window))
    is_fit = _is_fit_to_fall_back_on(state, limits)
    state = _become_stable(without_canary(state), canary.candidate.version, watch, is_fit=is_fit)
    return _live(state, canary.candidate.version, "stable", decision)


def force(state: VariantState, shadow: Shadow, decision: Decision, world: World, limits: ReleaseConfig) -> Moved:
    """The operator's choice becomes stable without having met a user: probed again and again, and watched."""
    watch = Watch(since_s=world.now_s, is_forced=True, probes_left=limits.watch.forced_probes)
    is_fit = _is_fit_to_fall_back_on(state, limits) or not _is_forced(state)
    state = _become_stable(without_shadow(state), shadow.candidate.version, watch, is_fit=is_fit)
    return _live(state, shadow.candidate.version, "stable", decision, actor=shadow.actor)


def _become_stable(state: VariantState, version: str, watch: Watch, *, is_fit: bool) -> VariantState:
    """``is_fit``: the present stable is what to fall back on, and to be compared with."""
    route = state.route
    fallback = route.stable if is_fit else route.previous
    previous = fallback if fallback != version else route.base_version
    baseline = state.window if is_fit or state.watch is None else state.watch.baseline
    route = replace(route, stable=version, previous=previous)
    return replace(state, route=route, watch=replace(watch, baseline=baseline), window=(), undecided=0)


def roll_back(state: VariantState, decision: Decision, actor: str = "controller") -> Moved:
    """Stable falls back to its proven predecessor; whatever descends from it goes with it."""
    route, fallen = state.route, state.route.stable
    route = replace(route, stable=route.previous, previous=route.base_version)
    state = mark_bad(replace(state, route=route, watch=None, window=(), undecided=0), fallen)
    changes = (change(state, fallen, "rolled_back", decision.reason, actor=actor, evidence=decision.evidence),)
    state, further = _drop_descendants(state)
    return state, changes + further


def end_canary(state: VariantState, canary: Canary, decision: Decision, actor: str = "controller") -> Moved:
    """The canary has failed before users' eyes; its descendants go with it."""
    state = replace(without_canary(state), undecided=0)
    return _end(state, canary.candidate.version, "rolled_back", decision, actor)


def end_shadow(state: VariantState, shadow: Shadow, decision: Decision, actor: str = "controller") -> Moved:
    """The shadow has failed, and no user met it; its descendants go with it."""
    return _end(without_shadow(state), shadow.candidate.version, "rejected", decision, actor)


def _end(state: VariantState, version: str, name: ChangeState, decision: Decision, actor: str) -> Moved:
    state = mark_bad(state, version)
    ended = change(state, version, name, decision.reason, actor=actor, evidence=decision.evidence)
    state, further = _drop_descendants(state)
    return state, (ended, *further)


def supersede_canary(state: VariantState, canary: Canary, decision: Decision, actor: str = "controller") -> Moved:
    """The canary makes room; nothing is held against it."""
    return _supersede(without_canary(state), canary.candidate.version, decision, actor)


def supersede_shadow(state: VariantState, shadow: Shadow, decision: Decision, actor: str = "controller") -> Moved:
    """The shadow makes room; nothing is held against it."""
    return _supersede(without_shadow(state), shadow.candidate.version, decision, actor)


def _supersede(state: VariantState, version: str, decision: Decision, actor: str) -> Moved:
    reason, evidence = decision.reason, decision.evidence
    return state, (change(state, version, "superseded", reason, actor=actor, evidence=evidence),)


def reject(state: VariantState, version: str, decision: Decision, actor: str = "controller") -> Moved:
    """A version that nobody has tried yet never will be, unless an operator forces it."""
    state = mark_bad(state, version)
    evidence = decision.evidence
    return state, (change(state, version, "rejected", decision.reason, actor=actor, evidence=evidence),)


def without_canary(state: VariantState) -> VariantState:
    return replace(state, canary=None, route=replace(state.route, canary="", canary_ratio=0.0))


def without_shadow(state: VariantState) -> VariantState:
    return replace(state, shadow=None, route=replace(state.route, shadow=""))


def mark_bad(state: VariantState, version: str) -> VariantState:
    return replace(state, bad=(*(name for name in state.bad if name != version), version)[-KNOWN:])


def bad_ancestor(state: VariantState, candidate: Candidate) -> str:
    """The nearest rejected or rolled back version that ``candidate`` was trained from; empty when none."""
    for ancestor in _lineage(state, candidate)[1:]:
        if ancestor in state.bad:
            return ancestor
    return ""


def change(
    state: VariantState,
    version: str,
    name: ChangeState,
    reason: str,
    *,
    actor: str = "controller",
    evidence: dict[str, float] | None = None,
) -> Change:
    """What to announce; ``stable`` as it is after the move."""
    return Change(version=version, state=name, stable=state.route.stable, reason=reason, actor=actor,
                  evidence=evidence or {})  # fmt: skip


def _live(state: VariantState, version: str, name: ChangeState, decision: Decision, actor: str = "controller") -> Moved:
    """Announce a version that users meet, once with all that it and its ancestors learned and nobody was told."""
    lineage = _lineage(state, state.known.get(version, Candidate(version=version)))
    family = [state.known[ancestor] for ancestor in lineage if ancestor in state.known]
    oldest = [item.oldest_verdict_at_s for item in family if item.oldest_verdict_at_s is not None]
    announced = replace(
        change(state, version, name, decision.reason, actor=actor, evidence=decision.evidence),
        traces=tuple(trace for item in family for trace in item.traces),
        learned_since_s=min(oldest, default=None),
    )
    told = {item.version: replace(item, traces=(), oldest_verdict_at_s=None) for item in family}
    return replace(state, known=state.known | told), (announced,)


def _is_fit_to_fall_back_on(state: VariantState, limits: ReleaseConfig) -> bool:
    """Stable is past its probation, or came through the guards and has answered often without an objection."""
    if state.watch is None:
        return True
    answers = state.watch.answers_before + len(state.window)
    return not state.watch.is_forced and answers >= limits.watch.min_completions


def _is_forced(state: VariantState) -> bool:
    return state.watch is not None and state.watch.is_forced


def _drop_descendants(state: VariantState) -> Moved:
    canary, shadow, waiting = state.canary, state.shadow, state.waiting
    if canary and (bad := bad_ancestor(state, canary.candidate)):
        return end_canary(state, canary, Decision("fail", f"descends from {bad}"))
    if shadow and not shadow.is_forced and (bad := bad_ancestor(state, shadow.candidate)):
        return end_shadow(state, shadow, Decision("fail", f"descends from {bad}"))
    if waiting and (bad := bad_ancestor(state, waiting)):
        return reject(replace(state, waiting=None), waiting.version, Decision("fail", f"descends from {bad}"))
    return state, ()


def _lineage(state: VariantState, candidate: Candidate) -> list[str]:
    """The version and its known ancestors, nearest first."""
    names, parent = [candidate.version], candidate.parent
    while parent and parent not in names:
        names.append(parent)
        parent = state.known[parent].parent if parent in state.known else ""
    return names
