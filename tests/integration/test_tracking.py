"""Steps and versions in a real MLflow (SQLite) and in Weights & Biases without a server; neither can stop a trainer."""

from __future__ import annotations

import importlib.util
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient
from msgspec.structs import replace

from online_trainer.config import TrainerConfig
from online_trainer.errors import TrackerMissing
from online_trainer.tracking import EXPERIMENT, Behind, MlflowTracker, Nobody, WandbTracker, open_tracker
from telemetry.manifest import Manifest

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # mlflow's own
CONFIG = TrainerConfig(variant="chat-main", model="somewhere")
VERSION = "v000001-0123abcd"
MANIFEST = Manifest(
    variant="chat-main", sequence=1, parent="v000000-00000000", base="tiny", base_digest="ab" * 32,
    created_at=datetime(2026, 1, 1, tzinfo=UTC), step=2, rank=4, alpha=8.0, target_modules=("q_proj",), files={},
    preference_ids=("one", "two"), training={"dataset": "ds-0123456789ab"}, metrics={"heldout_win_rate": 0.75},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A version's folder."""
    found = tmp_path / VERSION
    found.mkdir()
    (found / "manifest.json").write_text("{}")
    return found


def test_mlflow_has_the_run_its_steps_and_its_versions_once(tmp_path: Path, folder: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for step in (1, 2):  # the second is a trainer that was started again
        tracker = MlflowTracker(uri, CONFIG, tmp_path)
        tracker.stepped(step, {"rewards/margins": 0.25 * step, "loss": 0.5})
        tracker.published(VERSION, MANIFEST, folder)
        tracker.close()
    client = MlflowClient(uri, registry_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    margins = client.get_metric_history(run.info.run_id, "rewards/margins")
    assert [(each.step, each.value) for each in margins] == [(1, 0.25), (2, 0.5)]
    assert run.data.metrics["version/heldout_win_rate"] == 0.75
    assert run.data.params["beta"] == "0.1"
    assert not {"tracking_uri", "model"} & set(run.data.params), "a URI may hold a password"
    (registered,) = client.search_model_versions("name = 'tiebreak-chat-main'")
    assert registered.tags["version"] == VERSION and registered.tags["verdicts"] == "2"
    assert registered.tags["dataset"] == "ds-0123456789ab"
    assert registered.source.endswith(VERSION)
    assert [each.path for each in client.list_artifacts(run.info.run_id, VERSION)] == [f"{VERSION}/manifest.json"]


def test_wandb_keeps_a_run_on_disk(tmp_path: Path, folder: Path) -> None:
    tracker = WandbTracker("", CONFIG, tmp_path)
    tracker.stepped(1, {"rewards/margins": 0.25})
    tracker.published(VERSION, MANIFEST, folder)
    tracker.close()
    (found,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    written = found.read_bytes()
    assert b"rewards/margins" in written and b"version/heldout_win_rate" in written and VERSION.encode() in written


class Fragile:
    """Fails at its first step, and is slow."""

    def __init__(self, shown: list[int]) -> None:
        self._shown = shown

    def stepped(self, step: int, values: object) -> None:
        time.sleep(0.1)
        if step == 1:
            raise ConnectionError("the server is away")
        self._shown.append(step)

    def published(self, *_: object) -> None:
        raise AssertionError

    def close(self) -> None:
        self._shown.append(-1)


def test_a_tracker_that_fails_or_is_slow_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    shown: list[int] = []
    behind = Behind(lambda: Fragile(shown))
    began = time.monotonic()
    for step in (1, 2, 3):
        behind.stepped(step, {})
    assert time.monotonic() - began < 0.1
    behind.close()
    assert shown == [2, 3, -1]
    assert "the server is away" in caplog.text


def test_a_server_that_is_away_at_the_start_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = open_tracker(replace(CONFIG, tracking="mlflow", tracking_uri="http://127.0.0.1:9"), tmp_path)
    tracker.stepped(1, {"loss": 1.0})
    tracker.close()
    assert "not tracked" in caplog.text


def test_what_is_not_installed_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrackerMissing, match=r"needs wandb: install tiebreak\[tracking\]"):
        open_tracker(replace(CONFIG, tracking="wandb"), tmp_path)
    assert isinstance(open_tracker(CONFIG, tmp_path), Nobody)
