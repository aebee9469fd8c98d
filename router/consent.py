"""Who may be shown pairs, and how often: consent and the frequency cap, in Redis, by pseudonym.

A user who has said nothing has not opted in. When Redis does not answer, `auto` means no pair.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.answers import ConsentState
from router.errors import ConsentRequired, Unavailable
from router.gathered import Gathered
from router.schema import ChatRequest
from telemetry.events import utc_now

CONSENT_KEY: Final = "tiebreak:consent:"
CAP_KEY: Final = "tiebreak:pair-cap:"
log = logging.getLogger(__name__)


class ConsentBook:
    """Consent per user, and how many pairs each was shown in the running minute."""

    def __init__(self, redis: Redis, reads: Gathered, writes: Gathered, *, pairs_per_minute: int) -> None:
        self._redis, self._reads, self._writes = redis, reads, writes
        self._pairs_per_minute = pairs_per_minute

    async def read(self, user: str) -> ConsentState:
        """The user's consent; not given when nothing is known."""
        payload = await self._reads.ask("GET", CONSENT_KEY + user)
        return msgspec.json.decode(payload, type=ConsentState) if payload else ConsentState(False, None)

    async def write(self, user: str, is_pairing: bool) -> ConsentState:
        """Keep the user's decision."""
        state = ConsentState(is_pairing, utc_now())
        await self._redis.set(CONSENT_KEY + user, msgspec.json.encode(state))
        return state

    async def forget(self, user: str) -> None:
        """As if the user had never said anything."""
        await self._redis.delete(CONSENT_KEY + user)

    async def take_turn(self, user: str) -> bool:
        """Count one more pair of this minute; False above the cap."""
        key = f"{CAP_KEY}{user}:{int(time.time() // 60)}"
        begun, counted = self._writes.ask("SET", key, 0, "EX", 120, "NX"), self._writes.ask("INCR", key)
        _, count = await asyncio.gather(begun, counted)
        return int(count) <= self._pairs_per_minute


def may_be_pair(request: ChatRequest) -> bool:
    """Whether ``auto`` can mean a pair: a user, one choice, no pin, and sampling that can differ."""
    return bool(request.user) and (request.n or 1) == 1 and "@" not in request.model and request.temperature != 0.0


async def wants_pair(request: ChatRequest, user: str, book: ConsentBook, *, ratio: float, draw: random.Random) -> bool:
    """Whether this request is to become a pair. Raises ConsentRequired or Unavailable for ``always``."""
    match request.pair_wish:
        case "always":
            try:
                consent = await book.read(user)
            except (RedisError, OSError) as error:
                raise Unavailable("Consent cannot be read now.", retry_after_s=1.0) from error
            if not consent.pairing:
                raise ConsentRequired(param="user")
            return True
        case "auto" if may_be_pair(request) and draw.random() < ratio:
            try:
                return (await book.read(user)).pairing and await book.take_turn(user)
            except (RedisError, OSError) as error:
                log.warning("no pair, consent cannot be read: %s", error, extra={"action": "consent_unknown"})
    return False
