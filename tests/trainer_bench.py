"""A trainer over a log, turned by hand."""

from __future__ import annotations

from pathlib import Path

import torch

from online_trainer.config import TrainerConfig
from online_trainer.publish import VersionStore
from online_trainer.tracking import Nobody, Tracker
from online_trainer.trainer import Trainer
from telemetry.config import TelemetryConfig, open_log, open_sealer
from telemetry.event_log import EventLog
from telemetry.events import (
    TOPIC_OF,
    VERSIONS,
    AnyEvent,
    BatchTrained,
    ReleaseChanged,
    VersionPublished,
    decode,
    encode,
    key_of,
)
from telemetry.manifest import base_digest, base_version
from telemetry.process import signing_key
from tests.unit.online_trainer.kit import CONFIG, tiny_policy


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


def learned_alike(bench: Bench, version: str) -> bool:
    """Whether the trainer's weights are those of ``version``."""
    stored = bench.store.read(version)
    return all(torch.equal(tensor, stored[name]) for name, tensor in bench.policy.tensors().items())
