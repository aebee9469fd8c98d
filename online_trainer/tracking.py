"""What a trainer shows to MLflow or Weights & Biases: its settings, each step's numbers, each version.

Neither is needed to train, and neither can hold training up: what is to be shown waits in a queue for a thread, and
what a tracker cannot take is left out with a word in the log. Packages of the extra ``tracking``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from online_trainer.config import TrainerConfig
from online_trainer.errors import TrackerMissing
from telemetry.manifest import Manifest

log = logging.getLogger(__name__)
WAITING: Final = 1_000  # things to show, at most; more are left out
CLOSE_WAIT_S: Final = 20.0
EXPERIMENT: Final = "tiebreak"
TRAINER_TAG: Final = "tiebreak.trainer"
KNOW_A_PLACE: Final = ("http://", "https://", "databricks", "file:")
MOST_PARAM: Final = 500  # characters that every MLflow server takes
PACKAGES: Final = {"mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}


class Tracker(Protocol):
    """Where a trainer's numbers go."""

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        """A step was taken."""

    def published(self, version: str, manifest: Manifest, folder: Path) -> None:
        """A version lies in ``folder``."""

    def close(self) -> None:
        """Nothing more comes."""


class Nobody:
    """Tracks nothing."""

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        """Not shown."""

    def published(self, version: str, manifest: Manifest, folder: Path) -> None:
        """Not shown."""

    def close(self) -> None:
        """Nothing is held."""


class MlflowTracker:
    """One MLflow run a trainer, found again after a restart; its versions are versions of a registered model."""

    def __init__(self, uri: str, config: TrainerConfig, state: Path) -> None:
        from mlflow import MlflowClient  # seconds to load
        from mlflow.entities import Param

        self._client, self._model = MlflowClient(uri, registry_uri=uri), f"{EXPERIMENT}-{config.variant}"
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found:
            experiment = found.experiment_id
        else:
            experiment = self._client.create_experiment(EXPERIMENT, artifacts_of(uri, state))
        name = trainer_id(config, state)
        known = self._client.search_runs([experiment], f"tags.`{TRAINER_TAG}` = '{name}'", max_results=1)
        if known:
            self._run: Any = known[0].info.run_id
        else:
            tags = {TRAINER_TAG: name}
            self._run = self._client.create_run(experiment, tags=tags, run_name=config.variant).info.run_id
            params = [Param(key, str(value)[:MOST_PARAM]) for key, value in settings_of(config).items()]
            self._client.log_batch(self._run, params=params)
        self._register()

    def _register(self) -> None:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # it is there
            self._client.create_registered_model(self._model)

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        at_ms = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, value, at_ms, step) for name, value in values.items()])

    def published(self, version: str, manifest: Manifest, folder: Path) -> None:
        if self._client.search_model_versions(f"name = '{self._model}' and tags.version = '{version}'"):
            return  # before a restart
        self.stepped(manifest.step, {f"version/{name}": value for name, value in manifest.metrics.items()})
        self._client.log_artifacts(self._run, str(folder), version)
        tags = {"version": version, "parent": manifest.parent, "verdicts": str(len(manifest.preference_ids))}
        if dataset := manifest.training.get("dataset"):
            tags["dataset"] = str(dataset)
        source = f"{self._client.get_run(self._run).info.artifact_uri}/{version}"
        self._client.create_model_version(self._model, source, self._run, tags=tags)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WandbTracker:
    """One run of Weights & Biases a trainer, which a restart goes on with; without a server's URL it stays on disk."""

    def __init__(self, uri: str, config: TrainerConfig, state: Path) -> None:
        import wandb

        self._wandb = wandb
        settings = wandb.Settings(silent=True, console="off")
        if uri:
            settings.base_url = uri
        self._run: Any = wandb.init(
            project=EXPERIMENT, name=config.variant, id=trainer_id(config, state), resume="allow", dir=str(state),
            mode="online" if uri else "offline", config=settings_of(config), settings=settings,
        )  # fmt: skip

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def published(self, version: str, manifest: Manifest, folder: Path) -> None:
        found = {"version": version, "parent": manifest.parent, "verdicts": len(manifest.preference_ids)}
        artifact = self._wandb.Artifact(manifest.variant, "model", metadata=found | dict(manifest.training))
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact, aliases=[version])
        self._run.summary.update({f"version/{name}": value for name, value in manifest.metrics.items()})

    def close(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # waits for its process, which may hold rows that finish() left to it


class Behind:
    """A tracker in a thread of its own, which neither waits for it nor falls with it."""

    def __init__(self, make: Callable[[], Tracker], waiting: int = WAITING) -> None:
        """``make`` may take its time, or fail; so many things wait for it at most."""
        self._queue: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(waiting)
        self._make = make
        self._thread = threading.Thread(target=self._show, name="tracking", daemon=True)
        self._thread.start()

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        kept = dict(values)
        self._put(lambda tracker: tracker.stepped(step, kept))

    def published(self, version: str, manifest: Manifest, folder: Path) -> None:
        self._put(lambda tracker: tracker.published(version, manifest, folder))

    def close(self) -> None:
        """Show what waits, for some seconds at most; what still waits then is left out."""
        until = time.monotonic() + CLOSE_WAIT_S
        with suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_WAIT_S)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            log.warning("not tracked to the end: the tracker is too slow", extra={"action": "not_tracked"})

    def _put(self, thing: Callable[[Tracker], None]) -> None:
        try:
            self._queue.put_nowait(thing)
        except queue.Full:
            log.warning("not tracked: the tracker is too slow", extra={"action": "not_tracked"})

    def _show(self) -> None:
        tracker: Tracker | None = None
        while (thing := self._queue.get()) is not None:
            try:
                tracker = tracker or self._make()
                thing(tracker)
            except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on
                log.warning("not tracked: %s", error, extra={"action": "not_tracked"})
        if tracker:
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001 - as above
                log.warning("tracker not closed: %s", error, extra={"action": "not_tracked"})


def open_tracker(config: TrainerConfig, state: Path, packages: Mapping[str, tuple[str, ...]] = PACKAGES) -> Tracker:
    """The configured one. Raises TrackerMissing where its ``packages`` are not installed."""
    if not config.tracking:
        return Nobody()
    if missing := [name for name in packages[config.tracking] if importlib.util.find_spec(name) is None]:
        raise TrackerMissing(config.tracking, missing)
    uri = config.tracking_uri
    if config.tracking == "mlflow":
        uri = uri or f"sqlite:///{state / 'mlflow.db'}"
        return Behind(lambda: MlflowTracker(uri, config, state))
    return Behind(lambda: WandbTracker(uri, config, state))


def artifacts_of(uri: str, state: Path) -> str | None:
    """Where MLflow keeps files: in the state folder, unless a server or a file store at ``uri`` knows; then None.

    A database knows no place, and MLflow's own choice then is the working directory.
    """
    return None if uri.startswith(KNOW_A_PLACE) else (state.resolve() / "mlflow").as_uri()


def settings_of(config: TrainerConfig) -> dict[str, Any]:
    """What a run shows of ``config``: not where this machine keeps things, nor a URI that may hold a password."""
    shown: dict[str, Any] = msgspec.to_builtins(config)
    return {name: value for name, value in shown.items() if name not in ("tracking_uri", "model")}


def trainer_id(config: TrainerConfig, state: Path) -> str:
    """The same for a trainer that is started again with the same settings, and no other's."""
    whose = f"{state.resolve()}/{config.variant}/{config.model}/{config.learning_digest}"
    return hashlib.sha256(whose.encode()).hexdigest()[:16]
