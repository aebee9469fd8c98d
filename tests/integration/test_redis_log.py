"""What only the embedded log meets: a frozen server, and one that would forget."""

from __future__ import annotations

import os
import signal
import time

import pytest

from telemetry.config import TelemetryConfig, open_log, redis_client
from telemetry.event_log import LogUnavailable
from tests.servers import RedisServer


def test_an_append_to_a_frozen_server_fails_within_twice_the_timeout(
    telemetry_config: TelemetryConfig, redis_server: RedisServer
) -> None:
    log = open_log(telemetry_config)
    log.append("things.v1", "k", b"before").result(timeout=5)
    os.kill(redis_server.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        futures = [log.append("things.v1", "k", b"during") for _ in range(5)]
        for future in futures:
            with pytest.raises(LogUnavailable, match="is the server up"):
                future.result(timeout=10)
        assert time.monotonic() - began < 3 * telemetry_config.append_timeout_s
    finally:
        os.kill(redis_server.pid, signal.SIGCONT)

    log.append("things.v1", "k", b"after").result(timeout=5)
    log.close()


def test_a_short_interruption_is_bridged_without_an_error(
    telemetry_config: TelemetryConfig, redis_server: RedisServer
) -> None:
    log = open_log(telemetry_config)
    log.append("things.v1", "k", b"before").result(timeout=5)

    with redis_client(telemetry_config) as client:
        client.client_kill_filter(_type="normal", skipme=True)  # every connection but this one

    log.append("things.v1", "k", b"after").result(timeout=5)
    log.close()


def test_a_server_that_may_forget_acknowledged_entries_is_reported(
    telemetry_config: TelemetryConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_client(telemetry_config) as client:
        client.config_set("appendfsync", "everysec")
        try:
            log = open_log(telemetry_config)
            log.append("things.v1", "k", b"x").result(timeout=5)
            log.close()
        finally:
            client.config_set("appendfsync", "always")

    assert [record.action for record in caplog.records if hasattr(record, "action")] == ["log_not_durable"]
