"""The ``[release]`` table: which variants a policy has, and how much evidence each move of a version needs.

Limits compare a version with another one measured the same way (the base, or the stable it would replace);
absolute numbers are only slack for small samples.
"""

from __future__ import annotations

import msgspec


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A TOML table whose unknown keys are refused."""


class VariantConfig(_Table, frozen=True):
    """One contender of a policy. Decoding defaults are part of its identity."""

    variant: str
    base: str  # a name under [serving.bases]
    temperature: float = 0.7
    top_p: float = 0.95
    # Of a million tokens, in whatever currency the deployment counts in: what `tiebreak_cost_total` adds up.
    prompt_cost: float = 0.0
    completion_cost: float = 0.0


class GateConfig(_Table, frozen=True):
    """``[release.gate]``: the manifest's own metrics, against the base's on the same prompts."""

    # Held-out pairs below which a win rate says nothing and is not asked for.
    min_heldout_pairs: int = 10
    # Share of held-out verdicts that the version must get right (reward accuracy).
    min_heldout_win_rate: float = 0.5
    # Nats a token may stray from the base; past it the text is usually over-optimised.
    max_kl_per_token: float = 0.75
    # Perplexity under the base, repetition and length (both ways) of probe answers, as multiples of base's own.
    max_ratio: float = 1.5
    # Entropy below this share of base's is a collapse.
    min_entropy_ratio: float = 0.4
    # Added to the repetition limit, which is near 0 for short answers.
    repetition_slack: float = 0.05


class TextConfig(_Table, frozen=True):
    """``[release.text]``: when live answers or probe answers count as degenerate or broken."""

    # Mean share of repeated word triples: above multiple × reference + slack, answers have degenerated.
    max_repetition_ratio: float = 1.5
    repetition_slack: float = 0.15
    # The limit where the reference has not been seen often enough to compare with.
    max_repetition_unknown: float = 0.5
    # Mean answer length, as multiples of the reference: to the same prompts, or over `min_live_answers` on both sides.
    min_length_ratio: float = 0.25
    max_length_ratio: float = 3.0
    # Share of empty answers.
    max_empty_ratio: float = 0.25
    # Mean surprise (−log-prob per token): above multiple × reference + slack nats it is gibberish.
    max_surprise_ratio: float = 2.0
    surprise_slack: float = 0.5
    # Share of words that look like none (probe answers only): above reference + this.
    strange_slack: float = 0.15
    # Share of tokens that run into the word before them (probe answers only): above reference + this.
    glued_slack: float = 0.15
    # Median time to first token and per further token: above multiple × reference + slack seconds.
    max_latency_ratio: float = 3.0
    # Live answers on both sides before latency and length are judged: a handful says more about the queue and about
    # what was asked (short answers also come back first) than about the version.
    min_live_answers: int = 20
    ttft_slack_s: float = 1.0
    tpot_slack_s: float = 0.1
    # Failed answers: at least 2, above this share, and above twice the reference's share.
    max_error_ratio: float = 0.1
    # Answers that the safety filter stopped: at least 2 and above the reference's share plus this.
    unsafe_slack: float = 0.05


class ShadowConfig(_Table, frozen=True):
    """``[release.shadow]``: loaded everywhere, answers nobody but the controller's probes."""

    # Seconds replicas have to load the version, counted only while there are replicas.
    load_timeout_s: float = 60.0
    # Seconds the probes may stay unanswered before the version is rejected.
    probe_timeout_s: float = 120.0
    # Tokens of a probe's answer; more see more and take longer.
    probe_tokens: int = 24
    prompts: tuple[str, ...] = (
        "What is a good way to start the day?",
        "Explain rain to a child.",
        "Write two sentences about the sea.",
        "How do I make tea?",
    )


class CanaryConfig(_Table, frozen=True):
    """``[release.canary]``: a share of users, until evidence suffices. No evidence is never success."""

    # Share of single answers that canary gives; pairs compare it with stable.
    ratio: float = 0.25
    # Healthy live answers and canary-against-stable verdicts needed for promotion.
    min_completions: int = 4
    min_verdicts: int = 4
    # Without enough verdicts: this many healthy answers, and a held-out win rate on enough pairs.
    min_completions_unjudged: int = 50
    # Or, where neither canary nor stable was asked anything for so many seconds, the held-out win rate alone (probes it
    # has passed before): what was clicked last is not thrown away because everybody went home.
    quiet_s: float = 30.0
    # Held-out verdicts that it is judged by then, at least.
    min_heldout_pairs: int = 5
    # Share of verdicts (ties count half) that canary must win.
    min_win_rate: float = 0.5
    # Verdicts before a bad win rate may end a canary, and the confidence (z, two-sided) it then needs.
    min_verdicts_to_reject: int = 6
    reject_z: float = 1.96
    # Verdicts of one user that count: one eager person is not a crowd.
    max_verdicts_per_user: int = 12
    # Seconds an undecided canary keeps its place when a newer version waits: the first, and twice as long with each one
    # that made room undecided since the last decision, up to the second. Where none waits: max_s.
    hold_s: float = 20.0
    longest_hold_s: float = 160.0
    max_s: float = 3600.0


class WatchConfig(_Table, frozen=True):
    """``[release.watch]``: a new stable is on probation, its predecessor loaded; both must hold to end it."""

    min_s: float = 30.0
    # Live answers (those as canary included, where a newer version is promoted before the probation is over).
    min_completions: int = 10
    # Answers before the text and latency of a new stable may be judged.
    min_completions_to_roll_back: int = 4
    # Probe rounds after an operator's forced promotion (which skipped the shadow), and seconds between them.
    forced_probes: int = 3
    probe_interval_s: float = 4.0


class ReleaseConfig(_Table, frozen=True):
    """``[release]``."""

    # policy (what clients send as `model`) → its variants; the first one answers by default.
    policies: dict[str, tuple[VariantConfig, ...]]
    # Where probes go; empty: [stack] host and port.
    router_url: str = ""
    # File with an API key for the router, where it asks for one.
    router_key_file: str = ""
    # Seconds between two looks at the log, the replicas and the commands.
    tick_s: float = 0.3
    # Seconds after which another controller may take over from one that is silent.
    lease_s: float = 5.0
    # Seconds one probe may take before it counts as failed.
    probe_request_timeout_s: float = 30.0
    # A replica table older than this says nothing about readiness.
    fleet_stale_s: float = 15.0
    # Port of /metrics on loopback; 0 picks a free one.
    metrics_port: int = 0
    gate: GateConfig = GateConfig()
    text: TextConfig = TextConfig()
    shadow: ShadowConfig = ShadowConfig()
    canary: CanaryConfig = CanaryConfig()
    watch: WatchConfig = WatchConfig()
