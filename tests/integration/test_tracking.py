"""Steps and versions in a real MLflow (SQLite) and in Weights & Biases without a server; neither can stop a trainer."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient
from msgspec.structs import replace

from online_trainer.config import TrainerConfig
from online_trainer.errors import TrackerMissing
from online_trainer.tracking import (
    EXPERIMENT,
    Behind,
    MlflowTracker,
    Nobody,
    WandbTracker,
    artifacts_of,
    open_tracker,
    settings_of,
)
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
    """Fails at its first step, and takes none before it may."""

    def __init__(self) -> None:
        self.shown: list[int] = []
        self.is_asked, self.may_go_on = threading.Event(), threading.Event()

    def stepped(self, step: int, values: object) -> None:
        self.is_asked.set()
        assert self.may_go_on.wait(60)
        if step == 1:
            raise ConnectionError("the server is away")
        self.shown.append(step)

    def published(self, *_: object) -> None:
        raise AssertionError

    def close(self) -> None:
        self.shown.append(-1)


def test_a_tracker_that_fails_or_is_slow_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    fragile = Fragile()
    behind = Behind(lambda: fragile)
    for step in (1, 2, 3):
        behind.stepped(step, {})
    assert not fragile.shown, "nobody has waited for it"
    fragile.may_go_on.set()
    behind.close()
    assert fragile.shown == [2, 3, -1]
    assert "the server is away" in caplog.text


def test_a_tracker_is_closed_also_where_so_much_waits_that_more_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    fragile = Fragile()
    behind = Behind(lambda: fragile, waiting=1)
    behind.stepped(2, {})
    assert fragile.is_asked.wait(60)
    behind.stepped(3, {})
    behind.stepped(4, {})
    assert "the tracker is too slow" in caplog.text
    closing = threading.Thread(target=behind.close)
    closing.start()
    fragile.may_go_on.set()
    closing.join(60)
    assert fragile.shown == [2, 3, -1]


@pytest.mark.parametrize(
    ("uri", "is_here"),
    [
        ("sqlite:////tmp/mlflow.db", True),
        ("postgresql://ann:secret@db/mlflow", True),
        ("mysql+pymysql://db/mlflow", True),
        ("https://mlflow.example.org", False),
        ("databricks://profile", False),
        ("file:///srv/mlruns", False),
    ],
)
def test_files_of_a_run_whose_numbers_are_in_a_database_lie_in_the_state_folder(
    uri: str, is_here: bool, tmp_path: Path
) -> None:
    assert artifacts_of(uri, tmp_path) == ((tmp_path / "mlflow").as_uri() if is_here else None)


def test_a_trainer_with_other_settings_has_a_run_of_its_own(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for beta in (0.1, 0.3, 0.1):
        MlflowTracker(uri, replace(CONFIG, beta=beta), tmp_path).close()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["beta"] for run in runs) == ["0.1", "0.3"]
    assert len(runs[0].data.params) == len(settings_of(CONFIG))


def test_a_server_that_is_away_at_the_start_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = open_tracker(replace(CONFIG, tracking="mlflow", tracking_uri="http://127.0.0.1:9"), tmp_path)
    tracker.stepped(1, {"loss": 1.0})
    tracker.close()
    assert "not tracked" in caplog.text


def test_what_is_not_installed_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrackerMissing, match='needs no_such_package: install them with the extra "tracking"'):
        open_tracker(replace(CONFIG, tracking="wandb"), tmp_path, {"wandb": ("json", "no_such_package")})
    assert isinstance(open_tracker(CONFIG, tmp_path), Nobody)
