"""Configuration, logs, receipts and stream ids: the parts that need no server."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from telemetry.config import TelemetryConfig
from telemetry.configuration import InvalidConfiguration, convert_table
from telemetry.logs import JsonFormatter
from telemetry.receipts import Stage, timeline
from telemetry.redis_log import offset_of, redis_id_of


def test_the_embedded_default_keeps_everything_under_the_state_folder() -> None:
    config = TelemetryConfig(state="/srv/tiebreak")

    assert config.redis_address == "unix:///srv/tiebreak/run/redis.sock?db=0"
    assert config.store_root == "/srv/tiebreak/store"
    assert TelemetryConfig(state="~/x").state_path == Path.home() / "x"


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(InvalidConfiguration, match="kafka_bootsrap"):
        convert_table({"kafka_bootsrap": "x"}, "telemetry", TelemetryConfig, {})


def test_the_environment_wins_over_the_file() -> None:
    environ = {"TIEBREAK_TELEMETRY_KAFKA_PARTITIONS": "12"}

    assert convert_table({"kafka_partitions": 2}, "telemetry", TelemetryConfig, environ).kafka_partitions == 12


@pytest.mark.parametrize("redis_id", [b"0-0", b"0-1", b"1700000000000-0", b"1700000000000-1048575"])
def test_stream_ids_and_offsets_are_the_same_thing(redis_id: bytes) -> None:
    assert redis_id_of(offset_of(redis_id)).encode() == redis_id


def test_offsets_grow_as_stream_ids_do() -> None:
    ids = [b"1-0", b"1-1", b"1-1048575", b"2-0", b"1700000000000-3"]
    offsets = [offset_of(redis_id) for redis_id in ids]

    assert offsets == sorted(set(offsets))
    assert offsets[-1] < 2**63


def test_a_stream_id_that_would_run_into_the_next_millisecond_is_refused() -> None:
    with pytest.raises(OverflowError, match="in one millisecond"):
        offset_of(b"1-1048576")


def test_a_timeline_lists_the_stages_by_time() -> None:
    fields = {
        b"version": b"v000003-cccccccc",
        b"live_at": b"2026-01-01T00:01:00+00:00",
        b"trained_at": b"2026-01-01T00:00:20+00:00",
        b"batch": b"chat-main/000007",
        b"stored_at": b"2026-01-01T00:00:00.500000+00:00",
        b"accepted_at": b"2026-01-01T00:00:00+00:00",
        b"durable": b"outbox",
        b"pair_id": b"p",
    }

    assert timeline(fields) == [
        Stage("accepted", "2026-01-01T00:00:00+00:00", durable="outbox"),
        Stage("stored", "2026-01-01T00:00:00.500000+00:00"),
        Stage("trained", "2026-01-01T00:00:20+00:00", batch="chat-main/000007"),
        Stage("live", "2026-01-01T00:01:00+00:00", version="v000003-cccccccc"),
    ]


def test_a_timeline_tells_why_a_verdict_was_dropped_and_that_it_was_taken_back() -> None:
    fields = {
        "accepted_at": "2026-01-01T00:00:00+00:00",
        "retracted_at": "2026-01-01T00:00:05+00:00",
        "dropped_at": "2026-01-01T00:00:09+00:00",
        "reason": "retracted",
    }

    assert [(stage.stage, stage.reason) for stage in timeline(fields)] == [
        ("accepted", ""),
        ("retracted", ""),
        ("dropped", "retracted"),
    ]
    assert timeline({}) == []


def test_a_log_line_is_json_with_its_action_and_ids() -> None:
    record = logging.makeLogRecord(
        {"name": "router", "levelno": logging.INFO, "levelname": "INFO", "msg": "stored %d", "args": (3,)}
        | {"action": "batch_stored", "version": "v1", "path": Path("/x")}
    )

    line = json.loads(JsonFormatter("recorder").format(record))

    assert line["action"] == "batch_stored"
    assert line["message"] == "stored 3"
    assert line["process"] == "recorder"
    assert line["version"] == "v1"
    assert line["path"] == "/x"
    assert line["at"].endswith("+00:00")


def test_an_exception_is_one_line_too() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.makeLogRecord({"msg": "no", "exc_info": sys.exc_info()})

    text = JsonFormatter("x").format(record)

    assert "\n" not in text
    assert "ValueError: broken" in json.loads(text)["error"]


def test_a_process_goes_without_a_package_as_if_it_were_not_installed() -> None:
    """pyarrow loads pandas to look at what it is given; the recorder, which says so, does not."""
    program = (
        "import sys, pyarrow as pa\n"
        "from telemetry.process import go_without\n"
        "if len(sys.argv) > 1: go_without('pandas')\n"
        "assert pa.Table.from_pylist([{'a': 'x'}]).num_rows == 1\n"
        "print('pandas' in sys.modules)\n"
    )
    said = [
        subprocess.run([sys.executable, "-c", program, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["without"])
    ]
    assert said == ["True\n", "False\n"], "the first is what would be without it"
