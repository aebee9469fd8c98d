"""The event log in both forms, for tests that shall hold on either."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from telemetry.config import TelemetryConfig, open_log
from telemetry.event_log import EventLog


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
