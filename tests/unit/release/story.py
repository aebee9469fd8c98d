"""A variant's life as tests tell it: publish, serve, judge, pass time; every move is kept."""

from __future__ import annotations

from msgspec.structs import replace

from deploy.release.config import ReleaseConfig, VariantConfig
from deploy.release.evidence import Observation
from deploy.release.machine import advance, initial
from deploy.release.state import Candidate, Change, Commanded, Input, Judged, Probed, Published, Served, Tick, World

BASE = "v000000-00000000"
V1, V2, V3 = "v000001-11111111", "v000002-22222222", "v000003-33333333"
MEMBER = VariantConfig(variant="chat-main", base="tiny", temperature=0.8)
LIMITS = ReleaseConfig(policies={"chat": (MEMBER,)})
GOOD_METRICS = {
    "heldout_win_rate": 0.7, "heldout_pairs": 12.0, "kl_per_token": 0.1,
    "probe_repetition": 0.02, "probe_length_tokens": 40.0, "probe_entropy": 1.5, "probe_perplexity": 6.0,
    "base_probe_repetition": 0.02, "base_probe_length_tokens": 42.0, "base_probe_entropy": 1.6,
    "base_probe_perplexity": 5.0,
}  # fmt: skip
HEALTHY = Observation(at_s=0.0, ttft_s=0.2, tpot_s=0.03, tokens=40, repetition_ratio=0.03, surprise=1.2)
GIBBERISH = replace(HEALTHY, repetition_ratio=0.8, surprise=6.0)
FAILED = Observation(at_s=0.0, is_error=True)


class Story:
    """One variant and its clock."""

    def __init__(self, limits: ReleaseConfig = LIMITS) -> None:
        self.limits = limits
        self.state = initial(limits.policies["chat"][0], BASE)
        self.now_s = 1000.0
        self.asked_s = 0.0
        self.ready: frozenset[str] | None = frozenset({BASE})
        self.changes: list[Change] = []

    @property
    def moves(self) -> list[tuple[str, str]]:
        """(version, state) of every change so far."""
        return [(change.version, change.state) for change in self.changes]

    def take(self, event: Input) -> None:
        self.state, made = advance(self.state, event, World(self.now_s, self.ready, self.asked_s), self.limits)
        self.changes += made

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.take(Tick())

    def publish(self, version: str, parent: str = BASE, metrics: dict[str, float] | None = None) -> None:
        found = GOOD_METRICS if metrics is None else metrics
        self.take(Published(Candidate(version=version, parent=parent, metrics=found)))

    def load(self, *versions: str) -> None:
        """Every replica holds the base and these now."""
        self.ready = frozenset({BASE, *versions})
        self.take(Tick())

    def probe(self, version: str, seen: Observation = HEALTHY) -> None:
        self.take(Probed(version, (replace(seen, at_s=self.now_s),) * 4))

    def serve(self, version: str, seen: Observation = HEALTHY, times: int = 1) -> None:
        self.asked_s = self.now_s
        for _ in range(times):
            self.take(Served(version, replace(seen, at_s=self.now_s)))

    def judge(self, winner: str, loser: str, times: int = 1, user: str = "u1", is_tie: bool = False) -> None:
        for _ in range(times):
            self.take(Judged(user, winner, loser, is_tie, self.now_s))

    def command(self, name: str, version: str, *, force: bool = False) -> None:
        word = "promote" if name == "promote" else "rollback"
        self.take(Commanded(word, version, force=force, actor="ann", reason="because"))

    def prove(self, version: str, parent: str = BASE, metrics: dict[str, float] | None = None) -> None:
        """Publish, load and probe: a shadow that waits for the canary's place, or a canary at once where it is free."""
        held = self.ready or frozenset()
        if not self.state.base_probe:
            self.probe(BASE)
        self.publish(version, parent, metrics)
        self.load(*held, version)
        self.probe(version)

    def to_canary(self, version: str, parent: str = BASE, metrics: dict[str, float] | None = None) -> None:
        """Prove a version whose place is free."""
        self.prove(version, parent, metrics)
        assert self.state.route.canary == version

    def to_stable(self, version: str, parent: str = BASE) -> None:
        """All the way, on the least evidence that suffices."""
        self.to_canary(version, parent)
        stable = self.state.route.stable
        self.serve(stable, times=8)
        self.serve(version, times=6)
        self.judge(version, stable, times=4)
