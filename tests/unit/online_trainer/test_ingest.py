"""Which verdicts a step may use, and what happens to every other."""

from __future__ import annotations

import msgspec

from online_trainer.ingest import Caps, IntakeState, is_held_out
from telemetry.event_log import Entry, Position
from telemetry.events import Message, PersonErased, PreferenceRetracted
from tests.unit.online_trainer.kit import START, intake, prompt_that_is, thumb, verdict


def retraction(number: int) -> PreferenceRetracted:
    return PreferenceRetracted(preference_id=f"preference-{number}", pair_id=f"pair-{number}", user="u")


def test_a_verdict_seen_twice_waits_once() -> None:
    found = intake()
    found.record(verdict(1))
    found.record(verdict(1))
    assert [v.preference_id for v in found.pending] == ["preference-1"]
    found.trained(found.next_batch(Caps(8)))
    found.record(verdict(1))
    assert not found.pending


def test_a_verdict_is_known_again_also_after_a_flood_of_others_and_a_restart() -> None:
    found = intake(policy="chat")
    found.record(verdict(1))
    found.trained(found.next_batch(Caps(8)))
    other = verdict(2, outcome="tie")
    for number in range(20_000):
        found.record(msgspec.structs.replace(other, event_id=f"tie-{number}"))
    restored = intake(msgspec.json.decode(msgspec.json.encode(found.state()), type=IntakeState), policy="chat")
    restored.record(verdict(1))
    assert not restored.pending


def test_a_thumb_waits_like_a_verdict_and_the_last_one_on_an_answer_counts() -> None:
    found = intake(heldout_ratio=0.1)
    found.record_thumb(thumb(1, rating=1, prompt=prompt_that_is(False)))
    found.record_thumb(thumb(1, rating=1, prompt=prompt_that_is(False)))
    found.record_thumb(thumb(1, rating=-1, prompt=prompt_that_is(False)))
    found.record_thumb(thumb(2, text=" ", prompt=prompt_that_is(False)))
    found.record_thumb(thumb(3, prompt=prompt_that_is(True)))
    assert [(v.preference_id, v.thumb) for v in found.pending] == [("thumb-1--1", -1)]
    assert found.dropped == [("thumb-1-1", "retracted"), ("thumb-2-1", "empty"), ("thumb-3-1", "held_out")]
    assert not found.heldout, "there is no pair to judge by"
    assert intake(found.state()).pending == found.pending


def test_the_last_thumb_on_an_answer_takes_the_place_of_an_earlier_one_also_where_nothing_is_learned_from_it() -> None:
    found, replace = intake(), msgspec.structs.replace
    liked = thumb(1, rating=1)
    found.record_thumb(thumb(1, rating=-1))
    found.record_thumb(replace(liked, completion=replace(liked.completion, finish_reason="content_filter")))
    assert not found.pending
    assert found.dropped == [("thumb-1--1", "retracted"), ("thumb-1-1", "unsafe")]
    found.record_thumb(thumb(2, rating=1))
    found.trained(found.next_batch(Caps(1)))
    found.record_thumb(replace(thumb(2, rating=-1), completion=replace(thumb(2).completion, text=" ")))
    assert not found.replay and found.dropped[2:] == [("thumb-2--1", "empty")]


def test_two_people_may_each_have_a_thumb_on_one_answer() -> None:
    found = intake()
    found.record_thumb(thumb(1, rating=1))
    found.record_thumb(msgspec.structs.replace(thumb(1, rating=-1), user="somebody else"))
    assert [v.preference_id for v in found.pending] == ["thumb-1-1", "thumb-1--1"] and not found.dropped


def test_ties_identical_and_empty_answers_are_dropped_with_their_reason() -> None:
    found = intake()
    for number, outcome in enumerate(("tie", "both_bad", "skip")):
        found.record(verdict(number, outcome=outcome))  # type: ignore[arg-type]
    found.record(verdict(3, chosen="same", rejected="same"))
    found.record(verdict(4, chosen="text", rejected="  "))
    reasons = dict(found.dropped)
    assert not found.pending
    assert [reasons[f"preference-{n}"] for n in range(5)] == ["no_preference"] * 3 + ["identical", "empty"]


def test_nobody_is_taught_to_say_what_the_filter_stopped_but_may_be_taught_not_to() -> None:
    found, replace = intake(), msgspec.structs.replace
    one, other = verdict(1), verdict(2)
    found.record(replace(one, chosen=replace(one.chosen, finish_reason="content_filter")))
    found.record(replace(other, rejected=replace(other.rejected, finish_reason="content_filter")))
    assert found.dropped == [("preference-1", "unsafe")]
    assert [v.preference_id for v in found.pending] == ["preference-2"]


def test_a_held_out_prompt_judges_versions_and_is_never_trained_on() -> None:
    found = intake(heldout_ratio=0.1)
    found.record(verdict(1, prompt=prompt_that_is(True)))
    found.record(verdict(2, prompt=prompt_that_is(False)))
    assert [v.preference_id for v in found.heldout] == ["preference-1"]
    assert [v.preference_id for v in found.pending] == ["preference-2"]
    assert found.dropped == [("preference-1", "held_out")]


def test_about_a_tenth_of_prompts_is_held_out_and_the_split_depends_on_the_prompt_alone() -> None:
    prompts = [(Message(role="user", content=f"question {n}"),) for n in range(2000)]
    share = sum(is_held_out(prompt, 0.1) for prompt in prompts) / 2000
    assert 0.08 < share < 0.12
    assert all(is_held_out(p, 0.2) for p in prompts if is_held_out(p, 0.1))


def test_a_verdict_retracted_before_training_is_dropped_and_told() -> None:
    found = intake()
    found.record(verdict(1))
    found.retract(retraction(1))
    assert not found.pending and found.dropped == [("preference-1", "retracted")]


def test_a_retraction_that_overtakes_its_verdict_still_holds() -> None:
    found = intake()
    found.retract(retraction(1))
    found = intake(found.state())
    found.record(verdict(1))
    assert not found.pending and not found.heldout


def test_a_verdict_retracted_after_training_is_not_replayed_again() -> None:
    found = intake()
    found.record(verdict(1))
    found.trained(found.next_batch(Caps(8)))
    found.retract(retraction(1))
    assert not found.replay and not found.dropped


def test_one_eager_user_fills_no_batch_and_loses_no_verdict() -> None:
    found = intake()
    for number in range(6):
        found.record(verdict(number, user="eager"))
    found.record(verdict(6, user="calm"))
    first = found.next_batch(Caps(4, per_user=2))
    assert [v.preference_id for v in first] == ["preference-0", "preference-1", "preference-6"]
    found.trained(first)
    assert [v.preference_id for v in found.next_batch(Caps(4, per_user=2))] == ["preference-2", "preference-3"]


def test_verdicts_of_refused_weights_wait_again_before_all_others_but_not_for_ever() -> None:
    found = intake()
    for number in range(3):
        found.record(verdict(number))
    for _ in range(2):
        found.trained(found.next_batch(Caps(2)))
        found.unlearned(["preference-0", "preference-1"])
    waiting = [v.preference_id for v in found.pending]
    assert waiting == ["preference-2"]  # the first two had their second chance
    assert not found.replay  # nor are they seen again as earlier verdicts
    assert found.dropped == [("preference-0", "refused"), ("preference-1", "refused")]


def test_a_first_loss_puts_verdicts_back_in_front() -> None:
    found = intake()
    for number in range(3):
        found.record(verdict(number))
    found.trained(found.next_batch(Caps(2)))
    found.unlearned(["preference-0", "preference-1", "unknown"])
    assert [v.preference_id for v in found.pending] == ["preference-0", "preference-1", "preference-2"]
    assert not found.replay
    assert found.dropped == [("unknown", "refused")]  # no longer at hand


def test_every_step_that_a_verdict_takes_part_in_counts_until_it_has_been_seen_enough() -> None:
    found = intake()
    found.record(verdict(0))
    found.record(verdict(1))
    found.trained(found.next_batch(Caps(1)))
    found.trained(found.next_batch(Caps(1)), found.replayable(2))
    assert {v.preference_id: v.passes for v in found.replay} == {"preference-0": 2, "preference-1": 1}
    assert [v.preference_id for v in found.replayable(2)] == ["preference-1"]
    found.unlearned(["preference-0", "preference-1"])
    assert [v.passes for v in found.pending] == [0, 0]  # the weights that had seen them are gone


def test_another_policys_verdicts_are_another_trainers_affair() -> None:
    found = intake(policy="chat")
    found.record(verdict(1, policy="code"))
    assert not found.pending and not found.dropped


def test_the_waiting_time_is_that_of_the_oldest_verdict() -> None:
    found = intake()
    assert found.waits_since() is None
    found.record(verdict(0))
    found.record(verdict(9))
    assert found.waits_since() == START


def test_windows_keep_the_newest() -> None:
    found = intake(replay_window=3)
    for number in range(5):
        found.record(verdict(number))
        found.trained(found.next_batch(Caps(8)))
    assert [v.preference_id for v in found.replay] == ["preference-2", "preference-3", "preference-4"]


def test_state_survives_json_and_goes_on_alike() -> None:
    found = intake(heldout_ratio=0.1)
    for number in range(5):
        found.record(verdict(number))
    found.record(verdict(7, prompt=prompt_that_is(True)))
    found.passed(Entry(Position("topic", 2, 41), "key", b""))
    found.trained(found.next_batch(Caps(2)))
    restored = intake(msgspec.json.decode(msgspec.json.encode(found.state()), type=IntakeState), heldout_ratio=0.1)
    assert restored.state() == found.state()
    assert restored.offsets == {"topic": {2: 42}}
    restored.record(verdict(3))
    assert restored.state() == found.state()


def test_labelers_of_one_users_pairs_are_people_of_their_own() -> None:
    own = intake()
    for number, labeler in enumerate(("eva", "ida", "eva")):
        own.record(msgspec.structs.replace(verdict(number, user="ann"), labeler=labeler))
    assert [each.labeler for each in own.next_batch(Caps(8, per_user=1))] == ["eva", "ida"]


def test_whoever_is_erased_is_erased_up_to_then() -> None:
    own = intake()
    for number, user in enumerate(("ann", "bob", "ann")):
        own.record(verdict(number, user=user))
    own.erase(PersonErased(user="ann", actor="operator", occurred_at=verdict(1).occurred_at))
    assert [each.preference_id for each in own.pending] == ["preference-1", "preference-2"]
    assert own.dropped == [("preference-0", "erased")]


def test_ties_wait_for_a_learner_that_knows_them() -> None:
    deaf, keen = intake(), intake(learns_ties=True)
    for own in (deaf, keen):
        own.record(verdict(0, outcome="tie"))
        own.record(verdict(1, outcome="both_bad"))
    assert deaf.dropped == [("preference-0", "no_preference"), ("preference-1", "no_preference")]
    assert [(v.preference_id, v.is_tie) for v in keen.pending] == [("preference-0", True)]
    assert not keen.effects  # nobody chose anything


def test_one_question_in_many_words_is_one_cluster_and_fills_no_batch() -> None:
    own = intake()
    for number in range(5):
        own.record(verdict(number, prompt=f"What is the {number}th prime number after {number * 100}?"))
    own.record(verdict(5, prompt="Why do cats purr when they sleep?"))
    taken = [v.preference_id for v in own.next_batch(Caps(6, per_cluster=2))]
    assert taken == ["preference-0", "preference-1", "preference-5"]


def test_verdicts_on_answers_that_are_too_old_only_judge() -> None:
    own = intake()
    own.record(verdict(0))
    own.record(verdict(1))
    own.age(lambda each: each.preference_id == "preference-0")
    assert [v.preference_id for v in own.pending] == ["preference-1"]
    assert [v.preference_id for v in own.aged] == ["preference-0"]
    assert own.dropped == [("preference-0", "stale")]
    assert own.usable_ids() == {"preference-0", "preference-1"}


def test_what_no_step_can_be_taken_on_is_dropped_everywhere_and_the_others_go_on() -> None:
    own = intake()
    for number in range(3):
        own.record(verdict(number))
    own.trained(own.next_batch(Caps(1)))
    own.quarantine({"preference-0", "preference-1"})
    assert own.usable_ids() == {"preference-2"}
    assert own.dropped == [("preference-1", "unusable")]  # the other one was trained on, and told of


def test_what_versions_got_right_is_kept_to_ask_later_ones_up_to_a_bound() -> None:
    own = intake(heldout_window=2)
    for number in range(5):
        own.record(verdict(number))
    everything = own.next_batch(Caps(9))
    own.got_right(everything[:3])
    own.got_right(everything)
    kept = [v.preference_id for v in own.regression]
    own.got_right(reversed(everything))
    assert len(kept) == 2 and kept == [v.preference_id for v in own.regression]


def test_each_cohort_counts_the_same_within_a_bound() -> None:
    found, replace = intake(replay_window=100), msgspec.structs.replace
    assert found.cohort_weights() == {}
    for number in range(12):
        found.record(replace(verdict(number), cohort="many" if number < 9 else "few"))
    found.trained(found.next_batch(Caps(6)))  # those that were trained on lately count, too
    weights = found.cohort_weights()
    assert weights == {"many": 6 / 9, "few": 6 / 3}
    assert 9 * weights["many"] == 3 * weights["few"]
    for number in range(12, 60):
        found.record(replace(verdict(number), cohort="many"))
    assert found.cohort_weights()["few"] == 4.0, "three people are no crowd"
