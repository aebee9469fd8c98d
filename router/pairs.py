"""A pair's identity: who sits where, the token that lets its user judge it, and the memory of what was shown.

The token is ``payload.signature``: base64url JSON of pair, user pseudonym and expiry, and an HMAC-SHA-256 with
the deployment's key. The pair itself, both texts included, is kept in Redis until a verdict can come no more.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import uuid
from collections import OrderedDict
from typing import Final

import msgspec
from redis.asyncio import Redis

from router.errors import InvalidToken
from router.gathered import Gathered
from telemetry.events import PairShown

PAIR_KEY: Final = "tiebreak:pair:"
RECENT_PAIRS: Final = 1024  # kept in memory: some kB each
_LATE_S: Final = 600  # a pair outlives its token a little, so that late verdicts get a clear answer
_NAMESPACE: Final = uuid.UUID("6f0c9a52-3a0e-5a55-9e0e-6d2f3f6c7b11")
_SCOPE: Final = b"tiebreak-pair:"


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """What a pair token says."""

    pair_id: str
    user: str  # pseudonym
    expires_at_s: float  # unix time


class RememberedPair(msgspec.Struct, frozen=True):
    """What Redis holds: the event as logged (sealed), and whose key asked for it."""

    shown: PairShown
    caller: str


def pseudonym(key: bytes, user: str) -> str:
    """A user id's keyed hash, 16 hex digits; empty for no user."""
    return hmac.new(key, b"user:" + user.encode(), hashlib.sha256).hexdigest()[:16] if user else ""


def derived_id(*parts: str) -> str:
    """A UUID that depends on ``parts`` only: a repeated write carries the same event id and is deduplicated."""
    return str(uuid.uuid5(_NAMESPACE, "\n".join(parts)))


def preference_id(pair_id: str) -> str:
    """The one preference that a pair can have."""
    return derived_id("preference", pair_id)


def sign_ticket(key: bytes, ticket: Ticket) -> str:
    """The pair token of ``ticket``."""
    payload = base64.urlsafe_b64encode(msgspec.json.encode(ticket)).rstrip(b"=")
    return f"{payload.decode()}.{_signature(key, payload)}"


def read_ticket(key: bytes, token: str, pair_id: str) -> Ticket:
    """The ticket in ``token``; raises InvalidToken unless we signed it for ``pair_id``. Expiry is the caller's."""
    payload, _, signature = token.partition(".")
    encoded = payload.encode()
    if not hmac.compare_digest(_signature(key, encoded).encode(), signature.encode()):
        raise InvalidToken()
    try:
        padded = encoded + b"=" * (-len(encoded) % 4)
        ticket = msgspec.json.decode(base64.urlsafe_b64decode(padded), type=Ticket)
    except (binascii.Error, msgspec.DecodeError) as error:
        raise InvalidToken() from error
    if ticket.pair_id != pair_id:
        raise InvalidToken()
    return ticket


def _signature(key: bytes, payload: bytes) -> str:
    return hmac.new(key, _SCOPE + payload, hashlib.sha256).hexdigest()


class PairMemory:
    """Pairs as shown, in Redis, until they expire; the last ones also here, so that a quick click reads nothing.

    Both hold them as they are given: sealed, so that nobody keeps what a person wrote longer than their key.
    """

    def __init__(self, redis: Redis, writes: Gathered, ttl_s: float, *, recent: int = RECENT_PAIRS) -> None:
        self._reads, self._writes = Gathered(redis), writes
        self._ttl_s = int(ttl_s) + _LATE_S
        self._most_recent = recent
        self._recent: OrderedDict[str, RememberedPair] = OrderedDict()

    async def remember(self, pair: RememberedPair) -> None:
        """Keep ``pair``; from here on its verdict can be given."""
        await self._writes.ask("SET", PAIR_KEY + pair.shown.pair_id, msgspec.json.encode(pair), "EX", self._ttl_s)
        self._recent[pair.shown.pair_id] = pair
        if len(self._recent) > self._most_recent:
            self._recent.popitem(last=False)

    async def complete(self, pair: RememberedPair) -> None:
        """Put ``pair`` in the place of what is remembered of it, as long as that is."""
        if pair.shown.pair_id in self._recent:
            self._recent[pair.shown.pair_id] = pair
        await self._writes.ask("SET", PAIR_KEY + pair.shown.pair_id, msgspec.json.encode(pair), "XX", "KEEPTTL")

    def recent(self, pair_id: str) -> RememberedPair | None:
        """The pair, if this process is the one that showed it, and not long ago."""
        return self._recent.get(pair_id)

    async def recall(self, pair_id: str) -> RememberedPair | None:
        """The pair, or None when it was never complete or is long over."""
        if pair := self.recent(pair_id):
            return pair
        payload = await self._reads.ask("GET", PAIR_KEY + pair_id)
        return None if payload is None else msgspec.json.decode(payload, type=RememberedPair)
