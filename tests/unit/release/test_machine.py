"""The life of a version, told as sentences about the pure machine."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from msgspec.structs import replace

from deploy.release.controller import reconcile
from deploy.release.machine import advance, due_probe
from deploy.release.state import (
    Canary,
    Candidate,
    Commanded,
    Input,
    Judged,
    Probed,
    Published,
    Served,
    Shadow,
    Stepped,
    Tick,
    VariantState,
    World,
)
from tests.unit.release.story import BASE, FAILED, GIBBERISH, GOOD_METRICS, HEALTHY, LIMITS, V1, V2, V3, Story

UNJUDGED = GOOD_METRICS | {"heldout_pairs": 0.0}


def test_the_base_answers_until_something_better_is_proven() -> None:
    story = Story()
    story.wait(1e6)
    assert (story.state.route.stable, story.state.route.wanted(), story.moves) == (BASE, (), [])


def test_a_good_version_goes_from_gate_over_shadow_and_canary_to_stable() -> None:
    story = Story()
    story.to_stable(V1)
    assert story.moves == [(V1, "gated"), (V1, "shadow"), (V1, "canary"), (V1, "stable")]
    assert (story.state.route.stable, story.state.route.previous, story.state.route.canary) == (V1, BASE, "")


def test_a_shadow_is_loaded_but_gets_no_users() -> None:
    story = Story()
    story.publish(V1)
    route = story.state.route
    assert (route.shadow, route.canary, route.canary_ratio, route.wanted()) == (V1, "", 0.0, (V1,))


def test_a_canary_gets_its_configured_share() -> None:
    story = Story()
    story.to_canary(V1)
    assert (story.state.route.canary, story.state.route.canary_ratio) == (V1, LIMITS.canary.ratio)


def test_nothing_is_probed_before_every_replica_holds_it() -> None:
    story = Story()
    story.probe(BASE)
    story.publish(V1)
    assert due_probe(story.state, World(story.now_s, frozenset({BASE})), LIMITS) == ""
    assert due_probe(story.state, World(story.now_s, frozenset({BASE, V1})), LIMITS) == V1


def test_the_base_is_probed_first_because_it_is_the_yardstick() -> None:
    story = Story()
    story.publish(V1)
    story.load(V1)
    assert due_probe(story.state, World(story.now_s, story.ready), LIMITS) == BASE
    story.probe(V1)  # an answer without a yardstick decides nothing
    assert story.state.route.canary == ""


def test_a_version_whose_probes_are_gibberish_never_meets_a_user() -> None:
    story = Story()
    story.probe(BASE)
    story.publish(V1)
    story.load(V1)
    story.probe(V1, GIBBERISH)
    assert story.moves[-1] == (V1, "rejected")
    assert story.state.route.wanted() == ()


def test_a_version_that_no_replica_can_load_is_rejected_in_time() -> None:
    story = Story()
    story.publish(V1)
    story.wait(LIMITS.shadow.load_timeout_s + 1)
    assert story.moves[-1] == (V1, "rejected")
    assert "not ready" in story.changes[-1].reason


def test_time_without_replicas_is_not_held_against_a_version() -> None:
    story = Story()
    story.publish(V1)
    story.ready = None
    story.wait(1000.0)
    story.ready = frozenset({BASE})
    story.wait(LIMITS.shadow.load_timeout_s - 1)
    assert story.state.route.shadow == V1


def test_a_canary_that_a_replica_has_lost_waits_until_every_replica_holds_it_again() -> None:
    story = Story()
    story.to_canary(V1)
    story.load()  # a replica restarted
    story.serve(V1, times=6)
    story.judge(V1, BASE, times=4)
    assert story.state.route.canary == V1
    story.load(V1)
    assert story.state.route.stable == V1


def test_a_shadow_that_a_replica_has_lost_since_its_probes_were_asked_stays_a_shadow() -> None:
    story = Story()
    story.probe(BASE)
    story.publish(V1)
    story.load(V1)
    story.load()
    story.probe(V1)
    assert (story.state.route.shadow, story.state.route.canary) == (V1, "")


def test_a_canary_without_evidence_stays_a_canary_and_never_becomes_stable() -> None:
    story = Story()
    story.to_canary(V1, metrics=UNJUDGED)
    story.wait(LIMITS.canary.max_s - 1)
    assert story.state.route.canary == V1
    story.wait(2)
    assert (story.moves[-1], story.state.route.stable) == ((V1, "superseded"), BASE)


def test_answers_without_verdicts_do_not_promote() -> None:
    story = Story()
    story.to_canary(V1)
    story.serve(V1, times=20)
    assert story.state.route.canary == V1


def test_many_healthy_answers_and_a_heldout_win_rate_stand_in_for_verdicts() -> None:
    story = Story()
    story.to_canary(V1)
    story.serve(V1, times=LIMITS.canary.min_completions_unjudged)
    assert story.state.route.stable == V1


def test_a_canary_that_nobody_asks_any_more_is_promoted_by_its_heldout_win_rate() -> None:
    story = Story()
    story.to_canary(V1)
    story.wait(LIMITS.canary.quiet_s - 1)
    assert story.state.route.canary == V1
    story.serve(V1, times=1)
    story.wait(LIMITS.canary.quiet_s - 1)
    assert story.state.route.canary == V1, "somebody asked: quiet begins anew"
    story.wait(2)
    assert (story.state.route.stable, "quiet" in story.changes[-1].reason) == (V1, True)


@pytest.mark.parametrize(("pairs", "win_rate", "is_promoted"), [(5, 0.6, True), (4, 1.0, False), (9, 0.4, False)])
def test_when_nobody_asks_a_few_heldout_pairs_decide(pairs: int, win_rate: float, is_promoted: bool) -> None:
    story = Story()
    story.to_canary(V1, metrics=GOOD_METRICS | {"heldout_pairs": float(pairs), "heldout_win_rate": win_rate})
    story.wait(LIMITS.canary.quiet_s + 1)
    assert (story.state.route.stable == V1) is is_promoted


def test_while_the_log_is_not_read_to_its_end_nothing_counts_as_quiet() -> None:
    story = Story()
    story.to_canary(V1)
    story.asked_s = math.inf
    story.wait(10 * LIMITS.canary.quiet_s)
    assert story.state.route.canary == V1


def test_a_quiet_canary_that_loses_or_fails_is_not_promoted() -> None:
    spoils = (
        lambda story: story.judge(BASE, V1),
        lambda story: story.serve(V1, FAILED, times=1),
        lambda story: story.serve(V1, GIBBERISH, times=3),
    )
    for spoil in spoils:
        story = Story()
        story.to_canary(V1)
        spoil(story)
        story.wait(LIMITS.canary.quiet_s + 1)
        assert story.state.route.canary == V1


def test_many_answers_without_heldout_pairs_do_not() -> None:
    story = Story()
    story.probe(BASE)
    story.publish(V1, metrics=UNJUDGED)
    story.load(V1)
    story.probe(V1)
    story.serve(V1, times=60)
    assert story.state.route.canary == V1


def test_a_canary_that_loses_its_pairs_is_rolled_back() -> None:
    story = Story()
    story.to_canary(V1)
    story.serve(V1, times=6)
    story.judge(BASE, V1, times=6)
    assert story.moves[-1] == (V1, "rolled_back")
    assert "lost to stable" in story.changes[-1].reason


def test_one_user_cannot_decide_alone_for_ever() -> None:
    story = Story()
    story.to_canary(V1)
    story.judge(V1, BASE, times=100, user="fan")
    assert story.state.canary is not None
    assert story.state.canary.verdicts["fan"].verdicts == LIMITS.canary.max_verdicts_per_user


def test_verdicts_on_pairs_shown_before_the_canary_do_not_count() -> None:
    story = Story()
    story.to_canary(V1)
    story.take(Judged("u1", V1, BASE, False, story.now_s - 1.0))
    assert story.state.canary is not None and not story.state.canary.verdicts


def test_two_failed_answers_end_a_canary_while_stable_has_none() -> None:
    story = Story()
    story.to_canary(V1)
    story.serve(BASE, times=10)
    story.serve(V1, FAILED, times=2)
    assert story.moves[-1] == (V1, "rolled_back")
    assert "error ratio" in story.changes[-1].reason


def test_failures_that_stable_shares_are_not_the_canarys_fault() -> None:
    story = Story()
    story.to_canary(V1)
    story.serve(BASE, times=2)
    story.serve(BASE, FAILED, times=4)
    story.serve(V1, times=1)
    story.serve(V1, FAILED, times=2)
    assert story.state.route.canary == V1


def test_degenerate_answers_end_a_canary() -> None:
    story = Story()
    story.to_canary(V1)
    story.serve(BASE, times=6)
    story.serve(V1, GIBBERISH, times=6)
    assert story.moves[-1] == (V1, "rolled_back")


def test_a_bad_stable_is_rolled_back_to_its_predecessor_which_was_kept_loaded() -> None:
    story = Story()
    story.to_stable(V1)
    assert story.state.route.wanted() == (V1,)  # and the base, which is always there
    story.serve(V1, GIBBERISH, times=4)
    assert (story.moves[-1], story.state.route.stable) == ((V1, "rolled_back"), BASE)


def test_probation_ends_only_with_time_and_answers_both() -> None:
    story = Story()
    story.to_stable(V1)
    story.wait(LIMITS.watch.min_s * 100)
    assert story.state.watch is not None
    story.serve(V1, times=LIMITS.watch.min_completions)
    assert story.state.watch is None


def test_the_fallback_is_a_version_that_has_answered_often_without_an_objection() -> None:
    story = Story()
    story.to_stable(V1)  # six answers as canary
    story.serve(V1, times=4)
    story.to_canary(V2, V1)
    story.serve(V2, times=6)
    story.judge(V2, V1, times=4)
    story.to_canary(V3, V2)
    story.serve(V3, times=6)
    story.judge(V3, V2, times=4)  # V2 has answered six times, as canary only
    assert (story.state.route.stable, story.state.route.previous) == (V3, V1)
    story.serve(V3, GIBBERISH, times=4)
    assert story.state.route.stable == V1


def test_a_forced_version_falls_back_on_what_it_replaced() -> None:
    story = Story()
    story.to_stable(V1)
    story.publish(V2, V1)
    story.command("promote", V2, force=True)
    story.load(V1, V2)
    assert (story.state.route.stable, story.state.route.previous) == (V2, V1)


def test_nothing_falls_back_on_a_forced_version_before_its_probation_is_over() -> None:
    story = Story()
    for version in (V1, V2):
        story.publish(version)
        story.command("promote", version, force=True)
        story.load(V1, V2)
        story.serve(version, times=30)
    assert (story.state.route.stable, story.state.route.previous) == (V2, BASE)


def test_the_newest_of_several_that_wait_wins() -> None:
    story = Story()
    story.publish(V1)
    story.publish(V2, V1)
    story.publish(V3, V2)
    assert story.moves[-2:] == [(V3, "gated"), (V2, "superseded")]
    assert (story.state.route.shadow, story.state.waiting and story.state.waiting.version) == (V1, V3)


def test_the_next_version_is_loaded_and_probed_while_users_judge_the_one_before_it() -> None:
    story = Story()
    story.to_canary(V1)
    story.prove(V2, V1)
    assert (story.state.route.canary, story.state.route.shadow) == (V1, V2)
    assert due_probe(story.state, World(story.now_s, story.ready), LIMITS) == "", "once is enough"
    story.serve(V1, times=6)
    story.judge(V1, BASE, times=4)
    assert story.moves[-2:] == [(V1, "stable"), (V2, "canary")]


def test_a_proven_shadow_makes_room_for_a_newer_version_while_the_canary_stays() -> None:
    story = Story()
    story.to_canary(V1)
    story.prove(V2, V1)
    story.publish(V3, V2)
    assert story.moves[-2:] == [(V2, "superseded"), (V3, "shadow")]
    assert (story.state.route.canary, story.state.waiting) == (V1, None)


def test_a_version_that_fails_its_probes_does_not_push_a_canary_aside() -> None:
    story = Story()
    story.to_canary(V1, metrics=UNJUDGED)
    story.publish(V2, V1)
    story.wait(LIMITS.canary.hold_s + 1)
    assert story.state.route.canary == V1, "nothing that is proven waits"
    story.load(V1, V2)
    story.probe(V2, GIBBERISH)
    assert (story.state.route.canary, story.moves[-1]) == (V1, (V2, "rejected"))


def test_a_proven_shadow_that_a_replica_lost_has_the_whole_time_to_be_loaded_again() -> None:
    story = Story()
    story.state = replace(story.state, undecided=10_000)
    story.to_canary(V1, metrics=UNJUDGED)
    story.prove(V2, V1)
    story.now_s += LIMITS.shadow.load_timeout_s + 10.0
    story.load(V1)
    story.wait(LIMITS.shadow.load_timeout_s - 1)
    assert (story.state.route.canary, story.state.route.shadow) == (V1, V2)
    story.wait(2)
    assert (story.state.route.canary, story.moves[-1]) == (V1, (V2, "rejected"))


def test_a_canary_that_fails_takes_its_proven_descendant_along() -> None:
    story = Story()
    story.to_canary(V1)
    story.prove(V2, V1)
    story.serve(V1, times=6)
    story.judge(BASE, V1, times=6)
    assert story.moves[-2:] == [(V1, "rolled_back"), (V2, "rejected")]
    assert story.state.route.wanted() == ()


def test_a_forced_version_supersedes_canary_and_shadow() -> None:
    story = Story()
    story.to_canary(V1)
    story.prove(V2, V1)
    story.publish(V3, metrics={})
    story.command("promote", V3, force=True)
    assert story.moves[-3:] == [(V1, "superseded"), (V2, "superseded"), (V3, "shadow")]
    story.load(V3)
    assert (story.state.route.stable, story.state.route.canary, story.state.route.shadow) == (V3, "", "")


def test_an_undecided_canary_makes_room_after_its_hold_time() -> None:
    story = Story()
    story.to_canary(V1, metrics=UNJUDGED)
    story.prove(V2, V1)
    story.wait(LIMITS.canary.hold_s - 1)
    assert story.state.route.canary == V1
    story.wait(2)
    assert story.moves[-2:] == [(V1, "superseded"), (V2, "canary")]


def test_where_evidence_is_rare_each_canary_stays_twice_as_long_until_one_is_decided() -> None:
    story = Story()
    story.to_canary(V1, metrics=UNJUDGED)
    story.prove(V2, V1, metrics=UNJUDGED)
    story.wait(LIMITS.canary.hold_s + 1)
    assert story.state.route.canary == V2
    story.prove(V3, V2, metrics=UNJUDGED)
    for _ in range(2):
        story.serve(BASE)
        story.wait(LIMITS.canary.hold_s - 1)
    assert story.state.route.canary == V2
    story.serve(V2, times=6)
    story.judge(V2, BASE, times=4)
    assert (story.state.route.stable, story.state.undecided) == (V2, 0)


def test_a_slow_user_is_no_desertion() -> None:
    story = Story()
    story.state = replace(story.state, undecided=3)
    story.to_canary(V1, metrics=UNJUDGED)
    story.prove(V2, V1)
    for _ in range(4):
        story.wait(25)
        story.serve(V1)
        story.judge(V1, BASE)
    assert (V1, "stable") in story.moves


def test_only_a_canary_that_made_room_undecided_lengthens_the_next_ones_time() -> None:
    story = Story()
    story.state = replace(story.state, undecided=2)
    story.publish(V1)
    story.load(V1)
    story.probe(BASE)
    story.probe(V1, GIBBERISH)
    assert (story.moves[-1], story.state.undecided) == ((V1, "rejected"), 2)


def test_the_hold_time_stops_growing() -> None:
    story = Story()
    story.state = replace(story.state, undecided=10_000)
    story.to_canary(V1, metrics=UNJUDGED)
    story.prove(V2, V1)
    for _ in range(10):
        story.serve(BASE)
        story.wait(LIMITS.canary.longest_hold_s / 10 - 0.1)
    assert story.state.route.canary == V1
    story.serve(BASE)
    story.wait(2)
    assert story.moves[-2:] == [(V1, "superseded"), (V2, "canary")]


def test_a_canary_that_nobody_asks_makes_room_after_half_its_time() -> None:
    story = Story()
    story.state = replace(story.state, undecided=10_000)
    story.to_canary(V1, metrics=UNJUDGED)
    story.serve(V1)
    story.prove(V2, V1)
    story.wait(LIMITS.canary.longest_hold_s / 2 + 1)
    assert story.moves[-2:] == [(V1, "superseded"), (V2, "canary")]


def test_a_version_that_fails_its_gate_does_not_push_a_canary_aside() -> None:
    story = Story()
    story.to_canary(V1, metrics=UNJUDGED)
    story.publish(V2, V1, metrics={})
    story.wait(LIMITS.canary.hold_s + 1)
    assert (story.state.route.canary, story.moves[-1]) == (V1, (V2, "rejected"))


def test_descendants_of_a_rejected_version_are_rejected_too() -> None:
    story = Story()
    story.publish(V1, metrics={})
    story.publish(V2, V1)
    story.publish(V3, V2)
    assert story.moves == [(V1, "rejected"), (V2, "rejected"), (V3, "rejected")]
    assert story.changes[1].reason == f"descends from {V1}"


def test_rolling_back_stable_takes_its_descendant_on_trial_along() -> None:
    story = Story()
    story.to_stable(V1)
    story.to_canary(V2, V1)
    story.serve(V1, GIBBERISH, times=4)
    assert story.moves[-2:] == [(V1, "rolled_back"), (V2, "rolled_back")]
    assert story.state.route.wanted() == ()


def test_a_version_told_twice_is_decided_once() -> None:
    story = Story()
    story.publish(V1)
    story.publish(V1)
    assert story.moves == [(V1, "gated"), (V1, "shadow")]


def test_a_forced_promotion_skips_the_guards_but_waits_for_every_replica() -> None:
    story = Story()
    story.publish(V1, metrics={})
    story.command("promote", V1, force=True)
    assert (story.state.route.stable, story.state.route.shadow) == (BASE, V1)
    story.load(V1)
    assert (story.state.route.stable, story.changes[-1].actor) == (V1, "ann")


def test_a_forced_version_that_degenerates_is_rolled_back_by_probes_alone() -> None:
    story = Story()
    story.probe(BASE)
    story.publish(V1, metrics={})
    story.command("promote", V1, force=True)
    story.load(V1)
    assert due_probe(story.state, World(story.now_s, story.ready), LIMITS) == V1
    story.probe(V1, GIBBERISH)
    assert (story.moves[-1], story.state.route.stable) == ((V1, "rolled_back"), BASE)
    assert story.changes[-1].actor == "controller"


def test_a_forced_version_that_degenerates_is_rolled_back_by_its_answers() -> None:
    story = Story()
    story.serve(BASE, times=6)
    story.publish(V1, metrics={})
    story.command("promote", V1, force=True)
    story.load(V1)
    story.serve(V1, GIBBERISH, times=4)
    assert story.state.route.stable == BASE


def test_a_promotion_without_force_goes_through_the_guards() -> None:
    story = Story()
    story.publish(V1, metrics={})
    story.command("promote", V1)
    assert (story.moves[-1], story.state.route.shadow) == ((V1, "refused"), "")
    assert "force overrides" in story.changes[-1].reason


def test_a_superseded_version_can_be_put_back_in_the_queue() -> None:
    story = Story()
    story.to_canary(V1, metrics=UNJUDGED)
    story.prove(V2, V1)
    story.wait(LIMITS.canary.hold_s + 1)
    story.command("rollback", V2)
    story.command("promote", V1)
    story.load()
    assert story.state.route.shadow == V1


def test_an_operator_can_roll_back_stable_and_canary() -> None:
    story = Story()
    story.to_stable(V1)
    story.command("rollback", V1)
    assert (story.moves[-1], story.state.route.stable) == ((V1, "rolled_back"), BASE)
    story.to_canary(V2)
    story.command("rollback", V2)
    assert (story.moves[-1], story.state.route.canary) == ((V2, "rolled_back"), "")


@pytest.mark.parametrize("name", ["promote", "rollback"])
def test_a_command_for_an_unknown_version_is_refused_and_changes_nothing(name: str) -> None:
    story = Story()
    before = story.state
    story.command(name, "v000099-deadbeef", force=True)
    assert story.moves == [("v000099-deadbeef", "refused")]
    assert story.state == before


def test_a_live_version_tells_every_verdict_it_learned_from_once_ancestors_included() -> None:
    story = Story()
    story.take(Stepped((("t1", "s1"),)))
    story.to_canary(V1)
    assert story.changes[-1].traces == (("t1", "s1"),)
    story.take(Stepped((("t2", "s2"),)))
    story.prove(V2, V1)
    story.take(Stepped((("t3", "s3"),)))
    story.prove(V3, V2)  # V2 is superseded while it waits: its verdicts go live with V3
    story.wait(LIMITS.canary.hold_s + 1)
    assert story.moves[-1] == (V3, "canary")
    assert sorted(story.changes[-1].traces) == [("t2", "s2"), ("t3", "s3")]


def test_retrain_latency_counts_from_the_oldest_verdict_that_was_not_live_yet() -> None:
    story = Story()
    story.probe(BASE)
    story.take(Published(Candidate(version=V1, parent=BASE, metrics=GOOD_METRICS, oldest_verdict_at_s=500.0)))
    story.load(V1)
    story.probe(V1)
    assert story.changes[-1].learned_since_s == 500.0
    story.serve(V1, times=6)
    story.judge(V1, BASE, times=4)
    assert (story.moves[-1], story.changes[-1].learned_since_s) == ((V1, "stable"), None)


def test_the_state_survives_json() -> None:
    story = Story()
    story.to_stable(V1)
    story.to_canary(V2, V1)
    assert msgspec.json.decode(msgspec.json.encode(story.state), type=VariantState) == story.state


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_stable_was_ready_on_every_replica_when_it_became_stable(seed: int) -> None:
    draw = random.Random(seed)
    story = Story()
    versions = [f"v{number:06d}-{number:08x}" for number in range(1, 9)]
    was_ready = {BASE}
    for _ in range(400):
        story.now_s += draw.choice([0.0, 0.1, 2.0, 30.0])
        if draw.random() < 0.2:
            held = frozenset(draw.sample(versions, draw.randint(0, 8))) | {BASE}
            story.ready = None if draw.random() < 0.2 else held
        stable_before, changes_before = story.state.route.stable, len(story.changes)
        trial = draw.choice([_name(story.state.canary), _name(story.state.shadow)]) or BASE
        story.take(_anything(draw, versions, (trial, story.state.route.stable), story.now_s))
        was_ready |= story.ready or frozenset()
        promoted = [change.version for change in story.changes[changes_before:] if change.state == "stable"]
        assert all(version in (story.ready or frozenset()) for version in promoted)
        route = story.state.route
        assert route.stable in was_ready and route.previous in was_ready
        assert route.stable == stable_before or len(story.changes) > changes_before, "stable moved unannounced"
        assert len(route.wanted()) <= 4
        assert (route.canary, route.shadow) == (_name(story.state.canary), _name(story.state.shadow))


def _name(trial: Canary | Shadow | None) -> str:
    return trial.candidate.version if trial else ""


def _anything(draw: random.Random, versions: list[str], live: tuple[str, str], now_s: float) -> Input:
    """Half of what happens concerns the version on trial and stable, so that trials come to an end."""
    version = draw.choice([BASE, *versions]) if draw.random() < 0.5 else draw.choice(live)
    rival = live[1] if version == live[0] else live[0]
    seen = replace(draw.choice([HEALTHY, HEALTHY, HEALTHY, GIBBERISH, FAILED]), at_s=now_s)
    metrics = GOOD_METRICS if draw.random() < 0.8 else {}
    word = draw.choice(["promote", "rollback"])
    return draw.choice(
        [
            Published(Candidate(version=version, parent=draw.choice([BASE, *versions]), metrics=metrics)),
            Served(version, seen),
            Served(version, seen),
            Judged(draw.choice("abc"), version, rival, draw.random() < 0.2, now_s),
            Probed(version, (seen,) * 4),
            Probed(version, (replace(HEALTHY, at_s=now_s),) * 4),
            Commanded(word, version, force=draw.random() < 0.5),  # type: ignore[arg-type]
            Tick(),
        ]
    )


def test_advancing_twice_with_nothing_new_changes_nothing() -> None:
    story = Story()
    story.to_stable(V1)
    world = World(story.now_s, story.ready)
    once, changes = advance(story.state, Tick(), world, LIMITS)
    assert (once, changes) == (story.state, ())


def test_a_trial_that_is_not_known_leaves_the_route() -> None:
    """As an older program would have saved it: nobody would judge it, and it would keep its users."""
    story = Story()
    story.to_canary(V1)
    story.prove(V2, V1)
    saved = replace(story.state, canary=None, shadow=None)
    kept = reconcile({"chat-main": story.state}, LIMITS, {"tiny": BASE})["chat-main"]
    cleared = reconcile({"chat-main": saved}, LIMITS, {"tiny": BASE})["chat-main"]
    assert (kept.route.canary, kept.route.shadow) == (V1, V2)
    assert (cleared.route.canary, cleared.route.canary_ratio, cleared.route.shadow) == ("", 0.0, "")
