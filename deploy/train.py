"""``tiebreak train``: the trainer's own loop over a data set, to its end, and one version made of it.

It begins with the base, in a folder of its own: what runs online goes on as it is. The version is published and told
like any other, so that the release gate, shadow and canary decide about it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from deploy import audit
from online_trainer.config import TrainerConfig
from online_trainer.parallel import start
from online_trainer.policy import load_policy
from online_trainer.publish import VersionStore
from online_trainer.tracking import open_tracker
from online_trainer.trainer import Trainer
from telemetry.config import TelemetryConfig, open_log, open_sealer
from telemetry.datasets import Datasets
from telemetry.event_log import Entry, EventLog, Offsets, Position
from telemetry.events import PREFERENCES
from telemetry.manifest import base_digest
from telemetry.process import signing_key

FOLDER: Final = "batch"  # under the trainer's state


class DatasetLog:
    """A data set as a log that ends: read from its front, while what is told goes into the deployment's log."""

    def __init__(self, verdicts: Sequence[bytes], told: EventLog) -> None:
        """``verdicts``: encoded events, in the order in which they shall be learned."""
        self._verdicts, self._told = verdicts, told

    def append(self, topic: str, key: str, payload: bytes) -> Future[Position]:
        return self._told.append(topic, key, payload)

    def append_all(self, entries: Iterable[tuple[str, str, bytes]]) -> list[Future[Position]]:
        return self._told.append_all(entries)

    def reader(self, topics: Sequence[str], start: Offsets) -> DatasetReader:
        return DatasetReader(self._verdicts, start.get(PREFERENCES, {}).get(0, 0))

    def close(self) -> None:
        self._told.close()


class DatasetReader:
    """``Reader`` of a DatasetLog."""

    def __init__(self, verdicts: Sequence[bytes], start: int) -> None:
        self._verdicts, self._next = verdicts, start

    def poll(self, *, max_entries: int, timeout_s: float) -> list[Entry]:
        first, self._next = self._next, min(self._next + max_entries, len(self._verdicts))
        return [Entry(Position(PREFERENCES, 0, at), "", self._verdicts[at]) for at in range(first, self._next)]

    def lag(self) -> int:
        return len(self._verdicts) - self._next

    def close(self) -> None:
        """Nothing is held."""


def train(telemetry: TelemetryConfig, config: TrainerConfig, name: str, *, passes: int) -> int:
    """Learn the data set called ``name``; print the version. 1 where there is none to publish.

    Stopped and started again, it goes on where it was. Raises DatasetUnknown, DatasetChanged or LogUnavailable.
    """
    datasets = Datasets(telemetry.store_root)
    dataset = datasets.named(name)
    audit.record(telemetry, "trained_on", dataset.id, verdicts=str(dataset.verdicts))
    state, model = telemetry.state_path, Path(config.model)
    config = replace(config, flush_s=0.0, rehearse_s=0.0, max_passes=passes, policy="", replay_window=dataset.verdicts)
    folder = state / "trainer" / config.variant / FOLDER / dataset.id
    tracker, log = open_tracker(config, folder), DatasetLog(datasets.payloads(dataset), open_log(telemetry))
    helpers = start(config)
    try:
        trainer = Trainer(
            config,
            load_policy(config),
            log,
            VersionStore(state / "versions", config, signing_key(state), dataset=dataset.id),
            folder=folder,
            base_digest=base_digest(model),
            sealer=open_sealer(telemetry),
            tracker=tracker,
            helpers=helpers,
        )
        version = trainer.finish()
    finally:
        helpers.close()
        tracker.close()
        log.close()
    if not version:
        print(f"tiebreak: nothing of {dataset.id} became a version; the lines above say why", file=sys.stderr)
        return 1
    print(version)
    return 0
