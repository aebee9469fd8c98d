"""The event log in both forms, for tests that shall hold on either; a tiny model, and a trainer over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from telemetry.config import TelemetryConfig, open_log
from telemetry.event_log import EventLog
from tests.trainer_bench import Bench
from tests.unit.online_trainer.kit import tiny_folder


@pytest.fixture(params=["redis", "kafka"])
def config(request: pytest.FixtureRequest) -> TelemetryConfig:
    name = "telemetry_config" if request.param == "redis" else "kafka_config"
    config: TelemetryConfig = request.getfixturevalue(name)
    return config


@pytest.fixture
def log(config: TelemetryConfig) -> Iterator[EventLog]:
    log = open_log(config)
    yield log
    log.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def bench(telemetry_config: TelemetryConfig, tiny_model: Path) -> Bench:
    return Bench(telemetry_config, tiny_model)
