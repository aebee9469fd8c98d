"""The event log under test: the embedded one and Kafka, each with a way to kill, restart and wipe its server.

And the OpenAI SDK for JavaScript, which judges the router as its Python sibling does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from deploy.kafka.broker import Broker
from telemetry.config import TelemetryConfig, open_log, redis_client
from telemetry.event_log import EventLog, Offsets, Reader
from tests.javascript import NodeNotInstallable, sdk_folder
from tests.servers import RedisServer


class LogServer:
    """One kind of event log and its server."""

    def __init__(
        self,
        config: TelemetryConfig,
        *,
        kill: Callable[[], None],
        start: Callable[[], None],
        remake: Callable[[str], None],
    ) -> None:
        self.config = config
        self.kill = kill  # kill -9
        self.start = start
        self.remake = remake  # delete one topic and make it anew, empty
        self._opened: list[EventLog | Reader] = []

    def open(self) -> EventLog:
        """A fresh client, as another process would make it."""
        log = open_log(self.config)
        self._opened.append(log)
        return log

    def reader(self, topics: list[str], start: Offsets) -> Reader:
        """A reader, as another process would make it."""
        reader = open_log(self.config).reader(topics, start)
        self._opened.append(reader)
        return reader

    def close(self) -> None:
        for opened in self._opened:
            opened.close()


@pytest.fixture(scope="session")
def javascript_sdk() -> Path:
    """The folder of the official OpenAI SDK for JavaScript. Skipped without Node.js, failed in CI."""
    try:
        return sdk_folder()
    except NodeNotInstallable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"the JavaScript SDK is missing: {error}")
        pytest.skip(f"the JavaScript SDK is missing: {error}")


@pytest.fixture(params=["redis", "kafka"])
def log_server(request: pytest.FixtureRequest) -> Iterator[LogServer]:
    make: Callable[[pytest.FixtureRequest], LogServer] = {"redis": _redis, "kafka": _kafka}[request.param]
    server = make(request)
    yield server
    server.close()


def _redis(request: pytest.FixtureRequest) -> LogServer:
    redis_server: RedisServer = request.getfixturevalue("redis_server")
    config: TelemetryConfig = request.getfixturevalue("telemetry_config")

    def remake(topic: str) -> None:
        with redis_client(config) as client:
            client.delete(topic)

    return LogServer(config, kill=redis_server.kill, start=redis_server.start, remake=remake)


def _kafka(request: pytest.FixtureRequest) -> LogServer:
    from kafka import KafkaAdminClient  # type: ignore[import-untyped]

    broker: Broker = request.getfixturevalue("kafka_broker")
    config: TelemetryConfig = request.getfixturevalue("kafka_config")
    config = msgspec.structs.replace(config, append_timeout_s=3.0)

    def remake(topic: str) -> None:
        name = config.kafka_topic_prefix + topic
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        admin.delete_topics([name])
        admin.create_topics({name: {"num_partitions": 4, "replication_factor": 1}}, wait_for_metadata=True)
        admin.close()

    return LogServer(config, kill=broker.kill, start=broker.start, remake=remake)
