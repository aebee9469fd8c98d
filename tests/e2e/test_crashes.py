"""``kill -9`` during clicks: the launcher restarts what died, and every acknowledged verdict is in the store once."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tests.e2e.stack import RunningStack, survivors

pytestmark = pytest.mark.timeout(600)
CLICKS = 24
RECOVERY_S = 120.0


def killed_during_clicks(stack: RunningStack, pids: list[int], seed: int) -> list[str]:
    """Kill ``pids`` while verdicts come in; the ids that were acknowledged."""
    assert pids

    def kill() -> None:
        time.sleep(0.5)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    ids = stack.clicks(CLICKS, seed=seed)
    killer.join()
    return ids


def assert_stored_once(stack: RunningStack, ids: list[str]) -> None:
    assert len(set(ids)) == CLICKS
    stack.wait_for(lambda: set(ids) <= set(stack.stored()), RECOVERY_S, "every acknowledged verdict is stored")
    stored = stack.stored()
    assert {each: stored[each] for each in ids if stored[each] != 1} == {}


PROCESSES = ("trainer", "recorder", "redis", "router", "release", "serving")


@pytest.mark.parametrize("name", PROCESSES)
def test_a_killed_process_is_restarted_and_no_verdict_is_lost(tiny_stack: RunningStack, name: str) -> None:
    tiny_stack.wait_for(tiny_stack.is_ready, RECOVERY_S, "ready")
    before = tiny_stack.restarts(name)
    ids = killed_during_clicks(tiny_stack, [tiny_stack.pid(name)], PROCESSES.index(name))
    tiny_stack.wait_for(lambda: tiny_stack.restarts(name) > before, RECOVERY_S, f"{name} is restarted")
    tiny_stack.wait_for(tiny_stack.is_ready, RECOVERY_S, "ready")
    assert_stored_once(tiny_stack, ids)


def test_a_killed_replica_is_replaced_and_no_verdict_is_lost(tiny_stack: RunningStack) -> None:
    tiny_stack.wait_for(tiny_stack.is_ready, RECOVERY_S, "ready")
    victims = tiny_stack.replicas()
    ids = killed_during_clicks(tiny_stack, victims, seed=9)
    tiny_stack.wait_for(lambda: bool(set(tiny_stack.replicas()) - set(victims)), RECOVERY_S, "another replica")
    assert_stored_once(tiny_stack, ids)


def test_training_goes_on_after_the_crashes(tiny_stack: RunningStack) -> None:
    ids = tiny_stack.clicks(12, seed=10)
    tiny_stack.wait_for(
        lambda: any({"trained", "live"} & tiny_stack.stages(each).keys() for each in ids), RECOVERY_S, "trained"
    )


def test_children_of_a_killed_launcher_end_by_themselves(tiny_stack: RunningStack) -> None:
    """The last test on this stack: nothing is left of it afterwards."""
    family = tiny_stack.family()
    assert len(family) > 6
    tiny_stack.launcher.send_signal(signal.SIGKILL)
    assert tiny_stack.launcher.wait(10) == -signal.SIGKILL
    assert survivors(family, timeout_s=40.0) == []
