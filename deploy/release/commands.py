"""What an operator may order: promote and roll back, audited like every other move. Pure.

Without ``force`` a promotion is only a place in the queue: the guards still decide. With it the version goes
straight to stable once every replica holds it, and the guards go on watching.
"""

from __future__ import annotations

from msgspec.structs import replace

from deploy.release import moves
from deploy.release.guards import Decision
from deploy.release.moves import Moved
from deploy.release.state import Candidate, Change, Commanded, VariantState, World


def obey(state: VariantState, command: Commanded, world: World) -> Moved:
    """Follow the command, or refuse it with a reason."""
    if command.command == "rollback":
        return _roll_back(state, command)
    known = state.known.get(command.version)
    candidate = Candidate(version=command.version) if command.version == state.route.base_version else known
    if candidate is None:
        return _refuse(state, command, "was never published here")
    if command.version == state.route.stable:
        return _refuse(state, command, "is stable already")
    return (_force if command.force else _queue)(state, candidate, command, world)


def _queue(state: VariantState, candidate: Candidate, command: Commanded, _: World) -> Moved:
    if candidate.version in state.bad or moves.bad_ancestor(state, candidate):
        return _refuse(state, command, "was rejected, or descends from a rejected version; force overrides")
    for place in ("shadow", "canary"):
        if getattr(state.route, place) == candidate.version:
            return _refuse(state, command, f"is in {place} already; force overrides the guards")
    return moves.wait(state, candidate)


def _force(state: VariantState, candidate: Candidate, command: Commanded, world: World) -> Moved:
    changes: tuple[Change, ...] = ()
    decision = Decision("pass", f"{command.actor} forces {candidate.version}")
    if state.canary and state.canary.candidate.version != candidate.version:
        state, changes = moves.supersede_canary(state, state.canary, decision, actor=command.actor)
    if state.shadow and state.shadow.candidate.version != candidate.version:
        state, further = moves.supersede_shadow(state, state.shadow, decision, actor=command.actor)
        changes += further
    state = moves.without_canary(state)
    pardoned = tuple(name for name in state.bad if name != candidate.version)
    state, started = moves.start(replace(state, bad=pardoned), candidate, world, command)
    return state, changes + started


def _roll_back(state: VariantState, command: Commanded) -> Moved:
    route, version = state.route, command.version
    decision = Decision("fail", f"rollback: {command.reason}")
    if version == route.stable and version != route.previous:
        return moves.roll_back(state, decision, actor=command.actor)
    if state.canary and state.canary.candidate.version == version:
        return moves.end_canary(state, state.canary, decision, actor=command.actor)
    if state.shadow and state.shadow.candidate.version == version:
        return moves.end_shadow(state, state.shadow, decision, actor=command.actor)
    if state.waiting and state.waiting.version == version:
        return moves.reject(replace(state, waiting=None), version, decision, actor=command.actor)
    return _refuse(state, command, "is neither a stable with a predecessor nor on trial")


def _refuse(state: VariantState, command: Commanded, why: str) -> Moved:
    reason = f"{command.command} refused: {command.version} {why}"
    return state, (moves.change(state, command.version, "refused", reason, actor=command.actor),)
