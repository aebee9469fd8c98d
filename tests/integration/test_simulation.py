"""The simulation holds over many seeds, is the same bytes each time, and finds what is planted."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

import router.preferences as judging
from online_trainer.trainer import Trainer
from router.preferences import Preferences
from telemetry.events import new_id
from tests.simulation import parts
from tests.simulation.run import Broken, run_seed

SEEDS, ENOUGH = 300, 400


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    logging.disable(logging.CRITICAL)
    found = asyncio.new_event_loop()
    yield found
    found.close()
    logging.disable(logging.NOTSET)


def test_everything_adds_up_whatever_fails(loop: asyncio.AbstractEventLoop) -> None:
    for seed in range(SEEDS):
        run_seed(seed, loop)


def test_a_seed_is_the_same_bytes_each_time_also_in_another_process(loop: asyncio.AbstractEventLoop) -> None:
    here = [run_seed(seed, loop) for seed in range(12)]
    assert here == [run_seed(seed, loop) for seed in range(12)]
    assert len(set(here)) == 12
    script = (
        "import asyncio; from tests.simulation.run import run_seed; loop = asyncio.new_event_loop();"
        "print(*(run_seed(seed, loop) for seed in range(12)))"
    )
    environ = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == here


def offsets_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder commits where it has read to before what it has read."""

    def commit(self: parts.MemoryTable, rows: list[dict[str, Any]], reached: Mapping[int, int]) -> None:
        self.offsets |= reached
        self._world.reach("store.committing")
        self.rows += rows

    monkeypatch.setattr(parts.MemoryTable, "_commit", commit)


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder does not know which events it has."""
    monkeypatch.setattr(parts.MemoryTable, "_remember", lambda *_: None)
    monkeypatch.setattr(parts.MemoryTable, "start", lambda self: setattr(self, "_seen", {}))


def waiting_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint has the offsets, and not the verdicts that wait."""
    import msgspec

    state = Trainer._state

    def without(self: Trainer) -> Any:
        found = state(self)
        return msgspec.structs.replace(found, intake=msgspec.structs.replace(found.intake, pending=()))

    monkeypatch.setattr(Trainer, "_state", without)


def told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer tells what it did before the checkpoint that holds it."""
    commit = Trainer._commit

    def early(self: Trainer, events: Any) -> None:
        for event in events:
            from telemetry.events import TOPIC_OF, encode, key_of

            self._log.append(TOPIC_OF[type(event)], key_of(event), encode(event))
        commit(self, events)

    monkeypatch.setattr(Trainer, "_commit", early)


def acknowledged_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router acknowledges a verdict that the log refused."""
    append = Preferences._append

    async def careless(self: Preferences, claim: Any) -> Any:
        try:
            return await append(self, claim)
        except judging.RouterError:
            return judging._acknowledged(claim, "log")

    monkeypatch.setattr(Preferences, "_append", careless)


def another_name_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict that is sent again is another event."""
    judged = judging.judged
    monkeypatch.setattr(judging, "judged", lambda *a, **k: judged(*a, **(k | {"event_id": new_id()})))


def last_choice_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later click with another choice takes the place of the first."""
    claim = parts.FakeRedis._claim

    async def overwriting(self: parts.FakeRedis, *, keys: list[str], args: list[Any]) -> Any:
        self.hashes.setdefault(keys[0], {})[b"claim"] = args[0]
        return await claim(self, keys=keys, args=args)

    monkeypatch.setattr(parts.FakeRedis, "_claim", overwriting)


@pytest.mark.parametrize(
    "plant",
    [
        last_choice_wins,
        offsets_first,
        forgetful,
        waiting_left_out,
        told_first,
        acknowledged_unread,
        another_name_each_time,
    ],
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(Broken):
        for seed in range(ENOUGH):
            run_seed(seed, loop)
