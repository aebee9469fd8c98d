"""Duels: each verdict between versions is counted for the side that is measured, and not for its mirror."""

from __future__ import annotations

from msgspec.structs import replace
from prometheus_client import REGISTRY

from deploy.release import report
from telemetry.events import Channel, Completion, Outcome, PreferenceRecorded, new_id, utc_now

SAID = Completion(
    completion_id="c", text="…", variant="main", version="v1", channel="stable", finish_reason="stop",
    prompt_tokens=1, completion_tokens=1, ttft_s=0.1, duration_s=0.2, temperature=0.7, top_p=0.9,
)  # fmt: skip


def side(variant: str, version: str, channel: Channel) -> Completion:
    return replace(SAID, variant=variant, version=version, channel=channel)


def verdict(chosen: Completion, rejected: Completion, outcome: Outcome = "chosen_rejected") -> PreferenceRecorded:
    return PreferenceRecorded(
        pair_id=new_id(), policy="chat", user="u", prompt=(), chosen=chosen, rejected=rejected, outcome=outcome,
        chosen_position="a", propensity=1.0, shown_at=utc_now(), decided_s=1.0,
    )  # fmt: skip


def duels(variant: str, version: str, opponent: str, outcome: str) -> float:
    labels = {"variant": variant, "version": version, "opponent": opponent, "outcome": outcome}
    return REGISTRY.get_sample_value("tiebreak_duels_total", labels) or 0.0


def test_a_canary_is_measured_against_stable_and_stable_not_against_its_canary() -> None:
    canary, stable = side("d1", "v2", "canary"), side("d1", "v1", "stable")
    report.count(verdict(canary, stable))
    report.count(verdict(stable, canary))
    assert (duels("d1", "v2", "stable", "win"), duels("d1", "v2", "stable", "loss")) == (1.0, 1.0)
    assert report.yardstick(stable, canary) == ""


def test_variants_are_measured_against_each_other() -> None:
    report.count(verdict(side("d2", "v1", "stable"), side("d3", "v9", "stable")))
    assert (duels("d2", "v1", "d3", "win"), duels("d3", "v9", "d2", "loss")) == (1.0, 1.0)


def test_a_version_against_itself_measures_nothing() -> None:
    assert report.yardstick(side("d4", "v1", "canary"), side("d4", "v1", "stable")) == ""


def test_ties_are_counted_as_ties_and_skips_not_at_all() -> None:
    canary, stable = side("d5", "v2", "canary"), side("d5", "v1", "stable")
    report.count(verdict(canary, stable, "tie"))
    report.count(verdict(canary, stable, "skip"))
    assert duels("d5", "v2", "stable", "tie") == 1.0
    assert duels("d5", "v2", "stable", "skip") == duels("d5", "v2", "stable", "win") == 0.0


def test_series_that_alerts_read_begin_at_zero() -> None:
    report.start(["d6"])
    labels = {"variant": "d6", "state": "rolled_back"}
    assert REGISTRY.get_sample_value("tiebreak_release_changes_total", labels) == 0.0
    assert REGISTRY.get_sample_value("tiebreak_retrain_latency_seconds_count", {"variant": "d6"}) == 0.0
