"""What was served goes into the log, the metrics and the memories that verdicts and thumbs need.

Two ways into the log: ``durable`` waits until the entry cannot be lost, ``note`` does not wait and counts what
failed. Work that no client waits for runs in the background; ``settled`` waits for it. Answers' numbers, and what a
thumb needs, gather for ``GATHER_S`` and leave together: each alone would wake two threads and cost a busy router as
much as the answer. A router that is killed loses what it had gathered; verdicts never gather.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Final, Literal, TypeVar, cast

import msgspec
from msgspec.structs import replace
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.admission import Caller
from router.arms import Arm
from router.errors import PayloadTooLarge, Unavailable
from router.exchange import Answer, Exchange
from router.gathered import Gathered
from router.landing import Landing
from router.pairs import PairMemory, RememberedPair
from router.private import NOT_TO_BE_READ, Private
from telemetry import metrics
from telemetry.crashpoints import reach
from telemetry.event_log import EntryTooLarge, LogUnavailable
from telemetry.events import (
    TOPIC_OF,
    AnyEvent,
    AuditRecorded,
    Completion,
    CompletionServed,
    Message,
    PairShown,
    encode,
    key_of,
)
from telemetry.outbox import OutboxLog
from telemetry.people import Forgotten, KeysAway, KeyUnusable
from telemetry.sealing import SHAPES, Shape

GATHER_S: Final = 0.02
COMPLETION_KEY: Final = "tiebreak:completion:"
ELSEWHERE_S: Final = 0.25
ANSWER: Final = Shape(("completion",))  # where a remembered answer has texts
T = TypeVar("T")
log = logging.getLogger(__name__)


async def found_soon(find: Callable[[], Awaitable[T | None]]) -> T | None:
    """What ``find`` finds, or does a moment later: another worker may be writing it, behind its answer."""
    found = await find()
    if found is None:
        await asyncio.sleep(ELSEWHERE_S)
        found = await find()
    return found


class RememberedCompletion(msgspec.Struct, frozen=True):
    """A single answer that a thumb may still come for."""

    policy: str
    user: str
    caller: str
    prompt: tuple[Message, ...]
    completion: Completion
    key_id: str = ""  # of the user's key when it was asked for


class Ledger:
    """The one place where the router writes down what it served."""

    def __init__(
        self,
        outbox: OutboxLog,
        redis: Redis,
        memories: Gathered,
        pairs: PairMemory,
        private: Private,
        *,
        completion_ttl_s: float,
    ) -> None:
        self._log, self.private, self._landing = outbox, private, Landing()
        self._redis, self._writes = redis, memories
        self._pairs = pairs
        self._completion_ttl_s = int(completion_ttl_s)
        self._numbers: list[CompletionServed] = []  # gathering
        self.is_ending = False  # nothing gathers any more
        self._leaving: asyncio.TimerHandle | None = None
        self._memories: dict[str, RememberedCompletion] = {}  # by key; until Redis has them
        self._unwritten: list[str] = []  # keys of those that gather
        self._background: set[asyncio.Task[None]] = set()

    async def durable(self, event: AnyEvent, *, key_id: str = "") -> Literal["log", "outbox"]:
        """Append and wait; where the event is safe. Raises Unavailable, and then nothing is acknowledged.

        Raises one of NOT_TO_BE_READ where a text cannot be sealed with the person's key (``key_id``, if it is named).
        """
        payload = encode(await self.private.sealed(event, key_id))
        try:
            done = await self._landing.of(self._log.append(TOPIC_OF[type(event)], key_of(event), payload))
        except LogUnavailable as error:
            message = "The event log takes nothing now; nothing was recorded."
            raise Unavailable(message, code="log_unavailable", retry_after_s=2.0) from error
        except EntryTooLarge as error:
            raise PayloadTooLarge("This is more text than one event can carry.") from error
        return done.where

    async def audit(self, caller: Caller, action: str, subject: str, **details: str) -> None:
        """Put into the audit trail who did what; durable. Raises Unavailable."""
        actor = caller.name or "operator"  # of an open router
        await self.durable(AuditRecorded(actor=actor, action=action, subject=subject, details=details))

    def note(self, event: AnyEvent) -> None:
        """Append what has no texts, or is sealed, without waiting; a loss is counted."""
        topic = TOPIC_OF[type(event)]

        def count_loss(done: Future[Any]) -> None:
            if error := done.exception():
                metrics.EVENTS_LOST.labels(topic).inc()
                log.warning("event lost: %s", error, extra={"action": "event_lost", "topic": topic})

        try:
            self._log.append(topic, key_of(event), encode(event)).add_done_callback(count_loss)
        except RuntimeError as error:  # the log was closed: this answer ended after everything else
            metrics.EVENTS_LOST.labels(topic).inc()
            log.warning("event lost: %s", error, extra={"action": "event_lost", "topic": topic})

    async def remember_pair(self, exchange: Exchange) -> bool:
        """Make the complete pair one that can be judged; False when the memory cannot be reached, or no key be made."""
        assert exchange.offer is not None
        a, b = exchange.shown
        shown = PairShown(
            pair_id=exchange.pair_id,
            trace_id=exchange.trace_id,
            span_id=exchange.span_id,
            request_id=exchange.request_id,
            policy=exchange.policy,
            user=exchange.user,
            cohort=exchange.request.cohort,
            prompt=exchange.prompt,
            a=a.completion(),
            b=b.completion(),
            propensity=exchange.propensity,
            expires_at=exchange.offer.expires_at,
        )
        try:
            key_id = exchange.key_id or await self.private.key_of(exchange.user)
            shown = await self.private.redacted(shown, SHAPES[PairShown])
            shown = await self.private.sealed(replace(shown, cluster=self.private.cluster(shown.prompt)), key_id)
            await self._pairs.remember(RememberedPair(shown, exchange.caller))
            reach("router.pair_remembered")
        except (RedisError, OSError, *NOT_TO_BE_READ) as error:
            log.warning("pair not remembered: %s", error, extra={"action": "pair_lost", "pair_id": shown.pair_id})
            return False
        self.note(shown)
        metrics.PAIRS_SHOWN.labels(exchange.policy).inc()
        return True

    def side_lost(self, answer: Answer) -> None:
        """Count a side of a pair that failed."""
        metrics.PAIR_SIDES_LOST.labels(answer.arm.variant, answer.arm.version).inc()

    def close_exchange(self, exchange: Exchange) -> None:
        """Write down every answer of a request that is over, and keep single ones for a thumb."""
        read = set[Arm]()  # arms that read the prompt already: for several answers of one, that is done once
        for answer in exchange.answers:
            self._numbers.append(answer.served(exchange))
            _count(answer, is_prompt_read=answer.arm in read)
            read.add(answer.arm)
            if not exchange.is_pair and answer in exchange.shown and answer.is_whole:
                self._remember_completion(exchange, answer)
        if self.is_ending:
            self._leave()
        elif self._leaving is None:
            self._leaving = asyncio.get_running_loop().call_later(GATHER_S, self._leave)

    def _leave(self) -> None:
        """What gathered goes out."""
        self._leaving = None
        numbers, self._numbers = self._numbers, []
        for event in numbers:
            self.note(event)
        if self._unwritten:
            keys, self._unwritten = self._unwritten, []
            self.in_background(self._write_memories(keys))

    async def recall_completion(self, completion_id: str) -> RememberedCompletion | None:
        """The single answer, or None when it is unknown or too old."""
        if waiting := self._memories.get(COMPLETION_KEY + completion_id):
            return waiting
        payload = await found_soon(lambda: self._kept(completion_id))
        if payload is None:
            return None
        try:
            opened = await self.private.opened_bytes(payload, completion_id)
        except Forgotten:
            return None
        except (KeyUnusable, KeysAway) as error:
            raise Unavailable("This answer cannot be read now.", code="keys_unavailable", retry_after_s=1.0) from error
        return msgspec.json.decode(opened, type=RememberedCompletion)

    async def _kept(self, completion_id: str) -> bytes | None:
        return cast(bytes | None, await self._redis.get(COMPLETION_KEY + completion_id))

    async def settled(self) -> None:
        """The end: what gathers goes out, and from now on at once; wait for all that runs in the background."""
        self.is_ending = True
        if self._leaving is not None:
            self._leaving.cancel()
            self._leave()
        while self._background:
            await asyncio.wait(set(self._background))

    def _remember_completion(self, exchange: Exchange, answer: Answer) -> None:
        kept = RememberedCompletion(
            exchange.policy,
            exchange.user,
            exchange.caller,
            exchange.prompt,
            answer.completion(),
            exchange.key_id,
        )
        key = COMPLETION_KEY + answer.completion_id
        self._memories[key] = kept
        self._unwritten.append(key)

    async def _write_memories(self, keys: list[str]) -> None:
        """When Redis is away, they are let go."""
        results = await asyncio.gather(*map(self._write_memory, keys), return_exceptions=True)
        for key in keys:
            del self._memories[key]
        if failures := [result for result in results if isinstance(result, BaseException)]:
            log.warning(
                "no thumb for %d answers: %s", len(failures), failures[0], extra={"action": "completion_not_remembered"}
            )

    async def _write_memory(self, key: str) -> None:
        kept = self._memories[key]
        key_id = kept.key_id or await self.private.key_of(kept.user)
        redacted = await self.private.redacted(msgspec.structs.replace(kept, key_id=key_id), ANSWER)
        text, name = msgspec.json.encode(redacted), key.removeprefix(COMPLETION_KEY)
        sealed = await self.private.sealed_bytes(kept.user, text, name, key_id)
        await self._writes.ask("SET", key, sealed, "EX", self._completion_ttl_s)

    def in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what no client waits for; it deals with its own errors."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _count(answer: Answer, *, is_prompt_read: bool) -> None:
    variant, version = answer.arm.variant, answer.arm.version
    prompt_tokens = 0 if is_prompt_read else answer.last.prompt_tokens
    if cost := answer.arm.cost(prompt_tokens, len(answer.tokens)):
        metrics.COST.labels(variant, version).inc(cost)
    if answer.failure:
        metrics.RESPONSE_ERRORS.labels(variant, version, answer.failure.code).inc()
    elif answer.is_whole:
        metrics.RESPONSES.labels(variant, version, answer.arm.channel).inc()
        metrics.DURATION.labels(variant, version).observe(answer.ended_s - answer.started_s)
    if answer.has_started:
        metrics.TTFT.labels(variant, version).observe(answer.first_s - answer.started_s)
    if answer.last.is_unsafe:
        metrics.SAFETY_VIOLATIONS.labels(variant, version).inc()
