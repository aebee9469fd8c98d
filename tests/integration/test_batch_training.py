"""A data set is learned to its end, and one version of it is published like any other."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from deploy import train as batch
from online_trainer.trainer import Trainer
from telemetry.config import TelemetryConfig, open_log, open_sealer
from telemetry.datasets import Datasets, DatasetUnknown, Filter
from telemetry.event_log import Entry, Position
from telemetry.events import (
    PREFERENCES,
    VERSIONS,
    AnyEvent,
    BatchTrained,
    PreferenceRecorded,
    VersionPublished,
    decode,
    encode,
)
from telemetry.manifest import read_version
from telemetry.process import signing_key
from telemetry.store import Recorded, Store
from tests.unit.online_trainer.kit import CONFIG, tiny_folder, verdict

ANN = "0123456789abcdef"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def stored(telemetry: TelemetryConfig, count: int) -> str:
    """The id of a data set of ``count`` verdicts with sealed texts."""
    sealer, store = open_sealer(telemetry), Store(telemetry.store_root)
    events: list[PreferenceRecorded] = []
    for number in range(count):
        event = verdict(number, user=ANN)
        events.append(sealer.seal(event, key_id=sealer.prepare(event.user)))
    entries = [Entry(Position(PREFERENCES, 0, n), event.pair_id, encode(event)) for n, event in enumerate(events)]
    rows = [Recorded(entry, event) for entry, event in zip(entries, events, strict=True)]
    store.append(rows, {PREFERENCES: {0: count}})
    return Datasets(telemetry.store_root).create(Filter(), by="test").id


def told(telemetry: TelemetryConfig) -> list[AnyEvent]:
    log = open_log(telemetry)
    reader = log.reader((VERSIONS,), {})
    events = {
        event.event_id: event for e in reader.poll(max_entries=500, timeout_s=0.2) for event in [decode(e.payload)]
    }
    reader.close()
    log.close()
    return list(events.values())


def test_a_data_set_becomes_one_version_that_names_it(
    telemetry_config: TelemetryConfig, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = msgspec.structs.replace(CONFIG, model=str(model), max_pairs_per_user=0)
    name = stored(telemetry_config, 10)
    assert batch.train(telemetry_config, config, name, passes=2) == 0
    version = capsys.readouterr().out.strip()
    state = telemetry_config.state_path
    manifest = read_version(state / "versions" / config.variant / version, signing_key(state))
    assert manifest.training["dataset"] == name
    assert sorted(manifest.preference_ids) == sorted(f"preference-{n}" for n in range(10))
    assert manifest.metrics["replay_win_rate"] == 1.0
    events = told(telemetry_config)
    published = [event for event in events if isinstance(event, VersionPublished)]
    assert [(event.version, event.dataset) for event in published] == [(version, name)]
    steps = [event for event in events if isinstance(event, BatchTrained)]
    assert sum(len(step.preference_ids) for step in steps) == 10
    assert sum(len(step.preference_ids) + len(step.replayed_ids) for step in steps) == 20  # two passes
    assert b'"yes yes!"' not in b"".join(path.read_bytes() for path in state.rglob("state.json"))
    assert batch.train(telemetry_config, config, name, passes=2) == 0  # it is done: the same version
    assert capsys.readouterr().out.strip() == version


def test_stopped_in_the_middle_it_goes_on_to_the_same_weights(
    telemetry_config: TelemetryConfig, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = msgspec.structs.replace(CONFIG, model=str(model), max_pairs_per_user=0)
    name = stored(telemetry_config, 12)
    commit, commits = Trainer._commit, [0]

    def dies(self: Trainer, events: list[AnyEvent]) -> None:
        commit(self, events)
        commits[0] += 1
        if commits[0] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_commit", dies)
        batch.train(telemetry_config, config, name, passes=2)
    assert batch.train(telemetry_config, config, name, passes=2) == 0
    whole = msgspec.structs.replace(telemetry_config, state=str(tmp_path / "whole"))
    whole.state_path.mkdir()
    assert stored(whole, 12) != ""
    assert batch.train(whole, config, Datasets(whole.store_root).all()[0].id, passes=2) == 0
    digests = [
        read_version(
            next((each.state_path / "versions" / config.variant).iterdir()), signing_key(each.state_path)
        ).files
        for each in (telemetry_config, whole)
    ]
    assert digests[0] == digests[1]


def test_other_settings_make_another_version_and_the_same_ones_at_another_pace_do_not(
    telemetry_config: TelemetryConfig, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = msgspec.structs.replace(CONFIG, model=str(model), max_pairs_per_user=0)
    name = stored(telemetry_config, 4)
    versions = []
    for changes in ({}, {"micro_batch_tokens": 512, "keep_checkpoints": 1}, {"beta": 0.3}, {}):
        assert batch.train(telemetry_config, msgspec.structs.replace(config, **changes), name, passes=1) == 0  # type: ignore[arg-type]
        versions.append(capsys.readouterr().out.strip())
    first, faster, other, again = versions
    assert first == faster == again != other
    state = telemetry_config.state_path
    manifest = read_version(state / "versions" / config.variant / other, signing_key(state))
    assert manifest.training["beta"] == 0.3 and manifest.parent.startswith("v000000-"), "from the base, anew"


def nobody_knows(text: str) -> float:
    """A safety scorer that has no model."""
    raise FileNotFoundError(text)


def test_a_data_set_ends_without_a_version_where_nobody_can_say_that_it_is_safe(
    telemetry_config: TelemetryConfig, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = msgspec.structs.replace(CONFIG, model=str(model), safety_scorer=f"{__name__}:nobody_knows")
    name = stored(telemetry_config, 4)
    assert batch.train(telemetry_config, config, name, passes=1) == 1
    assert f"nothing of {name} became a version" in capsys.readouterr().err


def test_an_unknown_data_set_is_named(telemetry_config: TelemetryConfig, model: Path) -> None:
    with pytest.raises(DatasetUnknown, match="ds-nowhere"):
        batch.train(telemetry_config, msgspec.structs.replace(CONFIG, model=str(model)), "ds-nowhere", passes=1)
