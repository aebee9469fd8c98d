"""The outbox in front of a real Redis that dies and returns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from telemetry.config import TelemetryConfig, open_log
from telemetry.event_log import MAX_PAYLOAD_BYTES, EntryTooLarge, EventLog
from telemetry.outbox import OutboxInUse, OutboxLog
from tests.integration.recording import wait_for
from tests.servers import RedisServer

TOPIC = "things.v1"


@pytest.fixture
def outbox(telemetry_config: TelemetryConfig, tmp_path: Path) -> Iterator[OutboxLog]:
    outbox = OutboxLog(open_log(telemetry_config), tmp_path / "outbox")
    yield outbox
    outbox.close()


@pytest.fixture
def downtime(redis_server: RedisServer) -> Iterator[RedisServer]:
    """Redis, killed -9; running again at the end of the test whatever happened."""
    redis_server.kill()
    yield redis_server
    redis_server.restart()


def payloads(log: EventLog | OutboxLog, topic: str = TOPIC) -> list[bytes]:
    reader = log.reader([topic], {})
    try:
        return [entry.payload for entry in reader.poll(max_entries=10_000, timeout_s=0.3)]
    finally:
        reader.close()


def first_of_each(items: list[bytes]) -> list[bytes]:
    """What a consumer that deduplicates sees."""
    return list(dict.fromkeys(items))


def test_entries_go_straight_to_the_log_while_it_answers(outbox: OutboxLog) -> None:
    done = [outbox.append(TOPIC, "k", str(n).encode()).result(timeout=10) for n in range(5)]

    assert {durable.where for durable in done} == {"log"}
    assert outbox.pending == 0
    assert payloads(outbox) == [b"0", b"1", b"2", b"3", b"4"]


def test_entries_are_durable_here_while_the_log_is_away_and_follow_in_order(
    outbox: OutboxLog, downtime: RedisServer
) -> None:
    sent = [str(n).encode() for n in range(50)]
    first = outbox.append(TOPIC, "k", sent[0]).result(timeout=10)
    began = time.monotonic()
    rest = [outbox.append(TOPIC, "k", payload).result(timeout=10) for payload in sent[1:]]
    assert time.monotonic() - began < 5, "only the first one waits for the log"
    assert {durable.where for durable in [first, *rest]} == {"outbox"}
    assert outbox.pending == 50

    downtime.start()

    wait_for(lambda: outbox.pending == 0, "drained")
    wait_for(lambda: outbox.append(TOPIC, "k", b"direct").result(10).where == "log", "direct again")
    found = first_of_each(payloads(outbox))
    assert found == [*sent, b"direct"]


def test_what_no_log_takes_is_refused_also_while_the_log_is_away(outbox: OutboxLog, redis_server: RedisServer) -> None:
    """In a segment it would be sent for ever, and what is behind it with it."""
    redis_server.kill()
    try:
        assert outbox.append(TOPIC, "k", b"before").result(timeout=20).where == "outbox"
        with pytest.raises(EntryTooLarge, match="1000001 bytes"):
            outbox.append(TOPIC, "k", bytes(MAX_PAYLOAD_BYTES + 1)).result(timeout=20)
        assert outbox.append(TOPIC, "k", b"behind").result(timeout=20).where == "outbox"
    finally:
        redis_server.restart()
    wait_for(lambda: outbox.pending == 0, "the outbox is empty")
    assert payloads(outbox) == [b"before", b"behind"]


def test_the_order_of_a_key_is_kept_across_outage_and_return(outbox: OutboxLog, redis_server: RedisServer) -> None:
    sent: list[bytes] = []

    def send(count: int) -> None:
        for _ in range(count):
            sent.append(str(len(sent)).encode())
            outbox.append(TOPIC, "k", sent[-1]).result(timeout=10)

    for _ in range(3):
        send(20)
        redis_server.kill()
        send(20)
        redis_server.start()
        send(200)

    wait_for(lambda: outbox.pending == 0, "drained")
    assert first_of_each(payloads(outbox)) == sent


def test_what_a_killed_router_left_in_its_outbox_is_sent_by_the_next_one(
    telemetry_config: TelemetryConfig, downtime: RedisServer, tmp_path: Path
) -> None:
    folder = tmp_path / "outbox"
    script = f"""
import os, signal
from pathlib import Path
from telemetry.config import TelemetryConfig, open_log
from telemetry.outbox import OutboxLog
outbox = OutboxLog(open_log(TelemetryConfig(redis_url={telemetry_config.redis_url!r})), Path({str(folder)!r}))
for n in range(20):
    assert outbox.append("{TOPIC}", "k", str(n).encode()).result(timeout=20).where == "outbox"
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -9
    segment = next(folder.glob("*.segment"))
    with segment.open("ab") as file:
        file.write(b"\x40\x00\x00\x00half of a frame")  # as when the power went during a write
    downtime.start()

    outbox = OutboxLog(open_log(telemetry_config), folder)
    assert outbox.pending == 20
    wait_for(lambda: outbox.pending == 0, "sent")
    wait_for(lambda: not list(folder.glob("*.segment")), "segments removed")
    found = payloads(outbox)
    outbox.close()
    assert first_of_each(found) == [str(n).encode() for n in range(20)]
    [torn] = folder.glob("*.torn")
    assert torn.read_bytes().endswith(b"half of a frame"), "what was behind the tear is kept"


def test_one_outbox_folder_serves_one_process(
    outbox: OutboxLog, telemetry_config: TelemetryConfig, tmp_path: Path
) -> None:
    with pytest.raises(OutboxInUse, match="folder of its own"):
        OutboxLog(open_log(telemetry_config), tmp_path / "outbox")


def test_what_a_worker_left_that_is_no_more_is_sent_by_another(
    telemetry_config: TelemetryConfig, downtime: RedisServer, tmp_path: Path
) -> None:
    gone, used = (OutboxLog(open_log(telemetry_config), tmp_path / name) for name in ("gone", "used"))
    for outbox in (gone, used):
        assert outbox.append(TOPIC, "k", b"acknowledged").result(timeout=20).where == "outbox"
    gone.close()
    downtime.start()
    heir = OutboxLog(open_log(telemetry_config), tmp_path / "heir", adopt=[tmp_path / "gone", tmp_path / "used"])
    wait_for(lambda: heir.pending == 0 and used.pending == 0, "sent")
    assert not list((tmp_path / "gone").glob("*.segment"))
    found = payloads(heir)
    heir.close()
    used.close()
    assert found == [b"acknowledged"] * 2, "each once: a folder in use is left alone"


def test_closing_during_an_outage_keeps_what_is_not_sent(
    telemetry_config: TelemetryConfig, downtime: RedisServer, tmp_path: Path
) -> None:
    outbox = OutboxLog(open_log(telemetry_config), tmp_path / "box")
    futures = [outbox.append(TOPIC, "k", str(n).encode()) for n in range(10)]
    outbox.close()
    assert {future.result(timeout=1).where for future in futures} == {"outbox"}

    downtime.start()
    again = OutboxLog(open_log(telemetry_config), tmp_path / "box")
    wait_for(lambda: again.pending == 0, "sent")
    found = payloads(again)
    again.close()
    assert first_of_each(found) == [str(n).encode() for n in range(10)]


def test_nothing_overtakes_an_entry_that_failed(telemetry_config: TelemetryConfig, redis_server: RedisServer) -> None:
    """Entries that were appended while the log did not answer lie behind one another in it, whoever failed first."""
    config = msgspec.structs.replace(telemetry_config, append_timeout_s=0.4, redis_timeout_s=0.4)
    log = OutboxLog(open_log(config), telemetry_config.state_path / "outbox")
    log.append(TOPIC, "k", b"0").result(20)
    appended = []
    os.kill(redis_server.pid, signal.SIGSTOP)
    try:
        for number in range(1, 60):
            appended.append(log.append(TOPIC, "k", str(number).encode()))
            time.sleep(0.02)
    finally:
        os.kill(redis_server.pid, signal.SIGCONT)
    for number in range(60, 120):
        appended.append(log.append(TOPIC, "k", str(number).encode()))
        time.sleep(0.005)
    for future in appended:
        future.result(20)
    wait_for(lambda: log.pending == 0, "drained")
    log.close()
    after = open_log(telemetry_config)
    found = [int(payload) for payload in payloads(after)]
    after.close()
    first = list(dict.fromkeys(found))
    assert first == list(range(120)), "each first where it was appended; some twice"
