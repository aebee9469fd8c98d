"""What the release controller knows, and what it can be told: frozen records, JSON in Redis.

A variant has one version to fall back on (``previous``), one that answers (``stable``), at most one that is judged
(``canary``), one that is loaded and probed beside it (``shadow``), and one that waits. The base version is always there
to fall back to.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from deploy.release.evidence import Observation
from deploy.release.guards import Decision, Score
from telemetry.routing import VariantRoute

Window = tuple[Observation, ...]
ChangeState = Literal["gated", "rejected", "shadow", "canary", "stable", "rolled_back", "superseded", "refused"]


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A published version."""

    version: str
    parent: str = ""
    metrics: dict[str, float] = {}
    oldest_verdict_at_s: float | None = None  # unix time of the oldest verdict that only this version learned
    traces: tuple[tuple[str, str], ...] = ()  # (trace id, span id) of the verdicts, to tell them it is live


class Shadow(msgspec.Struct, frozen=True, kw_only=True):
    """A version that is loaded and probed, out of users' sight."""

    candidate: Candidate
    since_s: float
    ready_since_s: float | None = None  # when every replica held it
    proof: Decision | None = None  # its probes were healthy: it only waits for the canary's place
    is_forced: bool = False
    actor: str = "controller"
    reason: str = ""


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """A version that a share of users meets, and judges."""

    candidate: Candidate
    since_s: float
    window: Window = ()  # its live answers
    verdicts: dict[str, Score] = {}  # user → canary against stable


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """A new stable's probation: its predecessor's answers are what it is held against."""

    since_s: float
    baseline: Window = ()
    answers_before: int = 0  # live answers that it gave as canary
    is_forced: bool = False  # an operator's decision, not the guards'
    probes_left: int = 0
    probed_at_s: float = 0.0


class VariantState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one variant."""

    route: VariantRoute
    shadow: Shadow | None = None
    canary: Canary | None = None
    waiting: Candidate | None = None
    watch: Watch | None = None
    window: Window = ()  # stable's latest live answers
    base_probe: Window = ()  # the base's answers to the probe prompts: the yardstick of every shadow
    known: dict[str, Candidate] = {}  # published versions, newest last, bounded
    undecided: int = 0  # canaries in a row that made room for a newer version before there was enough evidence
    bad: tuple[str, ...] = ()  # rejected or rolled back: their descendants are refused
    untold: tuple[tuple[str, str], ...] = ()  # traces of steps since the last published version


class Published(msgspec.Struct, frozen=True):
    """A version stands in the store."""

    candidate: Candidate


class Stepped(msgspec.Struct, frozen=True):
    """The trainer took a step on verdicts with these traces."""

    traces: tuple[tuple[str, str], ...]


class Served(msgspec.Struct, frozen=True):
    """A user got an answer from this version, or an error."""

    version: str
    seen: Observation


class Judged(msgspec.Struct, frozen=True):
    """A user preferred one version's answer to another's (``tie`` when neither)."""

    user: str
    winner: str
    loser: str
    is_tie: bool
    shown_at_s: float


class Probed(msgspec.Struct, frozen=True):
    """The probe prompts were answered by this version."""

    version: str
    window: Window


class Commanded(msgspec.Struct, frozen=True):
    """An operator's word."""

    command: Literal["promote", "rollback"]
    version: str
    force: bool = False
    actor: str = "operator"
    reason: str = ""


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""


Input = Published | Stepped | Served | Judged | Probed | Commanded | Tick


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A version's move, as history and log tell it; ``refused`` is a command that was not followed."""

    version: str
    state: ChangeState
    stable: str
    reason: str
    actor: str = "controller"
    evidence: dict[str, float] = {}
    traces: tuple[tuple[str, str], ...] = ()  # verdicts that are live by this change
    learned_since_s: float | None = None  # unix time of the oldest of them


class World(msgspec.Struct, frozen=True):
    """What the machine sees of the world outside its state."""

    now_s: float
    ready: frozenset[str] | None  # versions that every replica of the base holds; None: no replica answers
    asked_s: float = math.inf  # when a user last asked the variant anything; inf: the log is not read to its end
