"""Which events are evidence about a version, and which are not."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from deploy.release.intake import OWN_ERRORS, inputs_of, is_answering
from deploy.release.state import Served
from telemetry.events import Channel, CompletionServed, LabelSource
from telemetry.routing import Replica, ReplicaTable, VariantRoute
from tests import examples


def served(error: str, *, channel: Channel = "stable", finish_reason: str = "error") -> CompletionServed:
    return CompletionServed(
        completion_id="c", request_id="r", policy="chat", variant="main", version="v1", channel=channel, pair_id="",
        finish_reason=finish_reason, error=error, prompt_tokens=1, completion_tokens=0, ttft_s=0.0, duration_s=0.1,
        repetition_ratio=0.0, mean_logp=0.0, is_unsafe=False,
    )  # fmt: skip


@pytest.mark.parametrize("error", OWN_ERRORS)
def test_what_weights_can_do_counts_against_the_version(error: str) -> None:
    found = inputs_of(served(error))
    assert found is not None
    assert isinstance(found[1], Served)
    assert found[1].seen.is_error


@pytest.mark.parametrize("error", ["context_length_exceeded", "invalid_request", "overloaded", "no_replica",
                                   "upstream_failed", "deadline_exceeded", "shutting_down"])  # fmt: skip
def test_a_clients_mistake_and_a_dead_replica_say_nothing_about_the_version(error: str) -> None:
    assert inputs_of(served(error)) is None


def test_pinned_answers_and_cancelled_ones_are_no_evidence() -> None:
    assert inputs_of(served("", channel="pinned", finish_reason="stop")) is None
    assert inputs_of(served("", finish_reason="cancelled")) is None
    assert inputs_of(served("", finish_reason="stop")) is not None


@pytest.mark.parametrize(
    ("base", "version", "age_s", "expected"),
    [
        ("tiny", "v1", 0.0, True),
        ("tiny", "v2", 0.0, True),
        ("tiny", "v3", 0.0, False),  # a shadow: probes alone ask it
        ("other", "v1", 0.0, False),
        ("tiny", "v1", 60.0, False),  # nobody knows any more
    ],
)
def test_a_replica_that_answers_users_now_means_that_they_ask(
    base: str, version: str, age_s: float, expected: bool
) -> None:
    route = VariantRoute("main", "tiny", "v0", stable="v1", previous="v0", canary="v2", shadow="v3")
    busy = Replica("r", base, "http://r", True, ("v0", "v1", "v2", "v3"), 1, 0, in_flight_by_version={version: 1})
    assert is_answering(ReplicaTable(1000.0 - age_s, (busy,)), route, 1000.0, 10.0) is expected


def test_without_a_table_nobody_is_seen_asking() -> None:
    route = VariantRoute("main", "tiny", "v0", stable="v1", previous="v0")
    assert not is_answering(None, route, 1000.0, 10.0)


@pytest.mark.parametrize(
    ("source", "counts"), [("end_user", True), ("simulated", True), ("labeler", False), ("judge", False)]
)
def test_labels_are_no_evidence_of_users(source: LabelSource, counts: bool) -> None:
    """Many labelers judge one pair: that is not many users."""
    assert (inputs_of(replace(examples.preference(1), source=source)) is not None) is counts
