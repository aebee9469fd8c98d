"""The short crash sweep: a process killed at every named point, every other fault once. Long: ``make chaos``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.kafka.broker import Broker
from telemetry.crashpoints import POINTS
from tests.chaos.deployment import deployed
from tests.chaos.sweep import BROKER_FREEZE, BROKER_KILL, DISK_FULL, FREEZE, KILL, REDIS_KILL, Settings, Sweep

pytestmark = pytest.mark.timeout(420)
SHORT = Settings(freeze_s=1.0, broker_down_s=1.0, broker_freeze_s=4.0, redis_down_s=0.5, disk_full_s=1.0, pause_s=0.15)
OTHERS = (
    ("trainer.checkpointed", FREEZE),
    ("producer.acknowledged", BROKER_KILL),
    ("recorder.committed", BROKER_FREEZE),
    ("router.verdict_durable", REDIS_KILL),
    ("recorder.read", DISK_FULL),
)
WRITES_PER_S = 150


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    found = Broker(tmp_path / "kafka")
    found.start()
    yield found
    found.kill()


def test_nothing_acknowledged_is_lost_or_counts_twice_wherever_a_process_ends(broker: Broker, tmp_path: Path) -> None:
    with deployed(tmp_path, broker, writes_per_second=WRITES_PER_S) as deployment:
        sweep = Sweep(deployment, SHORT)
        sweep.run([(point, KILL) for point in POINTS] + list(OTHERS))
        found = sweep.findings()
        assert found.is_clean, {kind: sorted(getattr(found, kind))[:5] for kind in found.faults()}
        assert sweep.done[KILL] == len(POINTS), f"not reached: {sweep.missed}\n{deployment.said()}"
        has_disk = deployment.has_own_disk
        assert sum(sweep.done.values()) == len(POINTS) + len(OTHERS) - (not has_disk), f"not reached: {sweep.missed}"
        assert found.acknowledged > 1000
        assert len(sweep.verdicts.acknowledged) > 100


def test_a_recorder_that_commits_its_offsets_first_is_caught(broker: Broker, tmp_path: Path) -> None:
    wrong = "tests.chaos.wrong_recorder"
    with deployed(tmp_path, broker, writes_per_second=WRITES_PER_S, recorder=wrong) as deployment:
        sweep = Sweep(deployment, Settings(pause_s=0.15, stalled_s=6.0))
        sweep.run([("recorder.topic_committed", KILL)] * 3)
        time.sleep(1.0)
        assert sweep.findings().lost, "a checker that misses this proves nothing"
