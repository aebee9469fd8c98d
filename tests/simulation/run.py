"""One seed: random steps of users, router, recorder and trainer with faults; then calm, and everything must add up."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import msgspec
from opentelemetry.trace import INVALID_SPAN
from redis.exceptions import RedisError

import online_trainer.trainer as training
import router.claims as claiming
import router.ledger as ledgering
import router.preferences as judging
import telemetry.events as events
import telemetry.recorder as recording
import telemetry.store as storing
from online_trainer.ingest import reason_to_drop
from router.admission import OPEN_CALLER
from router.claims import Claims
from router.errors import Conflict, RouterError
from router.ledger import Ledger
from router.pairs import PAIR_KEY, PairMemory, RememberedPair, Ticket, preference_id, sign_ticket
from router.preferences import Preferences
from router.schema import VerdictRequest
from telemetry import tracing
from telemetry.events import PREFERENCES, VERSIONS, PreferenceRecorded, PreferenceRetracted
from telemetry.receipts import Receipts, receipt_key
from telemetry.recorder import Recorder
from tests import examples
from tests.router_stack import PLAIN
from tests.simulation.parts import (
    Checkpoints,
    Crash,
    FakeRedis,
    Log,
    MemoryStore,
    Outbox,
    SimulatedTrainer,
    SyncRedis,
    Versions,
    World,
)

KEY = b"k" * 32
STEPS, PAIRS = 90, 8
OTHER = {"a": "b", "b": "tie", "tie": "a"}
LEASE_S = 2.0
FOR_EVER_S = 1e9


class Broken(AssertionError):
    """An invariant does not hold; the message names it, and the seed shows it again."""


class Shown(msgspec.Struct, frozen=True):
    """A pair, and what its user knows of it."""

    choice: str
    token: str
    preference_id: str


class Simulation:
    """The parts of one deployment, and what its users know."""

    def __init__(self, seed: int, loop: asyncio.AbstractEventLoop) -> None:
        self.seed, self.world, self._loop = seed, World(seed), loop
        self.log = Log(self.world)
        self.redis = FakeRedis(self.world)
        self.store = MemoryStore(self.world)
        self.disk, self.versions = Checkpoints(self.world), Versions(self.world)
        self.shown: dict[str, Shown] = {}  # by pair id
        self.tried: set[str] = set()
        self.answered: set[str] = set()  # that there is a verdict, and another one
        self.acknowledged: dict[str, str] = {}  # preference id → the choice that was acknowledged

    def start(self) -> None:
        """All three processes."""
        self.start_router()
        self.start_recorder()
        self.start_trainer()

    # ---- processes ---------------------------------------------------------------------------------------------

    def start_router(self) -> None:
        redis: Any = self.redis
        nothing: Any = None
        outbox: Any = Outbox(self.log)
        ledger = Ledger(outbox, redis, nothing, nothing, PLAIN, completion_ttl_s=60)
        pairs = PairMemory(redis, nothing, 3600)
        self.claims = Claims(redis, ledger, ttl_s=3600, lease_s=LEASE_S, embedded_log=False)
        self.router = Preferences(
            key=KEY, private=PLAIN, pairs=pairs, ledger=ledger, claims=self.claims,
            book=cast(Any, SimpleNamespace(status=_accepted)), lease_s=LEASE_S,
        )  # fmt: skip

    def start_recorder(self) -> None:
        self.store.start()
        receipts = Receipts(cast(Any, SyncRedis(self.redis)))
        self.recorder = Recorder(cast(Any, self.log), "", receipts, batch_entries=8, flush_s=0.0)
        self._guarded("recorder", lambda: self.recorder._catch_up(self.store))
        self.reader = self.log.reader(events.TOPICS, self.store.offsets())

    def start_trainer(self) -> None:
        self.trainer = SimulatedTrainer(self.world, self.log, self.disk, self.versions)
        self.trainer_reader = self.log.reader((PREFERENCES, VERSIONS), self.trainer._intake.state().offsets)
        self._guarded("trainer", self.trainer.tell)

    def _guarded(self, name: str, act: Any) -> None:
        """``act``, after which the process starts again if it crashed or lost its log."""
        try:
            act()
        except (Crash, events.InvalidEvent, storing.StoreContended) as error:
            self.world.note("ends", name, type(error).__name__)
            self._again(name)
        except Exception as error:
            if type(error).__name__ != "LogUnavailable":
                raise
            self.world.note("waits", name)
            self._again(name)

    def _again(self, name: str) -> None:
        {"recorder": self.start_recorder, "trainer": self.start_trainer, "router": self.start_router}[name]()

    # ---- what happens ------------------------------------------------------------------------------------------

    def run(self) -> None:
        dice = self.world.dice
        acts = (self.show, self.click, self.click, self.click, self.retract, self.record, self.train, self.wait)
        for _ in range(STEPS):
            self.world.seconds += dice.random() * 0.7
            dice.choice(acts)()
        self.world.is_calm = True
        for pair_id in sorted(self.shown):
            if self.shown[pair_id].preference_id in self.acknowledged:
                continue  # who was told that it is recorded does not click again
            self.world.seconds += 2 * LEASE_S
            self._click(pair_id)
        for _ in range(30):
            self.world.seconds += 2.0
            self.record()
            self.train()

    def wait(self) -> None:
        self.world.seconds += self.world.dice.random() * 4

    def show(self) -> None:
        if len(self.shown) >= PAIRS:
            return
        number = len(self.shown)
        pair = msgspec.structs.replace(examples.pair(number), event_id=f"shown-{number}", occurred_at=self.world.now())
        remembered = msgspec.json.encode(RememberedPair(pair, ""))
        self.redis.values[PAIR_KEY + pair.pair_id] = (remembered, FOR_EVER_S)
        choice = self.world.dice.choice(("a", "b", "a", "b", "tie"))
        token = sign_ticket(KEY, Ticket(pair.pair_id, pair.user, FOR_EVER_S))
        self.shown[pair.pair_id] = Shown(choice, token, preference_id(pair.pair_id))

    def click(self) -> None:
        """Somebody clicks, maybe again, maybe twice at once."""
        if self.shown:
            pair_id = self.world.dice.choice(sorted(self.shown))
            self._click(pair_id, times=1 + self.world.happens(0.2))

    def _click(self, pair_id: str, *, times: int = 1) -> None:
        shown = self.shown[pair_id]
        name = shown.preference_id
        self.tried.add(name)
        choices = [OTHER[shown.choice] if self.world.happens(0.1) else shown.choice for _ in range(times)]
        bodies = [VerdictRequest(pair_id=pair_id, token=shown.token, choice=cast(Any, each)) for each in choices]

        async def clicks() -> list[Any]:
            answers = await asyncio.gather(*(_outcome(self.router.record(body, OPEN_CALLER)) for body in bodies))
            while self.router._ledger._background:
                await asyncio.gather(*self.router._ledger._background, return_exceptions=True)
            return answers

        for said, answer in zip(choices, self._loop.run_until_complete(clicks()), strict=True):
            if isinstance(answer, Crash):
                self._again("router")
            elif isinstance(answer, Conflict):  # the other choice was first
                self.world.note("conflict", name)
                self.answered.add(name)
            elif isinstance(answer, BaseException):
                self.world.note("refused", name, type(answer).__name__)
            else:
                self.world.note("acknowledged", name, answer.replayed, said)
                self.acknowledged.setdefault(name, said)
                if self.acknowledged[name] != said:
                    raise Broken(f"seed {self.seed}: {name} was acknowledged as {said} and before as another")

    def retract(self) -> None:
        """A verdict is taken back: an event like any other; sometimes it overtakes its verdict."""
        if not self.world.happens(0.3) or not self.shown:
            return
        pair_id = self.world.dice.choice(sorted(self.shown))
        event = PreferenceRetracted(
            event_id=f"retracted-{pair_id}", occurred_at=self.world.now(), pair_id=pair_id, user="u",
            preference_id=self.shown[pair_id].preference_id,
        )  # fmt: skip
        self.log.append(PREFERENCES, pair_id, events.encode(event))

    def record(self) -> None:
        def step() -> None:
            if entries := self.reader.poll(max_entries=8, timeout_s=0.0):
                self.recorder._record(self.store, entries)

        self._guarded("recorder", step)

    def train(self) -> None:
        self._guarded("trainer", lambda: self.trainer.turn(cast(Any, self.trainer_reader), timeout_s=0.0))

    # ---- what must hold ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise Broken for what does not add up."""
        rows = [row for table in self.store.tables.values() for row in cast(Any, table).rows]
        counts = Counter(row["event_id"] for row in rows)
        given = {row["event_id"]: row for row in rows if row["type"] == PreferenceRecorded.__name__}
        self._must("no event is stored twice", [name for name, count in counts.items() if count > 1])
        self._must("every acknowledged verdict is stored", self.acknowledged.keys() - given.keys())
        self._must("no verdict is stored that nobody gave", given.keys() - self.tried)
        self._must("every verdict was acknowledged in the end", self.tried - self.acknowledged.keys() - self.answered)
        decoded = {name: events.decode(row["event"].encode()) for name, row in given.items()}
        wrong = [n for n, said in self.acknowledged.items() if n in given and not _is(decoded[n], said)]
        self._must("what was acknowledged is what is stored", wrong)
        self._must("every stored verdict has its receipt", [n for n in given if not self._has_receipt(n)])
        self._check_training(decoded)

    def _check_training(self, given: dict[str, Any]) -> None:
        learned = Counter(self.trainer.weights.learned)
        self._must("no verdict is in the weights twice", [name for name, count in learned.items() if count > 1])
        told = [row for row in cast(Any, self.store.tables[VERSIONS]).rows if row["type"] == "BatchTrained"]
        named = Counter(name for row in told for name in row["preference_ids"])
        again = self.world.unlearned  # once more, or dropped after the second time
        self._must("no verdict is told as trained twice", [n for n, count in named.items() if count > 1 + (n in again)])
        self._must("what is told as trained is what the weights know", (set(named) ^ set(learned)) - again)
        usable = {name for name, event in given.items() if reason_to_drop(event, 0.1) is None}
        taken_back = {e.preference_id for e in self._log_events(PREFERENCES) if isinstance(e, PreferenceRetracted)}
        dropped = {name for row in told for name, why in _drops(row) if why == "refused"}
        self._must("what can be learned is learned, or taken back", usable - learned.keys() - taken_back - dropped)
        self._must("nothing is refused that was not lost", dropped - again)
        self._must("nothing else is learned", learned.keys() - usable)
        published = [e for e in self._log_events(VERSIONS) if type(e).__name__ == "VersionPublished"]
        self._must("every version is announced", set(self.versions.versions) - {e.version for e in published})

    def _log_events(self, topic: str) -> Iterator[Any]:
        for (name, _), stored in self.log.entries.items():
            if name == topic:
                yield from (events.decode(payload) for _, payload in stored)

    def _has_receipt(self, name: str) -> bool:
        fields = self.redis.hashes.get(receipt_key(name), {})
        return b"accepted_at" in fields and b"stored_at" in fields

    def _must(self, what: str, but: Any) -> None:
        if but:
            raise Broken(f"seed {self.seed}: {what}, but {sorted(but)[:3]}")

    def digest(self) -> str:
        """Of everything that happened and of everything that is left."""
        rows = {
            name: [(row["event_id"], row["partition"], row["offset"], row["event"]) for row in cast(Any, table).rows]
            for name, table in self.store.tables.items()
        }
        left = json.dumps([self.world.trace, rows, self.trainer.weights.learned], default=str)
        return hashlib.sha256(left.encode()).hexdigest()


def _drops(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    event = events.decode(row["event"].encode())
    assert isinstance(event, events.BatchTrained)
    return event.dropped


def _is(event: Any, choice: str) -> bool:
    return event.chosen_position == (choice if choice in "ab" else "") and (event.outcome == "tie") == (choice == "tie")


async def _accepted(_: str) -> str:
    return "accepted"


async def _outcome(asked: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await asked
    except (Crash, RouterError, RedisError, OSError) as error:
        return error


@contextmanager
def simulated(simulation: Simulation) -> Iterator[None]:
    """Clocks, dice, crash points and checkpoints of the product are the simulation's."""
    world = simulation.world
    ids = random.Random(simulation.seed + 1)

    async def sleep(seconds: float) -> None:
        world.seconds += seconds

    clock = SimpleNamespace(
        monotonic=lambda: world.seconds, perf_counter=lambda: world.seconds, time=lambda: world.seconds
    )
    waiting = SimpleNamespace(**{name: getattr(asyncio, name) for name in ("gather", "wait", "Task", "create_task")})
    waiting.sleep = sleep
    changes: list[tuple[Any, str, Any]] = [
        (module, "reach", world.reach) for module in (claiming, ledgering, judging, recording, storing, training)
    ]
    changes += [(judging, "time", clock), (judging, "asyncio", waiting), (claiming, "asyncio", waiting)]
    changes += [(ledgering, "asyncio", waiting), (judging, "utc_now", world.now), (storing, "utc_now", world.now)]
    changes += [(training, "checkpoint", simulation.disk.module())]
    changes += [(events, "random_bytes", ids.randbytes), (events, "time", SimpleNamespace(time_ns=world.nanoseconds))]
    changes += [(events, "datetime", SimpleNamespace(now=lambda _: world.now()))]
    changes += [(tracing, "ids", lambda _: ("", "")), (tracing, "span", lambda *_, **__: nullcontext(INVALID_SPAN))]
    kept = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def run_seed(seed: int, loop: asyncio.AbstractEventLoop) -> str:
    """Run one seed; its digest. Raises Broken."""
    simulation = Simulation(seed, loop)
    with simulated(simulation):
        simulation.start()
        simulation.run()
        simulation.check()
        return simulation.digest()
