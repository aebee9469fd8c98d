"""The record: verdicts acknowledged, rows stored, and how soon; on both logs: ``make bench-record``.

Verdicts are clicks on pairs that were shown before: two router workers, the log, Redis, and the load share all cores,
and every acknowledgement is a synced write. The recorder then gets a backlog, from each log, and its memory is looked
at after a million events. Last, events that trickle in are looked for in the store as a reader would.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import psutil
import redis
import tomli_w
from kafka import KafkaConsumer, TopicPartition  # type: ignore[import-untyped]

from deploy.kafka.broker import Broker
from deploy.machine import free_port
from deploy.programs import GIVES_BACK
from router.pairs import PAIR_KEY, RememberedPair, Ticket, pseudonym, sign_ticket
from telemetry.config import TelemetryConfig, open_log, open_sealer
from telemetry.events import COMPLETIONS, Completion, CompletionServed, Message, PairShown, encode, new_id, utc_now
from telemetry.process import signing_key
from telemetry.redis_log import stream_fields
from telemetry.store import counts, read
from tests.bench import record
from tests.bench.bench_gateway import process
from tests.servers import RedisServer

WORKERS, CONNECTIONS, ROUNDS, ROUND_S = 2, 128, 5, 8
USERS, PAIRS_PREPARED = 50, 32_000
BACKLOG, KAFKA_BACKLOG, MILLION = 200_000, 100_000, 1_000_000
TRICKLE_S, TRICKLE_PER_S = 40.0, 100
START_S = 120.0
LUA = """
local bodies, at = {}, 0
for line in io.lines(os.getenv("BODIES")) do bodies[#bodies + 1] = line end
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
request = function()
  at = at + 1
  if at > #bodies then error("more verdicts than pairs: raise PAIRS_PREPARED") end
  return wrk.format(nil, nil, nil, bodies[at])
end
done = function(summary, latency, requests)
  local errors = summary.errors
  local bad = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format("RESULT %d %d %d %d\\n", summary.requests, summary.duration, bad, latency:percentile(99)))
end
"""


def completion(words: str) -> Completion:
    """An answer of some sixty tokens."""
    ids = tuple(range(1000, 1060))
    return Completion(
        completion_id=f"c-{new_id()}", text=words * 60, variant="chat-main", version="v000001-aaaaaaaa",
        channel="stable", finish_reason="stop", prompt_tokens=40, completion_tokens=60, ttft_s=0.1, duration_s=1.0,
        temperature=0.8, top_p=0.95, token_ids=ids, logps=tuple(-0.001 * token for token in ids),
    )  # fmt: skip


def prepare(telemetry: TelemetryConfig, folder: Path, number: int) -> Path:
    """Pairs that were shown, as the router remembers them, and the bodies of their verdicts, one a line."""
    key, sealer = signing_key(telemetry.state_path), open_sealer(telemetry)
    people = [pseudonym(key, f"user-{n}") for n in range(USERS)]
    for person in people:
        sealer.prepare(person)
    expires = utc_now() + timedelta(hours=1)
    bodies = folder / f"bodies-{number}"
    with redis.Redis.from_url(telemetry.redis_address) as client, bodies.open("w") as file:
        pipeline = client.pipeline(transaction=False)
        for n in range(PAIRS_PREPARED):
            shown = PairShown(
                pair_id=new_id(), request_id=new_id(), policy="chat", user=people[n % USERS],
                prompt=(Message("user", f"How do I keep basil number {n} alive on a balcony in the north?"),),
                a=completion("water "), b=completion("light "), propensity=0.5, expires_at=expires,
            )  # fmt: skip
            pair = RememberedPair(sealer.seal(shown), "")
            pipeline.set(PAIR_KEY + shown.pair_id, msgspec.json.encode(pair), ex=3600)
            token = sign_ticket(key, Ticket(shown.pair_id, shown.user, expires.timestamp()))
            file.write(json.dumps({"pair_id": shown.pair_id, "token": token, "choice": "ab"[n % 2]}) + "\n")
            if n % 1000 == 999:
                pipeline.execute()
        pipeline.execute()
    return bodies


@contextmanager
def routers(folder: Path, document: dict[str, Any]) -> Iterator[str]:
    """The URL of two workers on one port."""
    port = free_port()
    stack = {"stack": {"host": "127.0.0.1", "port": port}, "router": {"workers": WORKERS}}
    path = folder / "router.toml"
    path.write_text(tomli_w.dumps(document | stack))
    state = Path(document["telemetry"]["state"])
    with ExitStack() as started:
        for worker in range(1, WORKERS + 1):
            name = "router" if worker == 1 else f"router-{worker}"
            (state / "run" / f"{name}.ready").unlink(missing_ok=True)
            command = [sys.executable, "-m", "router", "--config", str(path), "--worker", str(worker)]
            shared = state / "run" / "metrics"
            shutil.rmtree(shared, ignore_errors=True) if worker == 1 else None
            shared.mkdir(parents=True, exist_ok=True)
            cores = ",".join(map(str, range(os.cpu_count() or 1)))
            log = folder / f"{name}.log"
            started.enter_context(process(command, cores, log, PROMETHEUS_MULTIPROC_DIR=str(shared)))
            _until(lambda name=name: (state / "run" / f"{name}.ready").exists(), f"{name} is ready")  # type: ignore[misc]
        yield f"http://127.0.0.1:{port}"


def _until(is_so: Any, what: str, limit_s: float = START_S) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {limit_s} s")
        time.sleep(0.05)


def is_rewriting(telemetry: TelemetryConfig) -> bool:
    """Whether Redis still deals with what was prepared: a hundred megabytes at a time, as no deployment gets them."""
    with redis.Redis.from_url(telemetry.redis_address) as client:
        found: Any = client.info("persistence")
    return bool(found["aof_rewrite_in_progress"] or found["aof_rewrite_scheduled"])


def clicks(url: str, bodies: Path, script: Path) -> tuple[float, float]:
    """Verdicts acknowledged a second, and their p99 in ms, over one round."""
    environ = os.environ | {"BODIES": str(bodies)}
    words = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{ROUND_S}s", "-s", str(script), "--latency", f"{url}/v1/preferences"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    requests, duration_us, bad, p99_us = map(int, line.split()[1:])
    if bad:
        raise RuntimeError(f"{bad} of {requests} verdicts were not acknowledged\n{done.stdout}")
    return requests / (duration_us / 1e6), p99_us / 1000


def acknowledged(folder: Path, telemetry: TelemetryConfig) -> dict[str, Any]:
    """Rounds of clicks, each on pairs of its own."""
    script = folder / "clicks.lua"
    script.write_text(LUA)
    per_second, p99_ms = [], []
    with routers(folder, {"telemetry": _plain(telemetry)}) as url:
        for number in range(ROUNDS):
            bodies = prepare(telemetry, folder, number)
            _until(lambda: not is_rewriting(telemetry), "Redis has rewritten its file")
            rate, p99 = clicks(url, bodies, script)
            per_second.append(rate)
            p99_ms.append(p99)
    return {"per_second": sorted(per_second)[ROUNDS // 2], "rounds": per_second, "p99_ms": p99_ms}


def _plain(telemetry: TelemetryConfig) -> dict[str, Any]:
    return {name: value for name, value in msgspec.to_builtins(telemetry).items() if value != ""}


class Recording:
    """A recorder process, and how much memory it takes at most."""

    def __init__(self, folder: Path, telemetry: TelemetryConfig) -> None:
        self._telemetry, self.peak_mb = telemetry, 0.0
        config = folder / "recorder.toml"
        config.write_text(tomli_w.dumps({"telemetry": _plain(telemetry)}))
        with (folder / "recorder.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "telemetry.recorder", "--config", str(config)],
                stdout=log, stderr=log, env=os.environ | GIVES_BACK,
            )  # fmt: skip

    def until(self, rows: int, limit_s: float = 600.0) -> float:
        """Seconds from its first stored row until ``rows`` of completions are stored."""
        begun, has_begun, deadline = 0.0, False, time.monotonic() + limit_s
        first = counts(self._telemetry.store_root)["completions"]
        while (now := counts(self._telemetry.store_root)["completions"]) < rows:
            if not has_begun and now > first:
                begun, has_begun, first = time.monotonic(), True, now
            self._look()
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise TimeoutError(f"{now} of {rows} rows")
            time.sleep(0.2)
        self.counted = rows - first
        return time.monotonic() - begun

    def _look(self) -> None:
        self.peak_mb = max(self.peak_mb, psutil.Process(self._process.pid).memory_info().rss / 1e6)

    def rest(self) -> None:
        """What it has still to do once all is stored: files are joined."""
        for _ in range(50):
            self._look()
            time.sleep(0.2)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)


def served(number: int) -> bytes:
    event = CompletionServed(
        completion_id=f"chatcmpl-{number}", request_id=f"request-{number}", policy="chat", variant="chat-main",
        version="v000001-aaaaaaaa", channel="stable", finish_reason="stop", prompt_tokens=40, completion_tokens=60,
        ttft_s=0.1, duration_s=1.0, repetition_ratio=0.01, mean_logp=-0.7,
    )  # fmt: skip
    return encode(event)


def fill_redis(telemetry: TelemetryConfig, count: int) -> None:
    """A backlog, written by pipelines of 2000."""
    with redis.Redis.from_url(telemetry.redis_address) as client:
        for start in range(0, count, 2000):
            pipeline = client.pipeline(transaction=False)
            for number in range(start, min(start + 2000, count)):
                pipeline.xadd(COMPLETIONS, stream_fields(f"k{number}", served(number)))
            pipeline.execute()


def fill_kafka(telemetry: TelemetryConfig, count: int) -> None:
    log = open_log(telemetry)
    waiting = [log.append(COMPLETIONS, f"k{number}", served(number)) for number in range(count)]
    for future in waiting:
        future.result(timeout=300)
    log.close()


def consumed(telemetry: TelemetryConfig) -> float:
    """Entries a second that kafka-python itself reads, and nothing else done."""
    name = telemetry.kafka_topic_prefix + COMPLETIONS
    consumer = KafkaConsumer(bootstrap_servers=telemetry.kafka_bootstrap, group_id=None, auto_offset_reset="earliest")
    partitions = [TopicPartition(name, partition) for partition in consumer.partitions_for_topic(name)]
    consumer.assign(partitions)
    consumer.seek_to_beginning(*partitions)
    count, begun = 0, time.monotonic()
    while count < KAFKA_BACKLOG:
        count += sum(len(batch) for batch in consumer.poll(timeout_ms=1000, max_records=5000).values())
    rate = count / (time.monotonic() - begun)
    consumer.close(autocommit=False)
    return rate


def queryable(telemetry: TelemetryConfig) -> list[float]:
    """Seconds from an event's time until a reader of the store sees it, of events that trickle in."""
    log = open_log(telemetry)
    made: dict[str, float] = {}
    over = threading.Event()

    def feed() -> None:
        while not over.wait(1.0 / TRICKLE_PER_S):
            payload = served(len(made))
            made[msgspec.json.decode(payload)["event_id"]] = time.time()
            log.append(COMPLETIONS, f"t{len(made)}", payload)

    feeding = threading.Thread(target=feed)
    feeding.start()
    seen: dict[str, float] = {}
    since, end = utc_now(), time.monotonic() + TRICKLE_S
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    while time.monotonic() < end or (len(seen) < len(made) and time.monotonic() < end + 30.0):
        if time.monotonic() > end:
            over.set()
        wanted = pc.field("recorded_at") >= since
        ids = read(telemetry.store_root, COMPLETIONS, columns=["event_id"], wanted=wanted)["event_id"].to_pylist()
        now = time.time()
        for event_id in ids:
            seen.setdefault(event_id, now)
        time.sleep(0.1)
    over.set()
    feeding.join()
    log.close()
    if missing := made.keys() - seen.keys():
        raise RuntimeError(f"{len(missing)} events never came")
    return [seen[event_id] - at for event_id, at in made.items()]


@contextmanager
def embedded(folder: Path) -> Iterator[TelemetryConfig]:
    """A deployment's telemetry on a Redis of its own."""
    (folder / "redis").mkdir(parents=True)
    server = RedisServer(folder / "redis")
    server.start()
    try:
        yield TelemetryConfig(
            state=str(folder / "state"), redis_url=server.url, redis_timeout_s=30.0, append_timeout_s=30.0
        )
    finally:
        server.kill()


async def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tb-record-") as name:
        root = Path(name)
        with embedded(root / "a") as telemetry:
            found = acknowledged(root / "a", telemetry)
            rows.append(record.row("verdicts acknowledged a second, embedded log", found.pop("per_second"), "/s",
                                   bar=2000, better="higher", **found))  # fmt: skip
        with embedded(root / "b") as telemetry:
            fill_redis(telemetry, BACKLOG)
            recording = Recording(root / "b", telemetry)
            seconds = recording.until(BACKLOG)
            rows.append(record.row("rows stored a second by the recorder, embedded log", recording.counted / seconds,
                                   "/s", bar=20_000, better="higher", seconds=seconds))  # fmt: skip
            latencies = queryable(telemetry)
            rows.append(record.row("event → in the store for a reader, p99", record.quantile(latencies, 0.99), "s",
                                   bar=5, better="lower", p50_s=record.quantile(latencies, 0.5)))  # fmt: skip
            fill_redis(telemetry, MILLION - BACKLOG)
            recording.until(MILLION)
            recording.rest()
            rows.append(record.row("memory of the recorder over a million events, at most", recording.peak_mb, "MB",
                                   bar=300, better="lower"))  # fmt: skip
            recording.stop()
        broker = Broker(root / "kafka")
        broker.start()
        try:
            with embedded(root / "c") as telemetry:
                on_kafka = {"log": "kafka", "kafka_bootstrap": broker.bootstrap, "append_timeout_s": 30.0}
                telemetry = msgspec.structs.replace(telemetry, **on_kafka)
                found = acknowledged(root / "c", telemetry)
                rows.append(record.row("verdicts acknowledged a second, Kafka", found.pop("per_second"), "/s",
                                       bar=2000, better="higher", **found))  # fmt: skip
            with embedded(root / "d") as telemetry:
                telemetry = msgspec.structs.replace(telemetry, **on_kafka, kafka_topic_prefix="d.")
                fill_kafka(telemetry, KAFKA_BACKLOG)
                alone = consumed(telemetry)
                recording = Recording(root / "d", telemetry)
                seconds = recording.until(KAFKA_BACKLOG)
                rows.append(record.row("rows stored a second by the recorder, Kafka", recording.counted / seconds,
                                       "/s", bar=5000, better="higher", kafka_python_alone_per_s=alone))  # fmt: skip
                recording.stop()
        finally:
            broker.kill()
    record.save("record", "make bench-record", rows)


if __name__ == "__main__":
    asyncio.run(main())
