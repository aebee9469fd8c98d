"""The trainer on a real Redis log: verdicts become batches, batches become versions, and nothing counts twice."""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from online_trainer.publish import Draft, VersionStore
from telemetry.config import TelemetryConfig
from telemetry.events import (
    VERSIONS,
    PersonErased,
    PreferenceRetracted,
    encode,
    utc_now,
)
from telemetry.manifest import read_version
from telemetry.people import KeysAway
from telemetry.process import signing_key
from tests.trainer_bench import Bench
from tests.unit.online_trainer.kit import CONFIG, START, prompt_that_is, thumb, tiny_policy, verdict


def test_verdicts_become_a_signed_version_that_knows_them(bench: Bench) -> None:
    given = [verdict(n) for n in range(4)]
    bench.append(*given)
    bench.turn()
    (batch,), (version,) = bench.batches(), bench.published()
    assert batch.preference_ids == version.preference_ids == tuple(v.event_id for v in given)
    assert batch.metrics["rewards/accuracies"] == 0.5  # the first step starts from the reference
    assert version.parent == bench.base and version.oldest_verdict_at == given[0].occurred_at
    manifest = read_version(Path(version.uri), signing_key(bench.telemetry.state_path))
    assert manifest.metrics == version.metrics and manifest.metrics["kl_per_token"] > 0
    assert any(tensor.any() for name, tensor in bench.store.read(version.version).items() if "lora_B" in name)


def test_a_verdict_in_another_topic_teaches_nothing(bench: Bench) -> None:
    """For the recorder it is a dead letter; learned from here, its replay would count twice."""
    bench.log.append(VERSIONS, "k", encode(verdict(1))).result()
    given = [verdict(n) for n in range(2, 6)]
    bench.append(*given)
    bench.turn()
    intake = bench.trainer._state().intake
    assert {each.preference_id for each in (*intake.pending, *intake.replay)} == {each.event_id for each in given}


def test_thumbs_are_learned_from_where_the_configuration_says_so(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    thumbs = [thumb(n, rating=1 if n % 2 else -1) for n in range(4)]
    deaf = Bench(telemetry_config, tiny_model)
    deaf.append(*thumbs)
    deaf.turn(2)
    assert not deaf.batches()
    bench = Bench(telemetry_config, tiny_model, msgspec.structs.replace(CONFIG, thumb_weight=1.0))
    bench.turn(2)
    (batch,) = bench.batches()
    assert sorted(batch.preference_ids) == sorted(each.event_id for each in thumbs)
    (version,) = bench.published()
    assert version.preference_ids == batch.preference_ids
    assert bench.store.read(version.version)


def test_a_clock_that_was_set_back_holds_nothing_up(bench: Bench) -> None:
    bench.append(msgspec.structs.replace(verdict(1), occurred_at=utc_now() + timedelta(hours=1)))
    bench.turn(2)
    assert [batch.preference_ids for batch in bench.batches()] == [(verdict(1).event_id,)]


def test_a_few_verdicts_wait_for_more_and_then_are_trained_on_all_the_same(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    patient = Bench(telemetry_config, tiny_model, msgspec.structs.replace(CONFIG, flush_s=3600.0))
    patient.append(msgspec.structs.replace(verdict(1), occurred_at=utc_now()))
    patient.turn(2)
    assert not patient.batches()
    eager = Bench(telemetry_config, tiny_model, msgspec.structs.replace(CONFIG, flush_s=0.0))
    eager.turn(2)
    assert [batch.preference_ids for batch in eager.batches()] == [("preference-1",)]


def test_earlier_verdicts_stand_back_while_new_ones_wait(bench: Bench) -> None:
    bench.append(*(verdict(n) for n in range(12)))
    bench.turn(3)
    assert [len(batch.preference_ids) for batch in bench.batches()] == [4, 4, 4]
    assert [len(batch.replayed_ids) for batch in bench.batches()] == [0, 0, 2]


def test_in_quiet_times_earlier_verdicts_are_gone_through_again_and_that_is_published_once(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    config = msgspec.structs.replace(CONFIG, max_passes=3, rehearse_s=0.0, replay_pairs=0)
    bench = Bench(telemetry_config, tiny_model, config)
    given = {f"preference-{n}" for n in range(6)}
    bench.append(*(verdict(n) for n in range(6)))
    bench.turn(12)
    counts = Counter(name for batch in bench.batches() for name in batch.replayed_ids)
    assert counts == dict.fromkeys(given, 2)
    assert Counter(name for batch in bench.batches() for name in batch.preference_ids) == dict.fromkeys(given, 1)
    rehearsed = {batch.metrics["learning_rate"] for batch in bench.batches() if not batch.preference_ids}
    assert rehearsed == {config.learning_rate * config.rehearse_rate} and config.rehearse_rate < 1
    *learned, last = bench.published()
    assert {name for version in learned for name in version.preference_ids} == given
    assert last.preference_ids == () and last.step == len(bench.batches()) and last.parent == learned[-1].version
    bench.start()  # and nothing more after a restart
    bench.turn(3)
    assert bench.published()[-1] == last and len(bench.batches()) == last.step


def test_earlier_verdicts_are_not_gone_over_once_the_budget_is_used_up(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    config = msgspec.structs.replace(CONFIG, rehearse_s=0.0, replay_pairs=0, kl_budget=1e-6)
    bench = Bench(telemetry_config, tiny_model, config)
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn(6)
    assert [batch.preference_ids for batch in bench.batches()] == [tuple(f"preference-{n}" for n in range(4))]
    bench.start()  # a trainer that starts again measures how far the weights are
    bench.turn(3)
    assert len(bench.batches()) == len(bench.published()) == 1


def test_no_user_is_a_crowd_when_earlier_verdicts_are_gone_over(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    config = msgspec.structs.replace(CONFIG, rehearse_s=0.0, flush_s=0.0, max_pairs_per_user=1, max_passes=2)
    bench = Bench(telemetry_config, tiny_model, config)
    bench.append(*(verdict(n, user="eager") for n in range(3)), verdict(3, user="calm"))
    bench.turn(10)
    alone = [batch.replayed_ids for batch in bench.batches() if not batch.preference_ids]
    assert alone and all(len(set(ids) - {"preference-3"}) <= 1 for ids in alone)


def test_a_new_verdict_ends_the_going_over_of_earlier_ones(bench: Bench) -> None:
    bench.config = msgspec.structs.replace(CONFIG, rehearse_s=0.0, flush_s=0.0)
    bench.start()
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn(2)
    assert not bench.batches()[-1].preference_ids
    bench.append(verdict(4))
    bench.turn()
    assert bench.batches()[-1].preference_ids == bench.published()[-1].preference_ids == ("preference-4",)


def test_unusable_retracted_and_held_out_verdicts_are_told_as_dropped(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    config = msgspec.structs.replace(CONFIG, heldout_ratio=0.1, flush_s=0.0)
    bench = Bench(telemetry_config, tiny_model, config)
    bench.append(
        verdict(1, outcome="tie"),
        verdict(2, prompt=prompt_that_is(True)),
        verdict(3),
        PreferenceRetracted(preference_id="preference-3", pair_id="pair-3", user="user-3"),
    )
    bench.turn(2)
    (report,) = bench.batches()
    reasons = {"preference-1": "no_preference", "preference-2": "held_out", "preference-3": "retracted"}
    assert dict(report.dropped) == reasons and report.preference_ids == ()
    assert not bench.published()


def test_while_full_steps_wait_they_come_before_the_next_version(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    config = msgspec.structs.replace(CONFIG, publish_interval_s=2.0)
    bench, now = Bench(telemetry_config, tiny_model, config), [START]
    bench.trainer._now = lambda: now[0]
    bench.append(*(verdict(n) for n in range(16)))
    bench.turn()
    assert len(bench.published()) == 1
    now[0] += timedelta(seconds=3)
    bench.turn()
    assert (len(bench.batches()), len(bench.published())) == (2, 1), "two steps still wait"
    bench.turn(2)
    assert (len(bench.batches()), len(bench.published())) == (4, 2)


def test_a_restarted_trainer_goes_on_and_trains_nothing_twice(bench: Bench) -> None:
    bench.append(*(verdict(n) for n in range(6)))
    bench.turn()
    before = bench.policy.tensors()
    bench.start()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.policy.tensors().items())
    bench.append(*(verdict(n) for n in range(6, 8)))
    bench.turn(2)
    counts = Counter(name for batch in bench.batches() for name in batch.preference_ids)
    assert counts == {f"preference-{n}": 1 for n in range(8)}
    assert [version.parent for version in bench.published()] == [bench.base, bench.published()[0].version]


class Killed(BaseException):
    """In the place of SIGKILL."""


def test_killed_at_every_point_it_takes_the_same_steps_to_the_same_weights(
    bench: Bench, telemetry_config: TelemetryConfig, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.append(*(verdict(n) for n in range(32)))
    bench.turn(8)

    def steps() -> list[tuple[str, tuple[str, ...], dict[str, float]]]:
        return [(batch.event_id, batch.preference_ids, batch.metrics) for batch in bench.batches()]

    taken, weights = steps(), bench.policy.tensors()
    assert [len(names) for _, names, _ in taken] == [4] * 8
    other = Bench(msgspec.structs.replace(telemetry_config, state=str(tmp_path / "other")), tiny_model)
    dice, died = random.Random(1), Counter[str]()

    def dies(point: str) -> None:
        if dice.random() < 0.3:
            died[point] += 1
            raise Killed

    monkeypatch.setattr("online_trainer.trainer.reach", dies)
    monkeypatch.setattr("online_trainer.checkpoint.reach", dies)
    while other.trainer._learner.step < 8 or other.trainer._has_news():
        try:
            other.turn()
        except Killed:
            other.start()
    assert died.keys() == {
        "trainer.stepped", "trainer.checkpoint_staged", "trainer.checkpointed", "trainer.told", "publisher.written"
    }  # fmt: skip
    assert steps() == taken, "each was told again, under the id that it had"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.policy.tensors().items())


def test_no_version_names_more_verdicts_than_an_event_holds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("online_trainer.trainer.MOST_NAMED", 10)
    monkeypatch.setattr("online_trainer.trainer.MOST_DROPS", 3)
    bench.append(*(verdict(n) for n in range(32)), *(verdict(n, outcome="tie") for n in range(32, 40)))
    assert bench.trainer.finish() == bench.published()[-1].version
    assert [len(version.preference_ids) for version in bench.published()] == [8] * 4
    told = [name for event in bench.batches() for name, _ in event.dropped]
    assert sorted(told) == sorted(f"preference-{n}" for n in range(32, 40))
    assert all(len(event.dropped) <= 3 for event in bench.batches())


def test_a_log_that_ends_has_no_version_where_nobody_can_judge_so_many_verdicts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("online_trainer.trainer.MOST_NAMED", 10)
    monkeypatch.setattr("online_trainer.evaluate.unjudged", lambda *_: "the scorer is away")
    bench.append(*(verdict(n) for n in range(32)))
    assert bench.trainer.finish() == ""
    assert not bench.published()


def test_a_refusal_that_came_while_it_was_away_is_heard_before_it_publishes(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    bench = Bench(telemetry_config, tiny_model, msgspec.structs.replace(CONFIG, publish_interval_s=3600.0))
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    (first,) = bench.published()
    bench.append(*(verdict(n) for n in range(4, 8)))
    bench.turn()
    assert bench.trainer._has_news() and len(bench.published()) == 1
    bench.refuse(first.version, bench.base, "rolled_back")
    bench.start()
    bench.turn()
    assert first.version not in [version.parent for version in bench.published()]


def test_preferences_are_measured_against_the_version_that_was_promoted_also_after_a_restart(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    bench = Bench(telemetry_config, tiny_model, msgspec.structs.replace(CONFIG, reference="promoted"))
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    version = bench.published()[0].version
    assert bench.policy.anchor is None
    bench.refuse(version, version, state="stable")
    bench.append(*(verdict(n) for n in range(4, 8)))
    bench.turn()
    assert bench.batches()[1].metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-4)  # it is its own reference
    bench.start()
    anchor = bench.policy.anchor
    assert anchor is not None
    assert all(torch.equal(tensor, anchor[name]) for name, tensor in bench.store.read(version).items())


def test_a_promoted_version_of_another_rank_is_no_reference_and_no_end(
    telemetry_config: TelemetryConfig, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(telemetry_config, tiny_model, msgspec.structs.replace(CONFIG, reference="promoted"))
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    ours = bench.published()[0].version
    bench.refuse(ours, ours, state="stable")
    bench.turn()
    draft = Draft(parent=ours, base_digest="x", step=9, preference_ids=(), metrics={}, created_at=utc_now())
    wide = tiny_policy(tiny_model, msgspec.structs.replace(CONFIG, rank=2))
    other, _ = bench.store.write(draft, wide.tensors())
    bench.refuse(other, other, state="stable")
    bench.append(*(verdict(n) for n in range(4, 8)))
    bench.turn()
    assert len(bench.batches()) == 2
    anchor = bench.policy.anchor
    assert anchor is not None
    assert all(torch.equal(tensor, anchor[name]) for name, tensor in bench.store.read(ours).items())
    assert f"stable is {other} now" in caplog.text and "rank, layers and targets" in caplog.text


def test_verdicts_on_answers_of_long_ago_judge_and_teach_nothing(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    bench = Bench(telemetry_config, tiny_model, msgspec.structs.replace(CONFIG, stale_versions=0))
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    bench.append(*(verdict(n) for n in range(4, 8)))  # on the base's answers, and a version came since
    bench.turn()
    bench.append(*(verdict(n, version=bench.published()[0].version) for n in range(8, 12)))
    bench.turn(2)
    assert [batch.preference_ids[0] for batch in bench.batches() if batch.preference_ids] == [
        "preference-0", "preference-8",
    ]  # fmt: skip
    assert {reason for batch in bench.batches() for _, reason in batch.dropped} == {"stale"}
    assert bench.published()[-1].metrics["aged_pairs"] == 4


def test_a_version_says_how_it_was_judged(bench: Bench) -> None:
    bench.append(*(verdict(n, user=f"user-{n}") for n in range(4)))
    bench.turn()
    bench.append(*(verdict(n, user=f"user-{n}") for n in range(4, 8)))
    bench.turn()
    values = bench.published()[-1].metrics
    assert values["regression_pairs"] == 4 and values["regression_win_rate"] == 1.0
    assert values["replay_win_rate"] == 1.0 and values["replay_calibration_error"] < 0.5
    assert values["capability_perplexity"] == pytest.approx(values["base_capability_perplexity"], rel=0.3)


def test_somebody_elses_version_in_store_and_log_changes_nothing(bench: Bench) -> None:
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    ours = bench.published()[0]
    foreign_config = msgspec.structs.replace(CONFIG, rank=2)
    foreign = VersionStore(bench.telemetry.state_path / "versions", foreign_config, b"k" * 32)
    draft = Draft(parent=ours.version, base_digest="x", step=9, preference_ids=(), metrics={}, created_at=utc_now())
    version, manifest = foreign.write(draft, {"x": torch.zeros(1)})
    bench.append(msgspec.structs.replace(foreign.announcement(version, manifest, None), event_id="foreign"))
    bench.refuse(version, stable=ours.version, state="rolled_back")
    before = bench.policy.tensors()
    bench.turn()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.policy.tensors().items())
    bench.append(*(verdict(n) for n in range(4, 8)))
    bench.turn()
    newest = bench.published()[-1]
    assert newest.parent == ours.version and newest.version.startswith("v000003-")


def test_a_step_is_not_told_before_a_checkpoint_has_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that are away fail the checkpoint; a trainer killed then would learn the step again, and tell it again."""

    def away(*_: Any) -> Any:
        raise KeysAway("no answer")

    bench.append(*(verdict(n) for n in range(4)))
    reader = bench.log.reader(bench.trainer.topics, {})
    with monkeypatch.context() as patched:
        patched.setattr("online_trainer.trainer.sealed", away)
        with pytest.raises(KeysAway):
            bench.trainer.turn(reader, timeout_s=0.05)
    assert len(bench.trainer._lineage.preference_ids) == 4
    bench.trainer.tell()
    assert not bench.batches()
    bench.trainer.turn(reader, timeout_s=0.05)
    reader.close()
    assert [batch.preference_ids for batch in bench.batches()] == [tuple(f"preference-{n}" for n in range(4))]
    bench.start()
    bench.turn(2)
    assert len(bench.batches()) == 1


def test_one_verdict_that_cannot_be_learned_from_is_dropped_and_the_others_are_learned(bench: Bench) -> None:
    tokenizer: Any = bench.policy.tokenizer
    refusal = "{% if messages[0]['content'] == 'question 1' %}{{ raise_exception('no such question') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    bench.append(*(verdict(n) for n in range(5)))
    bench.turn(3)
    assert [batch.preference_ids for batch in bench.batches() if batch.preference_ids] == [
        ("preference-0", "preference-2", "preference-3", "preference-4")
    ]
    assert [batch.dropped for batch in bench.batches() if batch.dropped] == [(("preference-1", "unusable"),)]


def test_a_given_share_of_mistakes_is_the_one_of_the_settings_also_after_a_restart(bench: Bench) -> None:
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    bench.config = msgspec.structs.replace(bench.config, label_smoothing=0.2)
    bench.start()
    bench.append(*(verdict(n) for n in range(4, 8)))
    bench.turn()
    assert [batch.metrics["flip_rate"] for batch in bench.batches()] == [CONFIG.label_smoothing, 0.2]


def test_an_erased_person_is_in_no_checkpoint_any_more(bench: Bench) -> None:
    for start in (0, 4):
        bench.append(*(verdict(n, user=f"user-{n % 4}") for n in range(start, start + 4)))
        bench.turn()
    bench.append(PersonErased(user="user-1", actor="operator"))
    bench.turn(2)
    (left,) = (bench.telemetry.state_path / "trainer").rglob("state.json")
    assert b'"user-2"' in left.read_bytes() and b'"user-1"' not in left.read_bytes()
    assert bench.batches()[-1].preference_ids, "nothing else is told"


def test_no_more_is_read_than_is_learned_while_steps_wait_but_refusals_get_through(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    bench = Bench(telemetry_config, tiny_model, msgspec.structs.replace(CONFIG, publish_interval_s=3600.0))
    bench.append(*(verdict(n) for n in range(600)))
    bench.turn()
    version = bench.published()[0].version
    waiting = len(bench.trainer._state().intake.pending)
    assert 0 < waiting < 600
    bench.turn()
    assert len(bench.trainer._state().intake.pending) == waiting
    bench.refuse(version, stable=bench.base, state="rolled_back")
    bench.turn(3)
    assert not bench.trainer._state().lineage.descends_from(version)
    assert len(bench.trainer._state().intake.pending) < waiting + 20, "with those that the refused one had learned"
