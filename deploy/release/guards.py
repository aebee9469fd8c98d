"""May this version take the next step? Every answer names its reason and the numbers it stands on. Pure.

``wait`` is the answer to missing evidence: it never becomes ``pass`` by the passing of time.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Literal

import msgspec

from deploy.release.config import CanaryConfig, GateConfig, ReleaseConfig, TextConfig, WatchConfig
from deploy.release.evidence import Observation, Summary, summarise, wilson_upper

GATE_METRICS = ("kl_per_token", "probe_repetition", "probe_length_tokens", "probe_entropy", "probe_perplexity")
MIN_REFERENCE = 3  # answers of the reference below which only absolute limits hold


class Decision(msgspec.Struct, frozen=True):
    """What a guard says."""

    action: Literal["pass", "fail", "wait"]
    reason: str
    evidence: dict[str, float] = {}


class Score(msgspec.Struct, frozen=True):
    """Verdicts of canary against stable: ties count half, each user up to a cap."""

    wins: float = 0.0
    verdicts: int = 0

    @property
    def win_rate(self) -> float:
        return self.wins / self.verdicts if self.verdicts else 0.0


def offline_gate(metrics: Mapping[str, float], limits: GateConfig) -> Decision:
    """Judge a published version by what its trainer measured. A metric that is missing is a failure."""
    needed = ("heldout_pairs", *GATE_METRICS, *(f"base_{name}" for name in GATE_METRICS[1:]))
    missing = [name for name in needed if not isfinite(metrics.get(name, float("nan")))]
    if missing:
        return Decision("fail", f"offline gate: the manifest lacks {', '.join(missing)}")
    evidence = {name: metrics[name] for name in needed} | _heldout(metrics)
    breach = _heldout_breach(metrics, limits) or _probe_metrics_breach(metrics, limits)
    return Decision("fail" if breach else "pass", f"offline gate: {breach or 'passed'}", evidence)


def _heldout(metrics: Mapping[str, float]) -> dict[str, float]:
    return {"heldout_win_rate": metrics["heldout_win_rate"]} if "heldout_win_rate" in metrics else {}


def _heldout_breach(metrics: Mapping[str, float], limits: GateConfig) -> str:
    if metrics["heldout_pairs"] < limits.min_heldout_pairs:
        return ""
    win_rate = metrics.get("heldout_win_rate", float("nan"))
    if not isfinite(win_rate):
        return "the manifest lacks heldout_win_rate"
    if win_rate < limits.min_heldout_win_rate:
        return f"held-out win rate {win_rate:.2f} is below {limits.min_heldout_win_rate:.2f}"
    return ""


def _probe_metrics_breach(metrics: Mapping[str, float], limits: GateConfig) -> str:
    base = {name: metrics[f"base_{name}"] for name in GATE_METRICS[1:]}
    repetition_limit = limits.max_ratio * base["probe_repetition"] + limits.repetition_slack
    longest, shortest = (
        base["probe_length_tokens"] * limits.max_ratio,
        base["probe_length_tokens"] / limits.max_ratio,
    )
    if metrics["kl_per_token"] > limits.max_kl_per_token:
        return f"KL per token {metrics['kl_per_token']:.2f} is above {limits.max_kl_per_token:.2f}"
    if metrics["probe_repetition"] > repetition_limit:
        return f"repetition {metrics['probe_repetition']:.2f} is above {repetition_limit:.2f}"
    if not shortest <= metrics["probe_length_tokens"] <= longest:
        length = metrics["probe_length_tokens"]
        return f"length {length:.0f} tokens is outside {shortest:.0f} to {longest:.0f}"
    if metrics["probe_entropy"] < limits.min_entropy_ratio * base["probe_entropy"]:
        return f"entropy {metrics['probe_entropy']:.2f} collapsed from base's {base['probe_entropy']:.2f}"
    if metrics["probe_perplexity"] > limits.max_ratio * base["probe_perplexity"]:
        own, floor = metrics["probe_perplexity"], base["probe_perplexity"]
        return f"perplexity under the base {own:.1f} is above {limits.max_ratio:.1f} times base's {floor:.1f}"
    return ""


def judge_probes(own: tuple[Observation, ...], reference: tuple[Observation, ...], limits: TextConfig) -> Decision:
    """Judge a version by its answers to the probe prompts, against the base's answers to the same ones."""
    mine = summarise(own)
    evidence = _evidence(mine)
    if not own:
        return Decision("wait", "probes: none was answered yet")
    breach = breach_of(mine, summarise(reference), limits, is_same_prompts=True)
    return Decision("fail" if breach else "pass", f"probes: {breach or 'healthy'}", evidence)


def judge_canary(
    own: tuple[Observation, ...],
    reference: tuple[Observation, ...],
    score: Score,
    metrics: Mapping[str, float],
    limits: ReleaseConfig,
    quiet_s: float = 0.0,
) -> Decision:
    """Judge a canary by its live answers against stable's, and by its verdicts against stable.

    Where nobody has asked anything for ``quiet_s``, by the held-out verdicts of the clicks before.
    """
    canary, mine = limits.canary, summarise(own)
    evidence = _evidence(mine) | {"verdicts": float(score.verdicts), "win_rate": score.win_rate}
    if mine.errors >= 2 and (breach := error_breach(mine, summarise(reference), limits.text)):
        return Decision("fail", f"canary: {breach}", evidence)
    if mine.answers >= canary.min_completions and (breach := breach_of(mine, summarise(reference), limits.text)):
        return Decision("fail", f"canary: {breach}", evidence)
    if _is_losing(score, canary):
        return Decision("fail", f"canary: lost to stable, win rate {score.win_rate:.2f}", evidence)
    is_clean = not mine.answers or not breach_of(mine, summarise(reference), limits.text)
    if quiet_s >= canary.quiet_s and is_clean and _stands_by_heldout(mine, score, metrics, limits):
        return Decision("pass", f"canary: quiet for {quiet_s:.0f} s, held-out win rate holds", evidence)
    return _promotion(mine, score, metrics, limits, evidence)


def _is_losing(score: Score, limits: CanaryConfig) -> bool:
    bound = wilson_upper(score.wins, score.verdicts, limits.reject_z)
    return score.verdicts >= limits.min_verdicts_to_reject and bound < limits.min_win_rate


def _has_heldout(metrics: Mapping[str, float], limits: ReleaseConfig) -> bool:
    """Whether the offline gate could judge by held-out verdicts (and let the version pass)."""
    return metrics.get("heldout_pairs", 0.0) >= limits.gate.min_heldout_pairs


def _stands_by_heldout(mine: Summary, score: Score, metrics: Mapping[str, float], limits: ReleaseConfig) -> bool:
    """Held-out verdicts speak for it, and nothing that was seen live speaks against it."""
    is_behind = score.verdicts > 0 and score.win_rate < limits.canary.min_win_rate
    is_judged = metrics.get("heldout_pairs", 0.0) >= limits.canary.min_heldout_pairs
    is_right = metrics.get("heldout_win_rate", 0.0) >= limits.gate.min_heldout_win_rate
    return is_judged and is_right and not is_behind and not mine.errors


def _promotion(
    mine: Summary, score: Score, metrics: Mapping[str, float], limits: ReleaseConfig, evidence: dict[str, float]
) -> Decision:
    canary = limits.canary
    if mine.answers < canary.min_completions:
        return Decision("wait", f"canary: {mine.answers} of {canary.min_completions} answers seen", evidence)
    if score.verdicts >= canary.min_verdicts:
        if score.win_rate >= canary.min_win_rate:
            return Decision("pass", f"canary: healthy, win rate {score.win_rate:.2f}", evidence)
        return Decision("wait", f"canary: win rate {score.win_rate:.2f} is undecided", evidence)
    if _has_heldout(metrics, limits) and mine.answers >= canary.min_completions_unjudged:
        return Decision("pass", "canary: healthy on many answers, held-out win rate holds", evidence)
    return Decision("wait", f"canary: {score.verdicts} of {canary.min_verdicts} verdicts seen", evidence)


def judge_watch(
    own: tuple[Observation, ...],
    baseline: tuple[Observation, ...],
    age_s: float,
    text: TextConfig,
    watch: WatchConfig,
) -> Decision:
    """Judge a new stable by its live answers against those of its predecessor."""
    mine = summarise(own)
    evidence = _evidence(mine)
    if mine.errors >= 2 and (breach := error_breach(mine, summarise(baseline), text)):
        return Decision("fail", f"stable: {breach}", evidence)
    if mine.answers >= watch.min_completions_to_roll_back and (breach := breach_of(mine, summarise(baseline), text)):
        return Decision("fail", f"stable: {breach}", evidence)
    if mine.answers >= watch.min_completions and age_s >= watch.min_s:
        return Decision("pass", "stable: healthy through its probation", evidence)
    return Decision("wait", f"stable: {mine.answers} answers in {age_s:.0f} s of probation", evidence)


def breach_of(mine: Summary, reference: Summary, limits: TextConfig, *, is_same_prompts: bool = False) -> str:
    """The first limit that a version's answers break, against a reference's; empty when none."""
    is_many = min(mine.answers, reference.answers) >= limits.min_live_answers
    checks = (
        error_breach(mine, reference, limits),
        _safety_breach(mine, reference, limits),
        _text_breach(mine, reference, limits),
        _length_breach(mine, reference, limits) if is_many or is_same_prompts else "",
        _latency_breach(mine, reference, limits) if is_many else "",
    )
    return next((breach for breach in checks if breach), "")


def error_breach(mine: Summary, reference: Summary, limits: TextConfig) -> str:
    """Too many failed answers, and clearly more than the reference had in the same traffic."""
    limit = max(limits.max_error_ratio, 2 * reference.error_ratio)
    if mine.errors >= 2 and mine.error_ratio > limit:
        return f"error ratio {mine.error_ratio:.2f} is above {limit:.2f}"
    return ""


def _safety_breach(mine: Summary, reference: Summary, limits: TextConfig) -> str:
    limit = reference.unsafe_ratio + limits.unsafe_slack
    if mine.unsafe >= 2 and mine.unsafe_ratio > limit:
        return f"unsafe ratio {mine.unsafe_ratio:.2f} is above {limit:.2f}"
    return ""


def _text_breach(mine: Summary, reference: Summary, limits: TextConfig) -> str:
    is_known = reference.answers >= MIN_REFERENCE
    repetition_limit = limits.max_repetition_ratio * reference.repetition_ratio + limits.repetition_slack
    repetition_limit = repetition_limit if is_known else limits.max_repetition_unknown
    surprise_limit = limits.max_surprise_ratio * reference.surprise + limits.surprise_slack
    if mine.empty_ratio > max(limits.max_empty_ratio, reference.empty_ratio):
        return f"degenerate: {mine.empty_ratio:.0%} of the answers are empty"
    if mine.repetition_ratio > repetition_limit:
        return f"degenerate: repetition {mine.repetition_ratio:.2f} is above {repetition_limit:.2f}"
    if mine.strange_ratio > reference.strange_ratio + limits.strange_slack:
        return f"degenerate: {mine.strange_ratio:.0%} of the words look like none"
    if mine.glued_ratio > reference.glued_ratio + limits.glued_slack:
        return f"degenerate: {mine.glued_ratio:.0%} of the tokens run into the word before them"
    if not is_known:
        return ""
    if mine.surprise > surprise_limit:
        return f"degenerate: surprise {mine.surprise:.2f} nats is above {surprise_limit:.2f}"
    return ""


def _length_breach(mine: Summary, reference: Summary, limits: TextConfig) -> str:
    ratio = mine.tokens / max(1.0, reference.tokens)
    if reference.answers >= MIN_REFERENCE and not limits.min_length_ratio <= ratio <= limits.max_length_ratio:
        return f"degenerate: answers are {ratio:.2f} times as long as the reference's"
    return ""


def _latency_breach(mine: Summary, reference: Summary, limits: TextConfig) -> str:
    for name, own, other, slack_s in (
        ("time to first token", mine.ttft_s, reference.ttft_s, limits.ttft_slack_s),
        ("time per token", mine.tpot_s, reference.tpot_s, limits.tpot_slack_s),
    ):
        limit = limits.max_latency_ratio * other + slack_s
        if own > limit:
            return f"latency: {name} {own:.2f} s is above {limit:.2f} s"
    return ""


def _evidence(mine: Summary) -> dict[str, float]:
    return {
        "answers": float(mine.answers),
        "error_ratio": mine.error_ratio,
        "unsafe_ratio": mine.unsafe_ratio,
        "repetition_ratio": mine.repetition_ratio,
        "length_tokens": mine.tokens,
        "surprise": mine.surprise,
        "strange_ratio": mine.strange_ratio,
        "glued_ratio": mine.glued_ratio,
        "ttft_s": mine.ttft_s,
    }
