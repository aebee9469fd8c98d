"""The recorder as a process, on both logs: killed, starved and fed nonsense, it stores everything once."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
import redis
from deltalake import DeltaTable

from telemetry.config import TelemetryConfig, open_log, redis_client
from telemetry.event_log import EventLog
from telemetry.events import PREFERENCES, AnyEvent, encode
from telemetry.receipts import receipt_key, timeline
from telemetry.store import counts, preferences
from tests import examples
from tests.integration.recording import RecorderProcess, append, stored_ids, wait_for
from tests.servers import RedisServer


@pytest.fixture
def client(config: TelemetryConfig) -> Iterator[redis.Redis]:
    client = redis_client(config)
    yield client
    client.close()


def stages(client: redis.Redis, preference_id: str) -> list[str]:
    return [stage.stage for stage in timeline(client.hgetall(receipt_key(preference_id)))]


def test_a_recorder_killed_again_and_again_stores_every_event_exactly_once(
    config: TelemetryConfig, log: EventLog, client: redis.Redis
) -> None:
    verdicts = [examples.preference(n) for n in range(150)]
    events: list[AnyEvent] = []
    for n, verdict in enumerate(verdicts):
        events += [examples.pair(n), verdict, examples.served(n)]
    ids = {event.event_id for event in events}

    def feed() -> None:
        for n, event in enumerate(events):
            append(log, event, *([event] if n % 10 == 0 else []))  # every tenth twice, as after a lost answer
            time.sleep(0.02)

    feeder = threading.Thread(target=feed)
    feeder.start()
    rng = random.Random(7)
    for _ in range(5):
        before = sum(stored_ids(config).values())
        with RecorderProcess(config) as recorder:
            wait_for(lambda: sum(stored_ids(config).values()) > before or not feeder.is_alive(), "progress")  # noqa: B023
            time.sleep(rng.uniform(0, 0.6))
            recorder.kill()
    feeder.join()

    with RecorderProcess(config) as recorder:
        wait_for(lambda: set(stored_ids(config)) >= ids, "everything stored")
        wait_for(lambda: all(stages(client, v.event_id) == ["accepted", "stored"] for v in verdicts), "receipts")
        loaded = recorder.loaded()
        assert "pyarrow" in loaded and not {"pandas", "_dataset"} & loaded, "100 MB that it needs nothing of"
        assert recorder.stop() == 0
    assert stored_ids(config) == {event_id: 1 for event_id in ids}


def test_a_payload_that_is_no_event_goes_to_the_dead_letters_once_and_stops_nothing(
    config: TelemetryConfig, log: EventLog
) -> None:
    bad = log.append(PREFERENCES, "k", b'{"type": "PreferenceRecorded", "nonsense": 1}').result(30)
    wrong_topic = examples.pair(1)
    log.append(PREFERENCES, "k", json.dumps({"type": "FromTheFuture", "schema_version": 9}).encode()).result(30)
    log.append(PREFERENCES, "k", encode(wrong_topic)).result(30)
    good = examples.preference(1)
    append(log, good)

    for _ in range(2):  # the second run reads nothing again
        with RecorderProcess(config) as recorder:
            wait_for(lambda: counts(config.store_root)["dead_letters"] >= 3, "dead letters stored")
            wait_for(lambda: counts(config.store_root)["preferences"] == 1, "the good one stored")
            assert recorder.stop() == 0

    assert counts(config.store_root)["dead_letters"] == 3
    rows = DeltaTable(f"{config.store_root}/dead_letters").to_pyarrow_table().to_pylist()
    first = next(row for row in rows if row["source_offset"] == bad.offset and row["source_partition"] == bad.partition)
    assert first["source_topic"] == PREFERENCES
    assert first["payload"] == b'{"type": "PreferenceRecorded", "nonsense": 1}'
    assert any("belongs to tiebreak.pairs.v1" in row["reason"] for row in rows)


def test_a_verdict_is_followed_from_stored_over_trained_to_live(
    config: TelemetryConfig, log: EventLog, client: redis.Redis
) -> None:
    early, late, dropped = (examples.preference(n) for n in range(3))
    first, second = "v000001-aaaaaaaa", "v000002-bbbbbbbb"
    with RecorderProcess(config):
        append(log, early, late, dropped)
        append(log, examples.batch(1, [early.event_id], [(dropped.event_id, "held_out")]))
        append(log, examples.published(first, [early.event_id]), examples.release(first, "shadow"))
        append(log, examples.batch(2, [late.event_id]), examples.published(second, [late.event_id], parent=first))
        wait_for(lambda: "trained" in stages(client, late.event_id), "trained")
        assert "live" not in stages(client, early.event_id)

        append(log, examples.release(second, "canary"))

        for verdict in (early, late):
            wait_for(lambda: "live" in stages(client, verdict.event_id), "live")  # noqa: B023
    receipt = timeline(client.hgetall(receipt_key(early.event_id)))
    assert [stage.stage for stage in sorted(receipt, key=lambda s: s.stage)] == [
        "accepted",
        "live",
        "stored",
        "trained",
    ]
    assert next(s for s in receipt if s.stage == "live").version == second
    assert next(s for s in receipt if s.stage == "trained").batch == "chat-main/000001"
    gone = timeline(client.hgetall(receipt_key(dropped.event_id)))
    assert next(s for s in gone if s.stage == "dropped").reason == "held_out"


def test_lost_receipts_are_built_again_from_the_store(
    config: TelemetryConfig, log: EventLog, client: redis.Redis
) -> None:
    verdict = examples.preference(1)
    with RecorderProcess(config):
        append(log, verdict, examples.batch(1, [verdict.event_id]))
        wait_for(lambda: "trained" in stages(client, verdict.event_id), "trained")
    before = client.hgetall(receipt_key(verdict.event_id))
    client.delete(receipt_key(verdict.event_id), "tiebreak:receipts:next")

    with RecorderProcess(config):
        wait_for(lambda: "trained" in stages(client, verdict.event_id), "trained, again")

    assert client.hgetall(receipt_key(verdict.event_id)) == before


def test_the_same_recorder_goes_on_after_redis_was_killed_and_restarted(
    telemetry_config: TelemetryConfig, redis_server: RedisServer
) -> None:
    log = open_log(telemetry_config)
    first = [examples.preference(n) for n in range(20)]
    second = [examples.preference(n) for n in range(20, 40)]
    with RecorderProcess(telemetry_config) as recorder:
        append(log, *first)
        wait_for(lambda: len(stored_ids(telemetry_config)) == 20, "the first stored")
        redis_server.kill()
        time.sleep(1.5)
        redis_server.start()
        append(log, *second)
        wait_for(lambda: len(stored_ids(telemetry_config)) == 40, "the second stored")
        assert recorder.stop() == 0
    log.close()
    assert stored_ids(telemetry_config) == {event.event_id: 1 for event in first + second}


def test_a_recorder_whose_position_is_gone_halts_and_says_so(telemetry_config: TelemetryConfig) -> None:
    log = open_log(telemetry_config)
    append(log, examples.preference(1))
    with RecorderProcess(telemetry_config) as recorder:
        wait_for(lambda: len(stored_ids(telemetry_config)) == 1, "stored")
        with redis_client(telemetry_config) as client:
            client.delete(PREFERENCES)
        append(log, examples.preference(2))
        log.close()

        assert recorder.process is not None
        assert recorder.process.wait(60) == 3
        assert '"action":"position_lost"' in recorder.log_path.read_text()
    assert len(list(preferences(telemetry_config.store_root))) == 1


def test_a_recorder_whose_store_is_damaged_halts_and_says_so(telemetry_config: TelemetryConfig) -> None:
    log = open_log(telemetry_config)
    append(log, examples.preference(1))
    with RecorderProcess(telemetry_config) as recorder:
        wait_for(lambda: len(stored_ids(telemetry_config)) == 1, "stored")
        assert recorder.stop() == 0
    (file,) = (telemetry_config.state_path / "store" / "preferences").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    append(log, examples.preference(2))
    log.close()
    with RecorderProcess(telemetry_config) as recorder:
        assert recorder.process is not None
        assert recorder.process.wait(60) == 3
    assert '"action":"store_damaged"' in recorder.log_path.read_text()


def test_the_recorder_announces_itself_and_tells_what_it_stored(telemetry_config: TelemetryConfig) -> None:
    log = open_log(telemetry_config)
    with RecorderProcess(telemetry_config) as recorder:
        wait_for(recorder.ready_path.exists, "ready")
        append(log, examples.pair(1), examples.preference(1))
        log.append(PREFERENCES, "k", b"nonsense").result(10)
        wait_for(lambda: len(stored_ids(telemetry_config)) == 3, "stored")
        url = json.loads(recorder.ready_path.read_text())["metrics_url"]
        time.sleep(0.5)
        with urllib.request.urlopen(url) as answer:
            text = answer.read().decode()
    log.close()
    assert 'tiebreak_events_recorded_total{topic="tiebreak.preferences.v1"} 1.0' in text
    assert 'tiebreak_dead_letters_total{topic="tiebreak.preferences.v1"} 1.0' in text
    assert "tiebreak_pairs_stored_total 1.0" in text
    stored_at = next(line for line in text.splitlines() if line.startswith("tiebreak_last_pair_stored_timestamp"))
    assert abs(float(stored_at.split()[1]) - time.time()) < 60
