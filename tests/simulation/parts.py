"""What stands in for disks, servers and gradients; everything that decides is the product's own code.

The log, Redis, the store's files, checkpoints and the version store are kept in memory and survive a crash. A crash
is an exception that nobody catches, raised at a named crash point or where a server is called.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from online_trainer import checkpoint
from online_trainer import trainer as training
from online_trainer.annotators import Annotators
from online_trainer.checkpoint import TrainerState
from online_trainer.config import TrainerConfig
from online_trainer.ingest import IntakeState, Verdict
from online_trainer.learner import Example, Lesson
from online_trainer.lineage import Lineage
from online_trainer.publish import Draft, derived_id
from online_trainer.tracking import Nobody
from online_trainer.trainer import Trainer
from router.claims import CLAIM, MARK
from telemetry.event_log import Entry, LogUnavailable, Offsets, Position
from telemetry.events import TOPICS, VERSIONS, AnyEvent, VersionPublished, decode
from telemetry.manifest import base_version
from telemetry.outbox import Durable
from telemetry.rows import TABLE_OF
from telemetry.sealing import Sealer
from telemetry.store import Store, Table

START = datetime(2026, 1, 1, tzinfo=UTC)
PARTITIONS = 2
DIGEST = "ab" * 32


class Crash(BaseException):
    """The process ends here."""


class World:
    """The seed's dice, its clock, what has happened, and how likely faults are."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.seconds = 0.0
        self.trace: list[str] = []
        self.is_calm = False  # the end: no faults any more
        self.unlearned: set[str] = set()  # verdicts that weights knew which went astray

    def now(self) -> datetime:
        return START + timedelta(seconds=self.seconds)

    def nanoseconds(self) -> int:
        """Since 1970."""
        return int(self.now().timestamp() * 1e9)

    def note(self, *words: object) -> None:
        self.trace.append(" ".join(map(str, words)))

    def happens(self, probability: float) -> bool:
        return not self.is_calm and self.dice.random() < probability

    def reach(self, point: str) -> None:
        """Every crash point of the product."""
        if self.happens(0.03):
            self.note("crash", point)
            raise Crash(point)


class Log:
    """An event log whose appends fail before, or after, they are durable."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.entries: dict[tuple[str, int], list[tuple[str, bytes]]] = {}

    def append(self, topic: str, key: str, payload: bytes) -> Future[Position]:
        done: Future[Position] = Future()
        world = self._world
        if world.happens(0.05):
            world.note("append refused", topic)
            done.set_exception(LogUnavailable("not written"))
            return done
        partition = 0 if topic == VERSIONS else zlib.crc32(key.encode()) % PARTITIONS
        stored = self.entries.setdefault((topic, partition), [])
        stored.append((key, payload))
        world.note("appended", topic, partition, len(stored) - 1, zlib.crc32(payload))
        if world.happens(0.05):
            world.note("answer lost", topic)
            done.set_exception(LogUnavailable("written, and the answer was lost"))
        else:
            done.set_result(Position(topic, partition, len(stored) - 1))
        return done

    def append_all(self, entries: Iterable[tuple[str, str, bytes]]) -> list[Future[Position]]:
        return [self.append(*entry) for entry in entries]

    def reader(self, topics: Sequence[str], start: Offsets) -> Reader:
        return Reader(self, topics, start)

    def close(self) -> None:
        """Nothing to free."""


class Outbox:
    """The router's way to the log, without a disk of its own: what the log refuses, its client has to send again."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def append(self, topic: str, key: str, payload: bytes) -> Future[Durable]:
        appended, done = self._log.append(topic, key, payload), Future[Durable]()
        if error := appended.exception():
            done.set_exception(error)
        else:
            done.set_result(Durable("log", appended.result()))
        return done


class Reader:
    """A cursor that gives a random number of entries of each partition."""

    def __init__(self, log: Log, topics: Sequence[str], start: Offsets) -> None:
        self._log, self._topics = log, topics
        self._next = {(t, p): offset for t, partitions in start.items() for p, offset in partitions.items()}

    def poll(self, *, max_entries: int, timeout_s: float) -> list[Entry]:
        found: list[Entry] = []
        world = self._log._world
        for topic in self._topics:
            for partition in range(PARTITIONS):
                place = topic, partition
                stored, at = self._log.entries.get(place, ()), self._next.get(place, 0)
                if at >= len(stored):
                    continue
                end = len(stored) if world.is_calm else min(len(stored), at + world.dice.randrange(6))
                for offset in range(at, end):
                    key, payload = stored[offset]
                    found.append(Entry(Position(topic, partition, offset), key, payload))
                self._next[place] = end
        return found

    def lag(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing to free."""


class MemoryTable(Table):
    """A table whose commits are kept in memory, each whole or not at all."""

    def __init__(self, world: World, topic: str) -> None:
        self._world, self.topic, self.name = world, topic, TABLE_OF[topic]
        self.rows: list[dict[str, Any]] = []
        self.offsets: dict[int, int] = {}
        self.start()

    def start(self) -> None:
        """What a recorder that starts knows."""
        self._seen = dict.fromkeys(row["event_id"] for row in self.rows)

    def next_offsets(self) -> dict[int, int]:
        return dict(self.offsets)

    def _commit(self, rows: list[dict[str, Any]], reached: Mapping[int, int]) -> None:
        self._world.reach("store.committing")
        self.rows += rows
        self.offsets |= reached

    def events(self, start: Mapping[int, int], *, in_order: bool = False) -> Iterator[tuple[AnyEvent, datetime]]:
        for row in self.rows:
            if row["offset"] >= start.get(row["partition"], 0):
                yield decode(row["event"].encode()), row["recorded_at"]


class MemoryStore(Store):
    """Every topic's table."""

    def __init__(self, world: World) -> None:
        self.tables = {topic: MemoryTable(world, topic) for topic in TOPICS}  # type: ignore[misc]

    def start(self) -> None:
        for table in self.tables.values():
            assert isinstance(table, MemoryTable)
            table.start()


class FakeRedis:
    """What router and receipts ask of Redis, in one dictionary; calls fail now and then, after or before they took."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.hashes: dict[str, dict[bytes, bytes]] = {}
        self.values: dict[str, tuple[bytes, float]] = {}  # value, and when it ends
        self._scripts = {CLAIM.digest: self._claim, MARK.digest: self._mark}

    # asyncio client --------------------------------------------------------------------------------------------

    async def command(self, words: tuple[Any, ...]) -> Any:
        """One of those that gather."""
        match words[0]:
            case "EVALSHA":
                script, first = self._scripts[words[1]], 3 + words[2]
                return await script(keys=list(words[3:first]), args=list(words[first:]))
            case "GET":
                return await self.get(words[1])
            case "HGET":
                return await self.hget(words[1], words[2])
        raise AssertionError(f"the simulation's Redis does not know {words[0]}")

    async def _claim(self, *, keys: list[str], args: list[Any]) -> tuple[bytes, bytes, int, bytes]:
        """``CLAIM`` for a log that is not this Redis."""
        verdict, lock = keys[:2]
        found = self.hashes.setdefault(verdict, {})
        kept = found.setdefault(b"claim", args[0])
        if kept == args[0]:
            kept = b""
        if durable := found.get(b"durable"):
            return kept, durable, 0, b""
        is_free = self._get(lock) is None
        if is_free:
            self.values[lock] = (b"1", self.world.seconds + args[2] / 1000)
        self.hashes.setdefault(keys[2], {}).setdefault(args[4].encode(), args[5].encode())
        self._trouble()
        return kept, b"", int(is_free), b""

    async def _mark(self, *, keys: list[str], args: list[str]) -> None:
        """``MARK``."""
        self._trouble()
        each = len(args) * 3 // len(keys)
        for n, (verdict, lock, receipt) in enumerate(zip(keys[::3], keys[1::3], keys[2::3], strict=True)):
            own = args[n * each : (n + 1) * each]
            lines = self.hashes.setdefault(receipt, {})
            for name, value in zip(own[::2], own[1::2], strict=True):
                lines.setdefault(name.encode(), value.encode())
            self.hashes.setdefault(verdict, {})[b"durable"] = own[-1].encode()
            self.values.pop(lock, None)
        self._trouble()

    def _get(self, key: str) -> bytes | None:
        value, ends = self.values.get(key, (b"", 0.0))
        return value if ends > self.world.seconds else None

    def _trouble(self) -> None:
        if self.world.happens(0.02):
            self.world.note("redis away")
            raise ConnectionError("Redis is away")

    async def get(self, key: str) -> bytes | None:
        self._trouble()
        return self._get(key)

    async def hget(self, key: str, field: str) -> bytes | None:
        self._trouble()
        return self.hashes.get(key, {}).get(field.encode())

    async def delete(self, key: str) -> None:
        self._trouble()
        self.values.pop(key, None)

    def pipeline(self, *, transaction: bool) -> Any:
        return Commands(self)


class Commands:
    """Commands that gathered: each fails alone."""

    def __init__(self, server: FakeRedis) -> None:
        self._server = server
        self._asked: list[tuple[Any, ...]] = []

    def execute_command(self, *words: Any) -> None:
        self._asked.append(words)

    async def execute(self, *, raise_on_error: bool) -> list[Any]:
        found: list[Any] = []
        for words in self._asked:
            try:
                found.append(await self._server.command(words))
            except ConnectionError as error:
                found.append(error)
        return found


class SyncRedis:
    """The blocking client that receipts use."""

    def __init__(self, server: FakeRedis) -> None:
        self._server = server

    def hgetall(self, key: str) -> dict[bytes, bytes]:
        return self._server.hashes.get(key, {})

    def pipeline(self, *, transaction: bool) -> SyncRedis:
        return self

    def hsetnx(self, key: str, name: str, value: str) -> None:
        self._server.hashes.setdefault(key, {}).setdefault(name.encode(), value.encode())

    def hset(self, key: str, *, mapping: Mapping[str, str]) -> None:
        fields = {name.encode(): value.encode() for name, value in mapping.items()}
        self._server.hashes.setdefault(key, {}).update(fields)

    def sadd(self, key: str, *members: str) -> None:
        self._server.hashes.setdefault(key, {}).update({member.encode(): b"" for member in members})

    def execute(self) -> None:
        if self._server.world.happens(0.02):
            raise Crash("recorder while it projects")


class Weights:
    """A policy and its learner: the weights are the verdicts that they learned, in order."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.learned: list[str] = []
        self.step = 0
        self.optimizer = None
        self.anchor, self.flips = None, 0.0

    def tensors(self) -> dict[str, Any]:
        return {"learned": list(self.learned)}

    def load(self, tensors: Mapping[str, Any]) -> None:
        self.learned = list(tensors["learned"])

    def reset(self) -> None:
        self.learned = []

    def weights_replaced(self) -> None:
        """There is no optimizer."""

    def anchor_at(self, tensors: Mapping[str, Any] | None) -> None:
        """Nothing is measured against anything."""

    def learn(self, examples: Sequence[Example], *, is_rehearsal: bool) -> Lesson:
        names = [example.preference_id for example in examples]
        self.step += 1
        self.learned += names
        self._world.note("learned", *names)
        return Lesson({"kl": 0.0, "rewards/margins": 0.0}, dict.fromkeys(names, 0.5))

    def shuffled(self, earlier: Sequence[Any]) -> list[Any]:
        return list(earlier)

    def is_at_the_edge(self) -> bool:
        return False


class Examples:
    """A verdict's name is all that is learned of it."""

    def of(self, verdicts: Sequence[Verdict]) -> list[Example]:
        return [Example(verdict.preference_id, None) for verdict in verdicts]  # type: ignore[arg-type]

    def keep(self, preference_ids: object) -> None:
        """Nothing is kept."""


class Versions:
    """The version store: a folder that appears whole."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.versions: dict[str, tuple[Draft, dict[str, Any]]] = {}

    def write(self, draft: Draft, tensors: dict[str, Any]) -> tuple[str, Draft]:
        self._world.reach("publisher.staged")
        name = f"v{len(self.versions) + 1:06d}-{len(self.versions) + 1:08x}"
        self.versions[name] = (draft, tensors)
        return name, draft

    def read(self, version: str) -> dict[str, Any]:
        return self.versions[version][1]

    def folder(self, version: str) -> Path:
        return Path(version)

    def unannounced(self, parent: str, step: int, preference_ids: tuple[str, ...]) -> tuple[str, Draft] | None:
        for name, (draft, _) in reversed(self.versions.items()):
            if (draft.parent, draft.step, draft.preference_ids) == (parent, step, preference_ids):
                return name, draft
        return None

    def announcement(self, version: str, draft: Draft, oldest_verdict_at: datetime | None) -> VersionPublished:
        return VersionPublished(
            event_id=derived_id(f"published/{version}"), variant="chat-main", version=version, parent=draft.parent,
            base="echo", digest="d", uri="u", step=draft.step, preference_ids=draft.preference_ids,
            oldest_verdict_at=oldest_verdict_at,
        )  # fmt: skip


CONFIG = TrainerConfig(
    base="echo", batch_pairs=3, flush_s=1.0, replay_pairs=0, max_passes=1, rehearse_s=1e9, heldout_ratio=0.1,
    publish_interval_s=2.0, max_pairs_per_user=3,
)  # fmt: skip


GUARDED = (
    "probe_repetition", "probe_length_tokens", "probe_entropy", "capability_perplexity",
    "base_probe_repetition", "base_probe_entropy", "base_capability_perplexity",
)  # fmt: skip


class Exam:
    """Now and then the weights went astray, or nobody can say whether they are safe."""

    def __init__(self, world: World) -> None:
        self._world = world

    def values(self, learner: object, intake: object) -> dict[str, float]:
        found, world = dict.fromkeys(GUARDED, 1.0), self._world
        if world.happens(0.1):
            world.note("astray")
            return found | {"probe_repetition": 9.0, "probe_length_tokens": 16.0}
        if world.happens(0.1):
            world.note("unjudged")
            return found | {"safety": 0.0, "safety_unscored_ratio": 1.0}
        return found


class SimulatedTrainer(Trainer):
    """The trainer's own loop over weights that are a list."""

    def __init__(self, world: World, log: Log, disk: Checkpoints, versions: Versions) -> None:
        self._config, self._log, self._store = CONFIG, log, versions  # type: ignore[assignment]
        self._folder, self._base_digest, self._now = disk, DIGEST, world.now  # type: ignore[assignment]
        self._sealer, self._tracker, self._world = Sealer(None), Nobody(), world
        self.weights = self._policy = self._learner = Weights(world)  # type: ignore[assignment]
        self._examples, self._exam = Examples(), Exam(world)  # type: ignore[assignment]
        self._published_at, self._learned_at, self._oldest_drop_at = None, world.now(), None
        self._unsaved, self._is_unsaved, self._has_erased = [], False, False
        number, payload, tensors = disk.newest or (0, b"", {})
        fresh = TrainerState(base_digest=DIGEST, lineage=Lineage(base_version(DIGEST)), intake=IntakeState())
        state = msgspec.json.decode(payload, type=TrainerState) if payload else fresh
        self._number, self._annotators = number, Annotators(state.annotators)
        self._intake = training._intake(CONFIG, state.intake)
        self._lineage, self._untold, self.weights.step = state.lineage, list(state.untold), state.step
        if payload:
            self._resume(state, tensors)

    def _fall_back(self, sound: str) -> None:
        before = set(self.weights.learned)
        super()._fall_back(sound)
        self._world.unlearned |= before - set(self.weights.learned)


class Checkpoints:
    """The checkpoint folder: what was renamed into its place last."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.newest: tuple[int, bytes, dict[str, Any]] | None = None

    def module(self) -> SimpleNamespace:
        """In the place of ``online_trainer.checkpoint``."""
        return SimpleNamespace(
            save=self._save, optimizer_tensors=lambda _: {}, load_optimizer=lambda *_: None,
            anchor_tensors=checkpoint.anchor_tensors, load_anchor=checkpoint.load_anchor,
        )  # fmt: skip

    def _save(self, folder: object, number: int, state: TrainerState, tensors: dict[str, Any], keep: int) -> None:
        payload = msgspec.json.encode(state)
        self._world.reach("trainer.checkpoint_staged")
        self.newest = (number, payload, tensors)
