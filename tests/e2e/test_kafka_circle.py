"""The same loop on Kafka: ``deploy/kafka.toml`` against a real broker, which is killed and comes back."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from deploy.kafka.broker import Broker
from tests.e2e.stack import ROOT, TINY, RunningStack, running_stack, survivors

pytestmark = pytest.mark.timeout(600)
LIVE_LIMIT_S = 120.0


@pytest.fixture(scope="module")
def kafka_stack(kafka_broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """``tiebreak up`` with kafka.toml's log, on the tiny model."""
    document = tomllib.loads(TINY.read_text())
    telemetry = tomllib.loads((ROOT / "deploy" / "kafka.toml").read_text())["telemetry"]
    telemetry |= {"kafka_bootstrap": kafka_broker.bootstrap, "kafka_topic_prefix": f"e{uuid.uuid4().hex[:8]}."}
    config = Path(tmp_path_factory.mktemp("config")) / "kafka.toml"
    config.write_text(tomli_w.dumps({**document, "telemetry": telemetry}))
    with running_stack(config) as stack:
        yield stack


def test_a_click_on_kafka_is_stored_trained_on_and_live(kafka_stack: RunningStack) -> None:
    ids = kafka_stack.clicks(24)

    def is_live() -> bool:
        kafka_stack.clicks(1)
        return any("live" in kafka_stack.stages(each) for each in ids)

    kafka_stack.wait_for(is_live, LIVE_LIMIT_S, "a click is live")
    stored = kafka_stack.stored()
    assert {each: stored[each] for each in ids if stored[each] != 1} == {}


def test_verdicts_given_while_the_broker_is_away_are_stored_once_it_is_back(
    kafka_stack: RunningStack, kafka_broker: Broker
) -> None:
    ids: list[str] = []
    users = threading.Thread(target=lambda: ids.extend(kafka_stack.clicks(24, seed=1)))
    users.start()
    time.sleep(0.5)
    kafka_broker.kill()
    time.sleep(3.0)
    kafka_broker.start()  # from this thread: the broker ends with the one that started it
    users.join()
    assert len(set(ids)) == 24
    kafka_stack.wait_for(lambda: set(ids) <= set(kafka_stack.stored()), LIVE_LIMIT_S, "every verdict is stored")
    stored = kafka_stack.stored()
    assert {each: stored[each] for each in ids if stored[each] != 1} == {}


def test_sigterm_stops_everything_that_was_started_and_nothing_else(kafka_stack: RunningStack) -> None:
    """The last test on this stack."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        family = kafka_stack.family()
        assert len(family) > 6
        assert kafka_stack.stop() == 0, kafka_stack.said()
        assert survivors(family, timeout_s=3.0) == []
        assert kafka_stack.output.read_text().rstrip().endswith("stopped"), "a child had to be killed"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
