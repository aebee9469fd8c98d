"""The release controller as a process, on a real Redis log, killed and restarted; only the model is played.

A small HTTP server stands where router and model would be: each version says what the test gave it to say.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
from safetensors.numpy import save_file

from deploy.release.config import ReleaseConfig
from deploy.release.controller import Controller
from deploy.release.probes import Prober
from deploy.release.store import STATE_KEY, HistoryEntry, ReleaseStore, Saved
from telemetry import events
from telemetry.config import TelemetryConfig, open_log, redis_client
from telemetry.configuration import read_table
from telemetry.manifest import base_digest, base_version
from telemetry.routing import (
    COMMANDS_KEY,
    HISTORY_KEY,
    REPLICAS_KEY,
    ROUTING_KEY,
    Replica,
    ReplicaTable,
    RoutingTable,
    VariantRoute,
    decode_routing,
)
from tests.servers import RedisServer
from tests.unit.release.story import GOOD_METRICS, V1, V2

SENSE = "A walk before breakfast wakes you up, and a glass of water helps you to think clearly."
NONSENSE = "sea sea sea sea sea sea sea sea sea sea sea sea sea sea sea sea sea sea"


class Speaker:
    """The door that probes go through: version → what it says."""

    def __init__(self) -> None:
        self.says: dict[str, str] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        speaker = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                version = body["model"].partition("@")[2]
                speaker.asked.append((version, body | {"probe": self.headers["x-tiebreak-probe"]}))
                text = speaker.says.get(version, SENSE)
                tokens = [{"token": word, "logprob": -1.0} for word in text.split()]
                choice = {
                    "message": {"content": text}, "finish_reason": "length", "logprobs": {"content": tokens},
                }  # fmt: skip
                answer = json.dumps({"choices": [choice], "usage": {"completion_tokens": len(tokens)}}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Deployment:
    """What surrounds the controller: its configuration, its log, the replicas' table, and the process itself."""

    def __init__(self, folder: Path, telemetry: TelemetryConfig, speaker: Speaker) -> None:
        model = folder / "model"
        model.mkdir()
        save_file({"weight": np.arange(4, dtype=np.float32)}, model / "model.safetensors")
        self.base = base_version(base_digest(model))
        self.folder, self.telemetry, self.speaker = folder, telemetry, speaker
        self.redis = redis_client(telemetry)
        self.log = open_log(telemetry)
        (folder / "release.log").touch()
        self.config = folder / "run" / "config.toml"
        self.config.parent.mkdir(exist_ok=True)
        self.config.write_text(
            f"""
[telemetry]
state = "{folder}"
redis_url = "{telemetry.redis_url}"
[serving.bases.tiny]
model = "{model}"
replicas = 1
[[release.policies.chat]]
variant = "chat-main"
base = "tiny"
temperature = 0.8
[[release.policies.chat]]
variant = "chat-calm"
base = "tiny"
temperature = 0.3
[release]
router_url = "{speaker.url}"
tick_s = 0.05
lease_s = 1.0
[release.watch]
probe_interval_s = 0.2
"""
        )
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "deploy.release", "--config", str(self.config)]
        with (self.folder / "release.log").open("ab") as output:
            process = subprocess.Popen(command, stderr=output)
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.log.close()
        self.redis.close()

    def append(self, event: events.AnyEvent) -> None:
        topic = events.TOPIC_OF[type(event)]
        self.log.append(topic, events.key_of(event), events.encode(event)).result(timeout=5)

    def hold(self, *versions: str) -> None:
        """Two replicas hold the base and these; the table is kept fresh by whoever waits."""
        self.held = (self.base, *versions)
        self.refresh()

    def refresh(self, *, answering: str = "") -> None:
        """``answering`` is a version that every replica has a request for."""
        busy = {answering: 1} if answering else {}
        replicas = tuple(
            Replica(f"r{i}", "tiny", f"http://127.0.0.1:{30000 + i}", True, self.held, 0, 4, in_flight_by_version=busy)
            for i in range(2)
        )
        self.redis.set(REPLICAS_KEY, msgspec.json.encode(ReplicaTable(time.time(), replicas)))

    def publish(self, version: str, parent: str = "", metrics: dict[str, float] | None = None) -> None:
        self.append(
            events.VersionPublished(
                variant="chat-main", version=version, parent=parent or self.base, base="tiny", digest="d", uri="u",
                step=1, preference_ids=("p1",), metrics=GOOD_METRICS if metrics is None else metrics,
                oldest_verdict_at=datetime.now(UTC),
            )
        )  # fmt: skip

    def serve(self, version: str, times: int, *, channel: events.Channel = "canary", **numbers: Any) -> None:
        usual: dict[str, Any] = {"completion_tokens": 20, "ttft_s": 0.1, "duration_s": 1.0, "mean_logp": -1.0}
        for _ in range(times):
            self.append(
                events.CompletionServed(
                    completion_id=events.new_id(), request_id="r", policy="chat", variant="chat-main",
                    version=version, channel=channel, finish_reason="stop", **(usual | numbers),
                )
            )  # fmt: skip

    def judge(self, winner: str, loser: str, times: int) -> None:
        for _ in range(times):
            self.append(self.verdict(winner, loser))

    def verdict(self, winner: str, loser: str) -> events.PreferenceRecorded:
        return events.PreferenceRecorded(
            pair_id=events.new_id(), policy="chat", user="u", prompt=(), chosen=self._said(winner),
            rejected=self._said(loser), outcome="chosen_rejected", chosen_position="a", propensity=1.0,
            shown_at=datetime.now(UTC), decided_s=1.0,
        )  # fmt: skip

    def _said(self, version: str) -> events.Completion:
        return events.Completion(
            completion_id=events.new_id(), text=SENSE, variant="chat-main", version=version, channel="canary",
            finish_reason="stop", prompt_tokens=5, completion_tokens=20, ttft_s=0.1, duration_s=1.0,
            temperature=0.8, top_p=0.95,
        )  # fmt: skip

    def command(self, **fields: Any) -> None:
        self.redis.rpush(COMMANDS_KEY, json.dumps(fields))

    def route(self) -> VariantRoute | None:
        payload = self.redis.get(ROUTING_KEY)
        return decode_routing(payload).policies["chat"][0] if payload else None  # type: ignore[arg-type]

    def revision(self) -> int:
        return decode_routing(self.redis.get(ROUTING_KEY)).revision  # type: ignore[arg-type]

    def history(self) -> list[dict[str, Any]]:
        """Newest first."""
        return [json.loads(line) for line in self.redis.lrange(HISTORY_KEY, 0, -1)]  # type: ignore[union-attr]

    def announced(self) -> list[events.ReleaseChanged]:
        reader = self.log.reader([events.VERSIONS], {})
        found = [events.decode(entry.payload) for entry in reader.poll(max_entries=1000, timeout_s=0.2)]
        reader.close()
        return [event for event in found if isinstance(event, events.ReleaseChanged)]

    def until(self, holds: Callable[[], object], timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            logged = (self.folder / "release.log").read_text()[-3000:]
            assert time.monotonic() < deadline, f"never came about; history {self.history()}\n{logged}"
            if hasattr(self, "held"):
                self.refresh()
            time.sleep(0.03)


@pytest.fixture
def deployment(tmp_path: Path, telemetry_config: TelemetryConfig) -> Iterator[Deployment]:
    speaker = Speaker()
    found = Deployment(tmp_path, telemetry_config, speaker)
    yield found
    found.close()
    speaker.close()


def _is(deployment: Deployment, channel: str, version: str) -> Callable[[], bool]:
    return lambda: getattr(deployment.route(), channel, None) == version


def test_at_the_first_start_every_variant_answers_with_its_base(deployment: Deployment) -> None:
    deployment.start()
    deployment.until(deployment.route)
    table = decode_routing(deployment.redis.get(ROUTING_KEY))  # type: ignore[arg-type]
    assert [(route.variant, route.stable, route.previous) for route in table.policies["chat"]] == [
        ("chat-main", deployment.base, deployment.base),
        ("chat-calm", deployment.base, deployment.base),
    ]
    assert [route.temperature for route in table.policies["chat"]] == [0.8, 0.3]
    deployment.until((deployment.folder / "run" / "release.ready").exists)
    ready = json.loads((deployment.folder / "run" / "release.ready").read_text())
    assert ready["metrics_url"].endswith("/metrics")


def test_a_canary_is_promoted_when_users_are_quiet_and_a_user_who_left_has_asked_too(deployment: Deployment) -> None:
    deployment.config.write_text(deployment.config.read_text() + "[release.canary]\nquiet_s = 1.5\n")
    deployment.hold(V1)
    deployment.start()
    deployment.publish(V1, metrics=GOOD_METRICS)
    deployment.until(_is(deployment, "canary", V1))
    for _ in range(8):  # 3 s in which every answer is broken off: no evidence, but no quiet either
        deployment.append(
            events.CompletionServed(
                completion_id=events.new_id(), request_id="r", policy="chat", variant="chat-main",
                version=deployment.base, channel="stable", finish_reason="cancelled",
                completion_tokens=1, ttft_s=0.1, duration_s=1.0,
            )
        )  # fmt: skip
        deployment.refresh()
        time.sleep(0.4)
    for _ in range(8):  # 3 s in which long answers run and further users are refused, which no event tells
        deployment.refresh(answering=deployment.base)
        time.sleep(0.4)
    assert _is(deployment, "canary", V1)()
    deployment.refresh()
    deployment.until(_is(deployment, "stable", V1))
    assert "quiet" in deployment.history()[0]["reason"]


def test_a_published_version_is_probed_shown_and_promoted_and_the_log_tells_all(deployment: Deployment) -> None:
    deployment.hold()
    deployment.start()
    deployment.publish(V1)
    deployment.until(_is(deployment, "shadow", V1))
    time.sleep(0.3)
    assert not [version for version, _ in deployment.speaker.asked if version == V1], "probed before it was ready"
    published_at = time.monotonic()
    deployment.hold(V1)
    deployment.until(_is(deployment, "canary", V1))
    assert time.monotonic() - published_at < 4.0
    deployment.serve(deployment.base, 6, channel="stable")
    deployment.serve(V1, 6)
    deployment.judge(V1, deployment.base, 4)
    deployment.until(_is(deployment, "stable", V1))
    body = next(body for version, body in deployment.speaker.asked if version == V1)
    assert (body["model"], body["preference"], body["probe"]) == (f"chat@{V1}", {"pair": "never"}, "release")
    deployment.until(lambda: len(deployment.announced()) >= 4)
    assert [event.state for event in deployment.announced()] == ["gated", "shadow", "canary", "stable"]
    assert [line["state"] for line in deployment.history()] == ["stable", "canary", "shadow", "gated"]
    assert deployment.history()[0]["evidence"]["win_rate"] == 1.0


def test_a_verdict_appended_again_counts_once(deployment: Deployment) -> None:
    deployment.hold(V1)
    deployment.start()
    deployment.publish(V1)
    deployment.until(_is(deployment, "canary", V1))
    deployment.serve(deployment.base, 6, channel="stable")
    deployment.serve(V1, 6)
    repeated = deployment.verdict(V1, deployment.base)
    for _ in range(6):
        deployment.append(repeated)
    deployment.judge(V1, deployment.base, 2)
    time.sleep(0.5)
    assert _is(deployment, "canary", V1)(), "three verdicts are not the four that a promotion needs"
    deployment.judge(V1, deployment.base, 1)
    deployment.until(_is(deployment, "stable", V1))


class StumblingStore(ReleaseStore):
    """A store whose saves fail while ``is_away``."""

    is_away = False
    failures = 0

    def save(self, saved: Saved, table: RoutingTable, *, commands_taken: int, history: Sequence[HistoryEntry]) -> None:
        if self.is_away:
            self.failures += 1
            raise redis.ConnectionError("away")
        super().save(saved, table, commands_taken=commands_taken, history=history)


def test_evidence_read_before_a_failed_save_is_read_again(deployment: Deployment) -> None:
    deployment.hold(V1)
    store = StumblingStore(deployment.redis, 1.0)
    config = read_table(deployment.config, "release", ReleaseConfig)
    prober = Prober(deployment.speaker.url, config.shadow.prompts, tokens=16, timeout_s=5.0)
    controller = Controller(config, {"tiny": deployment.base}, deployment.log, store, prober)
    stop = threading.Event()
    thread = threading.Thread(target=controller.run, args=(stop, lambda: None))
    thread.start()
    try:
        deployment.publish(V1)
        deployment.until(_is(deployment, "canary", V1))
        store.is_away = True
        deployment.judge(V1, deployment.base, 4)
        deployment.serve(deployment.base, 6, channel="stable")
        deployment.serve(V1, 6)
        deployment.until(lambda: store.failures > 0)
        store.is_away = False
        deployment.until(_is(deployment, "stable", V1))
    finally:
        stop.set()
        thread.join()


def test_a_version_that_babbles_is_rejected_in_its_shadow(deployment: Deployment) -> None:
    deployment.speaker.says[V1] = NONSENSE
    deployment.hold(V1)
    deployment.start()
    deployment.publish(V1)
    deployment.until(lambda: deployment.history() and deployment.history()[0]["state"] == "rejected")
    assert deployment.route() and deployment.route().wanted() == ()  # type: ignore[union-attr]


def test_a_bad_version_forced_to_stable_is_rolled_back_without_any_traffic(deployment: Deployment) -> None:
    deployment.speaker.says[V1] = NONSENSE
    deployment.hold(V1)
    deployment.start()
    deployment.until(lambda: any(version == deployment.base for version, _ in deployment.speaker.asked))
    deployment.publish(V1, metrics={})
    deployment.until(lambda: deployment.history() and deployment.history()[0]["state"] == "rejected")
    deployment.command(command="promote", version=V1, force=True, actor="ann", reason="try it")
    deployment.until(lambda: [line["state"] for line in deployment.history()][:2] == ["rolled_back", "stable"])
    assert deployment.history()[1]["actor"] == "ann"
    assert "degenerate" in deployment.history()[0]["reason"]
    assert deployment.route() and deployment.route().stable == deployment.base  # type: ignore[union-attr]


def test_after_kill_9_it_goes_on_where_it_was_and_tells_nothing_twice(deployment: Deployment) -> None:
    deployment.hold(V1)
    first = deployment.start()
    deployment.publish(V1)
    deployment.until(_is(deployment, "canary", V1))
    revision = deployment.revision()
    first.kill()
    first.wait()
    deployment.serve(deployment.base, 6, channel="stable")
    deployment.serve(V1, 6)
    deployment.judge(V1, deployment.base, 4)
    deployment.start()
    deployment.until(_is(deployment, "stable", V1))
    assert deployment.revision() > revision
    deployment.until(lambda: "stable" in [event.state for event in deployment.announced()])
    assert len({event.event_id for event in deployment.announced()}) == 4


def test_a_restarted_redis_brings_routing_back_and_the_controller_goes_on(
    deployment: Deployment, redis_server: RedisServer
) -> None:
    deployment.hold(V1)
    deployment.start()
    deployment.publish(V1)
    deployment.until(_is(deployment, "canary", V1))
    revision = deployment.revision()
    redis_server.restart()
    assert deployment.revision() >= revision
    deployment.serve(V1, 6)
    deployment.judge(V1, deployment.base, 4)
    deployment.until(_is(deployment, "stable", V1))


def test_a_standby_takes_over_when_the_leader_dies_and_only_one_leads(deployment: Deployment) -> None:
    deployment.hold(V1)
    leader = deployment.start()
    deployment.until(deployment.route)
    deployment.start()
    time.sleep(0.5)
    leader.kill()
    leader.wait()
    deployment.publish(V1)
    deployment.until(_is(deployment, "canary", V1))
    deployment.until(lambda: "canary" in [event.state for event in deployment.announced()])  # told after the table
    time.sleep(0.5)
    assert [event.state for event in deployment.announced()].count("canary") == 1


def test_a_command_that_is_none_is_dropped_and_an_impossible_one_is_in_the_history(deployment: Deployment) -> None:
    deployment.start()
    deployment.until(deployment.route)
    deployment.redis.rpush(COMMANDS_KEY, b"{not json")
    deployment.command(command="promote", version="v000099-deadbeef", force=True)
    deployment.until(lambda: deployment.redis.llen(COMMANDS_KEY) == 0 and deployment.history())
    assert deployment.history()[0]["state"] == "refused"
    assert deployment.announced() == []


def test_sigterm_hands_the_lease_over_and_exits_with_0(deployment: Deployment) -> None:
    process = deployment.start()
    deployment.until((deployment.folder / "run" / "release.ready").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0
    assert deployment.redis.get("tiebreak:releases:leader") is None


def test_an_idle_controller_writes_nothing(deployment: Deployment) -> None:
    deployment.hold()
    deployment.start()
    deployment.until(lambda: sum(version == deployment.base for version, _ in deployment.speaker.asked) >= 8)
    time.sleep(1.5)
    before = deployment.redis.get(STATE_KEY)
    time.sleep(1.5)
    assert deployment.redis.get(STATE_KEY) == before


def test_a_base_without_a_folder_stops_it_with_one_clear_line(deployment: Deployment) -> None:
    text = deployment.config.read_text().replace("[serving.bases.tiny]", "[serving.bases.other]")
    deployment.config.write_text(text)
    assert deployment.start().wait(timeout=20) == 1
    line = json.loads((deployment.folder / "release.log").read_text().splitlines()[-1])
    assert "tiny" in line["message"]


def test_two_versions_in_a_row_leave_the_first_as_the_warm_predecessor(deployment: Deployment) -> None:
    deployment.hold(V1, V2)
    deployment.start()
    deployment.publish(V1)
    deployment.until(_is(deployment, "canary", V1))
    deployment.serve(V1, 6)
    deployment.judge(V1, deployment.base, 4)
    deployment.until(_is(deployment, "stable", V1))
    deployment.publish(V2, parent=V1)
    deployment.until(_is(deployment, "canary", V2))
    deployment.serve(V2, 6)
    deployment.judge(V2, V1, 4)
    deployment.until(_is(deployment, "stable", V2))
    deployment.serve(V2, 6, channel="stable", repetition_ratio=0.9)
    deployment.until(lambda: deployment.route() and deployment.route().stable != V2)  # type: ignore[union-attr]
    assert deployment.history()[0]["state"] == "rolled_back"
