"""Receipts: what a verdict's giver holds, how far it has come, and how it is taken back.

The router writes a receipt's first lines at acknowledgement; the recorder adds the rest as events come by
(telemetry/receipts.py). Which versions the sides were is kept with the verdict's claim.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Final, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.admission import Caller
from router.errors import Forbidden, NotFound, Unavailable
from router.ledger import Ledger
from router.pairs import derived_id
from router.schema import Choice, Links, Receipt, Revealed, RevealedPair, Timeline
from telemetry.events import Completion, PreferenceRecorded, PreferenceRetracted, utc_now
from telemetry.receipts import Stage, receipt_key, timeline

log = logging.getLogger(__name__)
VERDICT_KEY: Final = "tiebreak:verdict:"
STATUSES: Final = ("retracted", "dropped", "live", "trained", "stored", "accepted")  # the first that was reached


class Claim(msgspec.Struct, frozen=True):
    """The one verdict that a pair gets, kept from before it is durable."""

    choice: Choice
    caller: str
    event: PreferenceRecorded


class Verdict(msgspec.Struct, frozen=True):
    """A claim and what became of it: ``durable`` is empty until it was acknowledged."""

    claim: Claim
    durable: str


def revealed(event: PreferenceRecorded) -> RevealedPair:
    """Which version each position was."""
    a, b = event.chosen, event.rejected
    if event.chosen_position == "b":
        a, b = b, a
    return RevealedPair(_reveal(a), _reveal(b))


def receipt(
    event: PreferenceRecorded, choice: Choice, durable: str, *, replayed: bool, status: str = "accepted"
) -> Receipt:
    """What the verdict's giver gets."""
    return Receipt(
        id=event.event_id,
        pair_id=event.pair_id,
        status=status,
        choice=choice,
        accepted_at=event.occurred_at,
        durable=durable,
        replayed=replayed,
        revealed=revealed(event),
        links=Links(f"/v1/preferences/{event.event_id}"),
    )


class ReceiptBook:
    """Receipts and verdicts in Redis."""

    def __init__(self, redis: Redis, ledger: Ledger) -> None:
        self._redis = redis
        self._ledger = ledger
        self._marks: dict[str, asyncio.Task[None]] = {}  # under way, by preference id

    async def verdict(self, pair_id: str) -> Verdict | None:
        """The pair's claim, if there is one."""
        claim, durable = await cast(Any, self._redis.hmget(VERDICT_KEY + pair_id, ["claim", "durable"]))
        if claim is None:
            return None
        return Verdict(msgspec.json.decode(claim, type=Claim), (durable or b"").decode())

    def accept(self, event: PreferenceRecorded, durable: str, lock: str) -> None:
        """The event is durable: from here on the same verdict is a replay; ``lock`` is let go with it.

        Written behind the answer. A mark that fails is logged only: the recorder writes the receipt soon (until then it
        is not found), and the same verdict sent again appends the same event (its metric then counts it twice).
        """
        mark = self._ledger.in_background(self._mark(event, durable, lock))
        self._marks[event.event_id] = mark
        mark.add_done_callback(lambda _: self._marks.pop(event.event_id, None))

    async def _mark(self, event: PreferenceRecorded, durable: str, lock: str) -> None:
        fields = {
            "pair_id": event.pair_id,
            "user": event.user,
            "accepted_at": event.occurred_at.isoformat(),
            "durable": durable,
        }
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                for name, value in fields.items():  # the recorder may have been here first
                    pipeline.hsetnx(receipt_key(event.event_id), name, value)
                pipeline.hset(VERDICT_KEY + event.pair_id, "durable", durable)
                pipeline.delete(lock)
                await pipeline.execute()
        except (RedisError, OSError) as error:
            log.warning("verdict not marked: %s", error, extra={"action": "verdict_not_marked", "id": event.event_id})

    async def status(self, preference_id: str) -> str:
        """How far an acknowledged verdict has come, in one word."""
        fields = await cast(Any, self._redis.hgetall(receipt_key(preference_id)))
        return _status(timeline(fields))

    async def read(self, preference_id: str, caller: Caller) -> Timeline:
        """How far the verdict has come. Raises NotFound, Forbidden or Unavailable."""
        try:
            fields, verdict = await self._find(preference_id, caller)
        except (RedisError, OSError) as error:
            raise _unreadable() from error
        stages = tuple(timeline(fields))
        return Timeline(
            id=preference_id,
            pair_id=fields[b"pair_id"].decode(),
            status=_status(stages),
            choice=verdict.claim.choice if verdict else None,
            stages=stages,
            revealed=revealed(verdict.claim.event) if verdict else None,
        )

    async def retract(self, preference_id: str, caller: Caller) -> Timeline:
        """Take the verdict back; again is no error. Raises as ``read`` does."""
        try:
            fields, _ = await self._find(preference_id, caller)
            if b"retracted_at" not in fields:
                await self._retract(preference_id, fields)
        except (RedisError, OSError) as error:
            raise _unreadable() from error
        return await self.read(preference_id, caller)

    async def _retract(self, preference_id: str, fields: dict[bytes, bytes]) -> None:
        event = PreferenceRetracted(
            event_id=derived_id("retracted", preference_id),
            occurred_at=utc_now(),
            preference_id=preference_id,
            pair_id=fields[b"pair_id"].decode(),
            user=fields.get(b"user", b"").decode(),
        )
        await self._ledger.durable(event)
        key, at = receipt_key(preference_id), event.occurred_at.isoformat()
        await cast(Any, self._redis.hsetnx(key, "retracted_at", at))

    async def _find(self, preference_id: str, caller: Caller) -> tuple[dict[bytes, bytes], Verdict | None]:
        if mark := self._marks.get(preference_id):
            await asyncio.wait({mark})
        fields = await cast(Any, self._redis.hgetall(receipt_key(preference_id)))
        if b"accepted_at" not in fields:
            raise NotFound("There is no such preference.", code="preference_not_found")
        verdict = await self.verdict(fields[b"pair_id"].decode())
        if verdict and verdict.claim.caller != caller.name:
            raise Forbidden("This verdict was given with another key.")
        return fields, verdict


def _status(stages: Iterable[Stage]) -> str:
    reached = {stage.stage for stage in stages}
    return next((status for status in STATUSES if status in reached), "accepted")


def _reveal(side: Completion) -> Revealed:
    return Revealed(side.variant, side.version, side.channel)


def _unreadable() -> Unavailable:
    return Unavailable("Receipts cannot be read now.", code="state_unavailable", retry_after_s=1.0)
