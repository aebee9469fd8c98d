"""The trainer on a real Redis log: verdicts become versions, and no death loses or doubles one."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import tomli_w
import torch

from online_trainer.config import TrainerConfig
from online_trainer.publish import Draft, VersionStore
from online_trainer.tracking import Nobody, Tracker
from online_trainer.trainer import Trainer
from telemetry.config import TelemetryConfig, open_log, open_sealer
from telemetry.event_log import EventLog
from telemetry.events import (
    TOPIC_OF,
    VERSIONS,
    AnyEvent,
    BatchTrained,
    PersonErased,
    PreferenceRetracted,
    ReleaseChanged,
    VersionPublished,
    decode,
    encode,
    key_of,
    utc_now,
)
from telemetry.manifest import Manifest, base_digest, base_version, read_version
from telemetry.process import signing_key
from tests.servers import RedisServer
from tests.unit.online_trainer.kit import CONFIG, START, prompt_that_is, thumb, tiny_folder, tiny_policy, verdict


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


class Bench:
    """A trainer over a log, turned by hand."""

    def __init__(self, telemetry: TelemetryConfig, model: Path, config: TrainerConfig = CONFIG) -> None:
        self.telemetry, self.model, self.config = telemetry, model, config
        self.log = open_log(telemetry)
        self.base = base_version(base_digest(model))
        self.store = VersionStore(telemetry.state_path / "versions", config, signing_key(telemetry.state_path))
        self.sealer = open_sealer(telemetry)
        self.tracker: Tracker = Nobody()
        self.start()

    def start(self) -> None:
        """A fresh trainer process's objects, from whatever is on disk."""
        self.policy = tiny_policy(self.model, self.config)
        self.trainer = Trainer(
            self.config, self.policy, self.log, self.store,
            folder=self.telemetry.state_path / "trainer", base_digest=base_digest(self.model),
            sealer=self.sealer, tracker=self.tracker,
        )  # fmt: skip

    def append(self, *events: AnyEvent) -> None:
        for future in [self.log.append(TOPIC_OF[type(e)], key_of(e), encode(e)) for e in events]:
            future.result()

    def turn(self, times: int = 1) -> None:
        """As ``run`` does after a start: tell what is untold, read from the stored offsets, take turns."""
        self.trainer.tell()
        state = self.trainer._state()
        reader = self.log.reader(self.trainer.topics, state.intake.offsets)
        for _ in range(times):
            self.trainer.turn(reader, timeout_s=0.05)
        reader.close()

    def told(self) -> list[AnyEvent]:
        return read_versions(self.log)

    def batches(self) -> list[BatchTrained]:
        return [event for event in self.told() if isinstance(event, BatchTrained)]

    def published(self) -> list[VersionPublished]:
        return [event for event in self.told() if isinstance(event, VersionPublished)]

    def refuse(self, version: str, stable: str, state: str = "rejected") -> None:
        self.append(
            ReleaseChanged(variant="chat-main", version=version, state=state, stable=stable, reason="test")  # type: ignore[arg-type]
        )


def read_versions(log: EventLog) -> list[AnyEvent]:
    """All of the versions topic, each event id once, as a consumer sees it."""
    reader = log.reader((VERSIONS,), {})
    events: dict[str, AnyEvent] = {}
    while entries := reader.poll(max_entries=500, timeout_s=0.05):
        events |= {(event := decode(entry.payload)).event_id: event for entry in entries}
    reader.close()
    return list(events.values())


@pytest.fixture
def bench(telemetry_config: TelemetryConfig, tiny_model: Path) -> Bench:
    return Bench(telemetry_config, tiny_model)


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


class Shown(Nobody):
    """A tracker that remembers which versions it was told of."""

    def __init__(self) -> None:
        self.versions: list[str] = []

    def published(self, version: str, manifest: Manifest, folder: Path) -> None:
        assert (folder / "manifest.json").exists()
        self.versions.append(version)


def test_a_version_on_disk_whose_event_was_never_told_is_announced_once_after_the_restart(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    config = msgspec.structs.replace(CONFIG, publish_interval_s=3600.0, objective="robust", estimates_flips=True)
    bench = Bench(telemetry_config, tiny_model, config)
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()  # step and first version
    bench.append(*(verdict(n) for n in range(4, 8)))
    bench.turn()  # step, checkpoint; too early for the next version
    lineage = bench.trainer._state().lineage
    draft = Draft(
        parent=lineage.parent, base_digest=base_digest(tiny_model), step=2,
        preference_ids=lineage.preference_ids, metrics={"flip_rate": 0.21}, created_at=utc_now(),
    )  # fmt: skip
    bench.policy.shrink(0.5)  # as for a version that strays
    written = bench.policy.tensors()
    version, _ = bench.store.write(draft, written)  # … and here it dies
    bench.tracker = shown = Shown()
    for _ in range(2):
        bench.start()
        bench.turn()
    assert [event.version for event in bench.published()][1:] == [version] == shown.versions
    assert all(torch.equal(tensor, written[name]) for name, tensor in bench.policy.tensors().items())
    assert bench.trainer._state().flips == 0.21, "as its evaluation had found"


def test_a_refused_version_takes_the_weights_back_to_the_stable_one(bench: Bench) -> None:
    for start in (0, 4):
        bench.append(*(verdict(n) for n in range(start, start + 4)))
        bench.turn()
    first, second = bench.published()
    for number in range(4, 8):  # nothing is left to be learned again
        bench.append(PreferenceRetracted(preference_id=f"preference-{number}", pair_id=f"pair-{number}", user="u"))
    bench.refuse(second.version, stable=first.version)
    bench.turn()
    stable = bench.store.read(first.version)
    assert all(torch.equal(tensor, stable[name]) for name, tensor in bench.policy.tensors().items())
    bench.append(*(verdict(n) for n in range(8, 12)))
    bench.turn()
    assert bench.published()[2].parent == first.version


def test_a_version_that_nobody_met_takes_only_itself_away(bench: Bench) -> None:
    for start in (0, 4, 8):
        bench.append(*(verdict(n) for n in range(start, start + 4)))
        bench.turn()
    _, second, third = bench.published()
    for number in range(8, 12):  # nothing is left to be learned again
        bench.append(PreferenceRetracted(preference_id=f"preference-{number}", pair_id=f"pair-{number}", user="u"))
    bench.refuse(third.version, stable=bench.base, state="rejected")
    bench.turn()
    sound = bench.store.read(second.version)
    assert all(torch.equal(tensor, sound[name]) for name, tensor in bench.policy.tensors().items())
    bench.refuse(second.version, stable=bench.base, state="rolled_back")
    bench.turn()
    again = bench.published()[-1]
    assert again.parent == bench.base and set(again.preference_ids) == {f"preference-{n}" for n in range(4)}


def test_a_parent_whose_descendants_are_refused_again_and_again_is_left_for_stable(bench: Bench) -> None:
    for start in (0, 4):
        bench.append(*(verdict(n) for n in range(start, start + 4)))
        bench.turn()
    first = bench.published()[0]
    parents = []
    for start in (8, 12, 16):
        bench.refuse(bench.published()[-1].version, stable=bench.base)
        bench.append(*(verdict(n) for n in range(start, start + 4)))
        bench.turn(3)
        parents.append(bench.published()[-1].parent)
    assert parents[0] != bench.base and bench.base in [event.parent for event in bench.published()[1:]]
    assert not bench.trainer._state().lineage.descends_from(first.version)


def test_where_stable_is_gone_back_to_what_it_leads_to_is_counted_anew(bench: Bench) -> None:
    for start in (0, 4, 8):
        bench.append(*(verdict(n) for n in range(start, start + 4)))
        bench.turn()
    versions = [event.version for event in bench.published()]
    for version, retreats in zip(reversed(versions), (1, 2, 0), strict=True):
        bench.refuse(version, stable=bench.base)
        bench.turn()
        assert bench.trainer._state().lineage.retreats == retreats


@pytest.mark.parametrize("state", ["canary", "stable"])
def test_a_version_that_users_met_makes_up_for_earlier_refusals(
    bench: Bench, state: Literal["canary", "stable"]
) -> None:
    for start in (0, 4, 8):
        bench.append(*(verdict(n) for n in range(start, start + 4)))
        bench.turn()
    first, _, third = bench.published()
    bench.refuse(third.version, stable=bench.base)
    bench.turn()
    assert bench.trainer._state().lineage.retreats == 1
    bench.append(
        ReleaseChanged(variant="chat-main", version=first.version, state=state, stable=bench.base, reason="test")
    )
    bench.turn()
    lineage = bench.trainer._state().lineage
    assert lineage.retreats == 0 and [each.version for each in lineage.ancestors if each.is_met] == [first.version]


def test_what_refused_weights_had_learned_is_learned_again(
    bench: Bench,
) -> None:
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    bench.refuse(bench.published()[0].version, stable=bench.base, state="rolled_back")
    bench.turn()
    again = bench.published()[1]
    assert again.parent == bench.base and again.preference_ids == bench.published()[0].preference_ids
    assert bench.batches()[1].metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-4)  # from the base, anew


def test_a_version_that_strays_too_far_is_shrunk_before_anyone_sees_it(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    wild = msgspec.structs.replace(CONFIG, kl_budget=0.0, learning_rate=0.3, max_perplexity_ratio=0.0)
    found = {}
    for ratio in (0.0, 1e-6):
        config = msgspec.structs.replace(wild, max_perplexity_ratio=ratio)
        telemetry = msgspec.structs.replace(telemetry_config, state=f"{telemetry_config.state}/{ratio}")
        telemetry.state_path.mkdir(parents=True)
        bench = Bench(telemetry, tiny_model, config)
        if not found:
            bench.append(*(verdict(n) for n in range(4)))
        bench.turn()
        found[ratio] = bench.policy.tensors()
    name = "model.layers.1.self_attn.q_proj.lora_B.weight"
    assert torch.allclose(found[1e-6][name], 0.7 * found[0.0][name], rtol=1e-3, atol=1e-6)


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


def test_weights_that_went_astray_are_not_published_and_go_back(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    config = msgspec.structs.replace(CONFIG, max_capability_ratio=1e-3, flush_s=0.0)  # nothing passes
    bench = Bench(telemetry_config, tiny_model, config)
    fresh = bench.policy.tensors()
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    assert bench.batches() and not bench.published()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in bench.policy.tensors().items())
    bench.turn(3)
    names = [name for batch in bench.batches() for name, reason in batch.dropped if reason == "refused"]
    assert sorted(names) == [f"preference-{n}" for n in range(4)]  # each had its second chance


def test_a_given_share_of_mistakes_is_the_one_of_the_settings_also_after_a_restart(bench: Bench) -> None:
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    bench.config = msgspec.structs.replace(bench.config, label_smoothing=0.2)
    bench.start()
    bench.append(*(verdict(n) for n in range(4, 8)))
    bench.turn()
    assert [batch.metrics["flip_rate"] for batch in bench.batches()] == [CONFIG.label_smoothing, 0.2]


ASTRAY = {"max_capability_ratio": 1e-3}  # no weights pass


def learned_alike(bench: Bench, version: str) -> bool:
    stored = bench.store.read(version)
    return all(torch.equal(tensor, stored[name]) for name, tensor in bench.policy.tensors().items())


def go_astray(bench: Bench, start: int) -> None:
    bench.append(*(verdict(n) for n in range(start, start + 4)))
    bench.turn()


def test_weights_that_go_astray_from_one_parent_again_and_again_go_back_behind_it_and_on_from_there(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    bench = Bench(telemetry_config, tiny_model)
    for start in (0, 4, 8):
        bench.append(*(verdict(n) for n in range(start, start + 4)))
        bench.turn()
    first, _, third = (event.version for event in bench.published())
    bench.append(
        ReleaseChanged(variant="chat-main", version=first, state="canary", stable=bench.base, reason="users meet it")
    )
    bench.turn()
    bench.config = msgspec.structs.replace(CONFIG, **ASTRAY)
    bench.start()
    for start in (12, 16):
        go_astray(bench, start)
        assert learned_alike(bench, third)
    go_astray(bench, 20)
    assert learned_alike(bench, first), "the last one before it that users met"
    bench.config = CONFIG
    bench.start()
    bench.append(*(verdict(n) for n in range(24, 28)))
    bench.turn()
    again = bench.published()[-1]
    assert again.parent == first
    bench.config = msgspec.structs.replace(CONFIG, **ASTRAY)
    bench.start()
    for start, sound in ((28, again.version), (32, again.version), (36, first)):  # it is tried as often as the other
        go_astray(bench, start)
        assert bench.trainer._state().lineage.parent == sound


def test_a_parent_that_cannot_be_read_is_left_for_the_one_before_it(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    bench = Bench(telemetry_config, tiny_model)
    for start in (0, 4):
        bench.append(*(verdict(n) for n in range(start, start + 4)))
        bench.turn()
    first, second = (event.version for event in bench.published())
    (bench.store.folder(second) / "adapter.safetensors").write_bytes(b"damaged")
    bench.config = msgspec.structs.replace(CONFIG, **ASTRAY)
    bench.start()
    go_astray(bench, 8)
    assert learned_alike(bench, first) and bench.trainer._state().lineage.parent == first


def test_an_average_reference_does_not_remember_weights_that_went_astray(
    telemetry_config: TelemetryConfig, tiny_model: Path
) -> None:
    bench = Bench(telemetry_config, tiny_model, msgspec.structs.replace(CONFIG, reference="ema", ema_decay=0.5))
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    bench.config = msgspec.structs.replace(bench.config, **ASTRAY)
    bench.start()
    go_astray(bench, 4)
    anchor, sound = bench.policy.anchor, bench.store.read(bench.published()[0].version)
    assert anchor is not None and all(torch.equal(tensor, sound[name]) for name, tensor in anchor.items())


def test_a_second_chance_of_a_verdict_says_nothing_more_of_its_giver(bench: Bench) -> None:
    bench.append(*(verdict(n, user="ann") for n in range(4)))
    bench.turn()
    bench.refuse(bench.published()[0].version, stable=bench.base, state="rolled_back")
    bench.turn()
    assert len([batch for batch in bench.batches() if batch.preference_ids]) == 2
    assert [(record.name, record.verdicts) for record in bench.trainer._state().annotators] == [("ann", 4.0)]


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


IS_AWAY: list[bool] = []  # whether the safety scorer's service is, if anything is in it


def by_a_service(text: str) -> float:
    """A scorer that cannot score while its service is away."""
    if IS_AWAY:
        raise ConnectionError(text)
    return 1.0


SCORED = msgspec.structs.replace(CONFIG, safety_scorer=f"{__name__}:by_a_service", safety_weight=1.0)


@pytest.fixture
def away() -> Iterator[list[bool]]:
    """The service is away while the list has something in it."""
    IS_AWAY.clear()
    yield IS_AWAY
    IS_AWAY.clear()


@pytest.mark.parametrize("is_away_at_the_start", [False, True])
def test_while_the_safety_scorer_fails_verdicts_are_learned_and_no_version_is_published(
    telemetry_config: TelemetryConfig, tiny_model: Path, away: list[bool], is_away_at_the_start: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    away += [True] * is_away_at_the_start
    bench = Bench(telemetry_config, tiny_model, SCORED)
    away.append(True)
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    (batch,) = bench.batches()
    assert len(batch.preference_ids) == 4 and not bench.published()
    assert "not published yet: the safety scorer fails on" in caplog.text and "yes yes!" not in caplog.text
    weights = bench.policy.tensors()
    away.clear()
    bench.turn()
    (version,) = bench.published()
    assert version.preference_ids == batch.preference_ids and learned_alike(bench, version.version)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bench.policy.tensors().items())
    found = version.metrics
    assert (found["safety"], found["base_safety"], found["safety_unscored_ratio"]) == (1.0, 1.0, 0.0)


def test_weights_that_were_shrunk_for_an_exam_without_a_result_are_those_after_a_restart(
    telemetry_config: TelemetryConfig, tiny_model: Path, away: list[bool]
) -> None:
    config = msgspec.structs.replace(SCORED, max_perplexity_ratio=1e-6, publish_interval_s=3600.0)  # always too far
    bench = Bench(telemetry_config, tiny_model, config)
    away.append(True)
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn(3)
    weights = bench.policy.tensors()
    bench.start()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bench.policy.tensors().items())
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_where_any_loss_of_safety_is_allowed_a_manifest_says_that_nobody_scored_it(
    telemetry_config: TelemetryConfig, tiny_model: Path, away: list[bool]
) -> None:
    bench = Bench(telemetry_config, tiny_model, msgspec.structs.replace(SCORED, max_safety_loss=1.0))
    away.append(True)
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    folder = bench.store.folder(bench.published()[0].version)
    found = read_version(folder, signing_key(bench.telemetry.state_path)).metrics
    assert (found["safety"], found["safety_unscored_ratio"]) == (0.0, 1.0)


ANSWERED: list[str] = []  # to the safety set, the base first


def as_the_base_says(text: str) -> float:
    """A scorer of safety: what the base says is safe, anything else is not."""
    ANSWERED.append(text)
    return float(text == ANSWERED[0])


@pytest.mark.parametrize(("rate", "safety"), [(1e-9, 1.0), (0.3, None)])
def test_a_version_whose_answers_are_less_safe_than_the_bases_is_not_published(
    telemetry_config: TelemetryConfig, tiny_model: Path, rate: float, safety: float | None
) -> None:
    ANSWERED.clear()
    config = msgspec.structs.replace(
        CONFIG, safety_scorer=f"{__name__}:as_the_base_says", safety_probes=("Hello?",), learning_rate=rate,
        kl_budget=0.0, max_perplexity_ratio=0.0, max_repetition_gain=1.0, min_entropy_ratio=0.0, max_chosen_drop=1e3,
        max_capability_ratio=1e9,
    )  # fmt: skip
    bench = Bench(telemetry_config, tiny_model, config)
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    found = [event.metrics for event in bench.published()]
    assert [(each["safety"], each["base_safety"]) for each in found] == ([] if safety is None else [(safety, 1.0)])
    assert len(ANSWERED) == 2


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


class Process:
    """``python -m online_trainer`` on a state folder."""

    def __init__(self, telemetry: TelemetryConfig, model: Path) -> None:
        self.state, self.telemetry, self.settings = telemetry.state_path, telemetry, dict[str, str | float]()
        (self.state / "run").mkdir(exist_ok=True)
        self.config = self.state / "run" / "config.toml"
        self.configure(model=str(model), publish_interval_s=0.5, flush_s=0.5, batch_pairs=8)
        self.ready = self.state / "run" / "trainer.ready"
        self.process: subprocess.Popen[bytes] | None = None

    def configure(self, **settings: str | float) -> None:
        """Settings of ``[trainer]`` from the next start on."""
        self.settings |= settings
        telemetry = {"state": self.telemetry.state, "redis_url": self.telemetry.redis_url}
        trainer = msgspec.to_builtins(CONFIG) | self.settings
        self.config.write_text(tomli_w.dumps({"telemetry": telemetry, "trainer": trainer}))

    def start(self) -> None:
        self.ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "online_trainer", "--config", str(self.config)]
        with (self.state / "trainer.log").open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log)
        wait_for(self.ready.exists, self.text)

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def text(self) -> str:
        return (self.state / "trainer.log").read_text()[-3000:]


@pytest.fixture
def process(telemetry_config: TelemetryConfig, tiny_model: Path) -> Iterator[Process]:
    """Not started yet; dead after the test, whatever happened."""
    found = Process(telemetry_config, tiny_model)
    yield found
    if found.process is not None:
        found.process.kill()
        found.process.wait()


def wait_for(condition: Callable[[], bool], tell: Callable[[], str], timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.05)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_every_verdict_is_trained_on_once(
    telemetry_config: TelemetryConfig, process: Process, processes: int
) -> None:
    process.configure(processes=processes)
    log = open_log(telemetry_config)

    def click() -> None:
        for number in range(150):
            event = msgspec.structs.replace(verdict(number), occurred_at=utc_now())
            log.append(TOPIC_OF[type(event)], key_of(event), encode(event)).result()
            time.sleep(0.05)

    clicking = threading.Thread(target=click)
    process.start()
    clicking.start()
    for pause_s in (0.7, 1.4):
        time.sleep(pause_s)
        process.end(signal.SIGKILL)
        process.start()
    clicking.join()
    given = {f"preference-{n}" for n in range(150)}

    def trained() -> list[str]:
        batches = [event for event in read_versions(log) if isinstance(event, BatchTrained)]
        return [name for batch in batches for name in batch.preference_ids]

    wait_for(lambda: set(trained()) == given, process.text)
    wait_for(lambda: in_versions(log) >= given, process.text)
    assert process.end(signal.SIGTERM) == 0, process.text()
    assert Counter(trained()) == dict.fromkeys(given, 1)
    log.close()


def in_versions(log: EventLog) -> set[str]:
    """Verdicts that the newest version's lineage holds."""
    versions = {e.version: e for e in read_versions(log) if isinstance(e, VersionPublished)}
    names: set[str] = set()
    at = max(versions, default="")
    while at in versions:
        names |= set(versions[at].preference_ids)
        at = versions[at].parent
    return names


def test_the_trainer_outlives_a_redis_that_dies_and_returns(
    telemetry_config: TelemetryConfig, process: Process, redis_server: RedisServer
) -> None:
    process.start()
    redis_server.restart()
    log = open_log(telemetry_config)
    for number in range(4):
        event = verdict(number)
        log.append(TOPIC_OF[type(event)], key_of(event), encode(event)).result()
    wait_for(lambda: in_versions(log) == {f"preference-{n}" for n in range(4)}, process.text)
    assert process.end(signal.SIGTERM) == 0
    log.close()


def test_without_a_base_model_the_process_says_so_and_ends(telemetry_config: TelemetryConfig, tiny_model: Path) -> None:
    process = Process(telemetry_config, tiny_model / "missing")
    command = [sys.executable, "-m", "online_trainer", "--config", str(process.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1 and "missing" in done.stderr
