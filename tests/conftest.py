"""Fixtures that tests of every package use: a real private Redis, a real Kafka broker, a telemetry configuration.

Servers live for the whole session; each test gets a Redis database and a Kafka topic prefix of its own.
A test that kills a server restarts it.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from deploy.kafka.broker import Broker, KafkaNotInstallable
from telemetry.config import TelemetryConfig
from tests.servers import RedisServer

_database_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    """Two habits of kafka-python 3.0.12 that we cannot mend: deprecated calls, and sockets whose connection or password
    was refused, which it leaves to the garbage collector."""
    for warning in (
        "ignore:(read|open)_text is deprecated:DeprecationWarning",
        r"ignore:unclosed <socket.socket fd=\d+, family=2, type=1, proto=6, laddr=\('0.0.0.0', \d+\)>:ResourceWarning",
        r"ignore:unclosed <ssl.SSLSocket fd=\d+:ResourceWarning",
    ):
        config.addinivalue_line("filterwarnings", warning)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A real Redis with appendfsync always: ``url``, ``pid``, ``kill()``, ``restart()``."""
    folder = Path(tempfile.mkdtemp(prefix="tiebreak-redis-"))  # short: a socket's path has at most 107 bytes
    server = RedisServer(folder)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(folder)


@pytest.fixture
def redis_url(redis_server: RedisServer) -> Iterator[str]:
    """The URL of an empty Redis database that no other test uses."""
    url = redis_server.database(next(_database_numbers))
    yield url
    with redis.Redis.from_url(url) as client:
        client.flushdb()


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A real Kafka broker: ``bootstrap``, ``pid``, ``kill()``, ``start()``. Skipped without Java, failed in CI."""
    broker = Broker(tmp_path_factory.mktemp("kafka"))
    try:
        broker.start()
    except KafkaNotInstallable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"the Kafka tier is missing: {error}")
        pytest.skip(f"the Kafka tier is missing: {error}")
    yield broker
    broker.kill()
    gc.collect()  # kafka-python's refused sockets go here, where their warnings are expected


@pytest.fixture
def telemetry_config(redis_url: str, tmp_path: Path) -> TelemetryConfig:
    """The embedded default over this test's own Redis database and state folder."""
    return TelemetryConfig(state=str(tmp_path), redis_url=redis_url)


@pytest.fixture
def kafka_config(telemetry_config: TelemetryConfig, kafka_broker: Broker) -> TelemetryConfig:
    """``telemetry_config`` with Kafka as the event log, under a topic prefix of its own."""
    return msgspec.structs.replace(
        telemetry_config,
        log="kafka",
        kafka_bootstrap=kafka_broker.bootstrap,
        kafka_topic_prefix=f"t{uuid.uuid4().hex[:8]}.",
    )
