"""What the release controller tells operators: metrics, logs and one span in the trace of every verdict."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import get_args

from deploy.release.state import Change, ChangeState, VariantState
from telemetry import metrics, tracing
from telemetry.events import AnyEvent, Completion, PreferenceRecorded, VersionPublished

log = logging.getLogger(__name__)

LIVE = ("canary", "stable")
MEASURED = {("canary", "stable"), ("canary", "base"), ("stable", "base")}  # (side, its yardstick)
CHANNELS = ("stable", "previous", "canary", "shadow")
_shown: set[tuple[str, str, str]] = set()  # labels that exist now, as in the registry itself


def report(variant: str, change: Change, now_s: float) -> None:
    """Count, log and trace one change."""
    extra = {
        "action": f"release_{change.state}",
        "variant": variant,
        "version": change.version,
        "stable": change.stable,
        "actor": change.actor,
    }
    log.info("%s", change.reason, extra=extra)
    if change.state == "refused":
        return
    metrics.RELEASES.labels(variant, change.state).inc()
    if change.state == "stable" or change.state == "rolled_back":
        metrics.LAST_RELEASE.labels(variant).set(now_s)
    if change.state in LIVE and change.learned_since_s is not None:
        metrics.RETRAIN_SECONDS.labels(variant).observe(max(0.0, now_s - change.learned_since_s))
    for trace_id, span_id in change.traces:
        tracing.record(
            f"release {change.state}",
            within=tracing.parent(trace_id, span_id),
            attributes={"tiebreak.variant": variant, "tiebreak.version": change.version},
        )


def start(variants: Iterable[str]) -> None:
    """Begin every series at 0, so that ``increase`` sees the first event too."""
    for variant in variants:
        metrics.RETRAIN_SECONDS.labels(variant)
        for state in get_args(ChangeState):
            metrics.RELEASES.labels(variant, state)


def count(event: AnyEvent) -> None:
    """Count a verdict between versions for the side that is measured against the other, and new versions."""
    match event:
        case PreferenceRecorded(outcome="skip"):
            return
        case PreferenceRecorded():
            is_decided = event.outcome == "chosen_rejected"
            for side, other, word in ((event.chosen, event.rejected, "win"), (event.rejected, event.chosen, "loss")):
                opponent = yardstick(side, other)
                if opponent:
                    outcome = word if is_decided else event.outcome
                    metrics.DUELS.labels(side.variant, side.version, opponent, outcome).inc()
        case VersionPublished():
            metrics.LAST_VERSION.labels(event.variant).set(event.occurred_at.timestamp())


def yardstick(side: Completion, other: Completion) -> str:
    """What ``other`` is to ``side``: another variant, or its own stable or base; empty where it measures nothing."""
    if side.variant != other.variant:
        return other.variant
    is_measured = side.version != other.version and (side.channel, other.channel) in MEASURED
    return other.channel if is_measured else ""


def show_channels(variants: Mapping[str, VariantState]) -> None:
    """``tiebreak_channel_info`` is 1 for the version each channel points at, and absent for all others."""
    wanted = {
        (name, channel, version)
        for name, state in variants.items()
        for channel in CHANNELS
        if (version := getattr(state.route, channel))
    }
    for labels in wanted - _shown:
        metrics.CHANNEL_INFO.labels(*labels).set(1)
    for labels in _shown - wanted:
        metrics.CHANNEL_INFO.remove(*labels)
    _shown.clear()
    _shown.update(wanted)
