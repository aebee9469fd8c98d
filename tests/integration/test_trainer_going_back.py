"""The trainer on a real Redis log: where it goes on from when versions are refused, or weights go astray."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import pytest
import torch

from online_trainer.publish import Draft
from online_trainer.tracking import Nobody
from telemetry.config import TelemetryConfig
from telemetry.events import (
    PreferenceRetracted,
    ReleaseChanged,
    utc_now,
)
from telemetry.manifest import Manifest, base_digest
from tests.trainer_bench import Bench, learned_alike
from tests.unit.online_trainer.kit import CONFIG, verdict


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


ASTRAY = {"max_capability_ratio": 1e-3}  # no weights pass


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
