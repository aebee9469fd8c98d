"""Receipts: what a verdict's giver holds, how far it has come, and how it is taken back.

A receipt's first lines are written when its verdict is acknowledged (router/claims.py); the recorder adds the rest
as events come by (telemetry/receipts.py). Which versions the sides were is kept with the verdict's claim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.admission import Caller
from router.answers import Links, Receipt, Revealed, RevealedPair, Timeline
from router.claims import Claim, Claims
from router.errors import Forbidden, NotFound, Unavailable
from router.ledger import Ledger, found_soon
from router.pairs import derived_id
from telemetry.events import Choice, Completion, PreferenceRecorded, PreferenceRetracted, utc_now
from telemetry.receipts import Stage, receipt_key, timeline

STATUSES: Final = ("retracted", "dropped", "live", "trained", "stored", "accepted")  # the first that was reached


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
    """Receipts in Redis."""

    def __init__(self, redis: Redis, ledger: Ledger, claims: Claims) -> None:
        self._redis = redis
        self._ledger = ledger
        self._claims = claims

    async def status(self, preference_id: str) -> str:
        """How far an acknowledged verdict has come, in one word."""
        fields = await cast(Any, self._redis.hgetall(receipt_key(preference_id)))
        return _status(timeline(fields))

    async def read(self, preference_id: str, caller: Caller) -> Timeline:
        """How far the verdict has come. Raises NotFound, Forbidden or Unavailable."""
        try:
            fields, claim = await self._find(preference_id, caller)
        except (RedisError, OSError) as error:
            raise _unreadable() from error
        stages = tuple(timeline(fields))
        return Timeline(
            id=preference_id,
            pair_id=fields[b"pair_id"].decode(),
            status=_status(stages),
            choice=claim.choice if claim else None,
            stages=stages,
            revealed=revealed(claim.event) if claim else None,
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

    async def _find(self, preference_id: str, caller: Caller) -> tuple[dict[bytes, bytes], Claim | None]:
        is_written = await self._claims.marked(preference_id)
        fields = await found_soon(lambda: self._accepted(preference_id))
        if fields is None and not is_written:
            raise Unavailable("This receipt is being written.", code="state_unavailable", retry_after_s=1.0)
        if fields is None and await self._is_claimed(preference_id):
            # its router may have died between acknowledgement and mark: the recorder writes it within seconds
            raise Unavailable("This receipt is being written.", code="state_unavailable", retry_after_s=1.0)
        if fields is None:
            raise NotFound("There is no such preference.", code="preference_not_found")
        claim = await self._claims.verdict(fields[b"pair_id"].decode())
        if claim and claim.caller != caller.name:
            raise Forbidden("This verdict was given with another key.")
        return fields, claim

    async def _is_claimed(self, preference_id: str) -> bool:
        pair_id = await cast(Any, self._redis.hget(receipt_key(preference_id), "pair_id"))
        return pair_id is not None and await self._claims.verdict(pair_id.decode()) is not None

    async def _accepted(self, preference_id: str) -> dict[bytes, bytes] | None:
        fields: dict[bytes, bytes] = await cast(Any, self._redis.hgetall(receipt_key(preference_id)))
        return fields if b"accepted_at" in fields else None


def _status(stages: Iterable[Stage]) -> str:
    reached = {stage.stage for stage in stages}
    return next((status for status in STATUSES if status in reached), "accepted")


def _reveal(side: Completion) -> Revealed:
    return Revealed(side.variant, side.version, side.channel)


def _unreadable() -> Unavailable:
    return Unavailable("Receipts cannot be read now.", code="state_unavailable", retry_after_s=1.0)
