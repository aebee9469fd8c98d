"""Claims: the one verdict that a pair gets, in Redis.

The first claim fixes the choice. Where the event log is the same Redis (``embedded_log``), one script claims,
appends the event and writes the receipt's first lines, with one sync. Everywhere else, and for a claim that was left
without its event (an append that failed is not undone by Redis), the claim comes first, under a lock with a lease;
then the caller appends, and ``mark`` says so behind the answer.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import chain
from typing import Any, Final, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.gathered import Gathered, Script
from router.ledger import Ledger
from telemetry.crashpoints import reach
from telemetry.event_log import MAX_PAYLOAD_BYTES
from telemetry.events import TOPIC_OF, Choice, PreferenceRecorded, encode
from telemetry.receipts import receipt_key
from telemetry.redis_log import stream_fields

log = logging.getLogger(__name__)
MARK_S: Final = 0.02  # how long marks gather
MOST_MARKS: Final = 64  # written in one step: Redis does nothing else meanwhile
MARK_TRIES: Final = 20
MARK_AGAIN_S: Final = 0.5
MARK_WAIT_S: Final = 1.0
VERDICT_KEY: Final = "tiebreak:verdict:"
LOCK_KEY: Final = "tiebreak:verdict-lock:"
TOPIC: Final = TOPIC_OF[PreferenceRecorded]

# KEYS verdict, lock, receipt, stream; ARGV claim, its life in s, the lock's in ms, how many words of the receipt,
# then these (pair_id first: it stands in the receipt from here on, so that who reads it knows of the claim), then the
# words of the stream's entry (none: another log, which the caller appends to)
# → claim that holds ('': this one), where it was durable before, whether the caller's, where it is durable now
CLAIM: Final = Script("""
local kept = ''
if redis.call('HSETNX', KEYS[1], 'claim', ARGV[1]) == 0 then kept = redis.call('HGET', KEYS[1], 'claim') end
if kept == ARGV[1] then kept = '' end
local before = redis.call('HGET', KEYS[1], 'durable')
if before then return {kept, before, 0, ''} end
redis.call('EXPIRE', KEYS[1], ARGV[2])
local entry = 5 + ARGV[4]
if kept ~= '' or #ARGV < entry then
  redis.call('HSETNX', KEYS[3], ARGV[5], ARGV[6])
  return {kept, '', redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[3]) and 1 or 0, ''}
end
if redis.call('EXISTS', KEYS[2]) == 1 then return {kept, '', 0, ''} end
redis.call('XADD', KEYS[4], '*', unpack(ARGV, entry))
for i = 5, entry - 1, 2 do redis.call('HSETNX', KEYS[3], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'durable', 'log')
return {kept, '', 1, 'log'}
""")

# For each verdict: KEYS verdict, lock, receipt; ARGV the words of the receipt (the recorder may have been here first),
# of which the last is where the event is durable
MARK: Final = Script("""
local words = #ARGV / (#KEYS / 3)
for k = 1, #KEYS, 3 do
  local last = words * (k + 2) / 3
  for i = last - words + 1, last, 2 do redis.call('HSETNX', KEYS[k + 2], ARGV[i], ARGV[i + 1]) end
  redis.call('HSET', KEYS[k], 'durable', ARGV[last])
  redis.call('DEL', KEYS[k + 1])
end
""")


class Claim(msgspec.Struct, frozen=True):
    """The one verdict that a pair gets, kept from before it is durable."""

    choice: Choice
    caller: str
    event: PreferenceRecorded


class Made(msgspec.Struct, frozen=True):
    """What came of a try to claim: the claim that holds, and where its event is durable, if it is."""

    claim: Claim
    durable_before: str  # somebody was earlier
    is_ours: bool  # to append, unless it is durable now
    durable: str  # by this very try


Unmarked = list[tuple[PreferenceRecorded, str]]  # and where each is durable


class Claims:
    """Makes, marks and reads claims."""

    def __init__(self, redis: Redis, ledger: Ledger, *, ttl_s: float, lease_s: float, embedded_log: bool) -> None:
        self._redis = redis
        # Clicks at the same time share a sync; none waits behind another's mark.
        self._reads, self._writes, self._notes = Gathered(redis), Gathered(redis), Gathered(redis)
        self._ledger = ledger
        self._ttl_s = int(ttl_s)
        self._lease_ms = int(lease_s * 1000)
        self._embedded_log = embedded_log
        self._unmarked: Unmarked = []  # gathering
        self._marking: asyncio.Task[None] | None = None  # which will write them
        self._marks: dict[str, asyncio.Task[None]] = {}  # not written yet, by preference id

    async def verdict(self, pair_id: str) -> Claim | None:
        """The pair's claim, if there is one."""
        claim = await self._reads.ask("HGET", VERDICT_KEY + pair_id, "claim")
        return None if claim is None else msgspec.json.decode(claim, type=Claim)

    async def make(self, claim: Claim) -> Made:
        """Try to claim; a claim whose event is not durable yet is the caller's only with the lock."""
        event = claim.event
        keys = [VERDICT_KEY + event.pair_id, LOCK_KEY + event.pair_id, receipt_key(event.event_id), TOPIC]
        entry = self._entry(event)
        lines = _accepted(event, "log") if entry else {"pair_id": event.pair_id}
        accepted = list(chain.from_iterable(lines.items()))
        words: list[Any] = [msgspec.json.encode(claim), self._ttl_s, self._lease_ms, len(accepted), *accepted, *entry]
        kept, before, won, now = cast(tuple[bytes, bytes, int, bytes], await self._writes.run(CLAIM, keys, words))
        holds = msgspec.json.decode(kept, type=Claim) if kept else claim
        return Made(holds, before.decode(), bool(won), now.decode())

    def _entry(self, event: PreferenceRecorded) -> list[bytes]:
        """The words of the entry in the stream; none where the log is another, or for it to refuse what is too long."""
        if not self._embedded_log or len(payload := encode(event)) > MAX_PAYLOAD_BYTES:
            return []
        return list(chain.from_iterable(stream_fields(event.pair_id, payload).items()))

    async def let_go(self, event: PreferenceRecorded) -> None:
        """Nothing was appended: the next try need not wait for the lease to end."""
        await self._redis.delete(LOCK_KEY + event.pair_id)

    def mark(self, event: PreferenceRecorded, durable: str) -> None:
        """The event is durable: from here on the same verdict is a replay; the lock is let go with it.

        Written behind the answer, with those of the next ``MARK_S``, and again for a while where Redis is away: until
        it is written the receipt is "being written". One that never is written is mended by the recorder, and the same
        verdict sent again appends the same event (its metric then counts it twice).
        """
        if self._marking is None or self._marking.done() or len(self._unmarked) == MOST_MARKS:
            self._unmarked = []
            self._marking = self._ledger.in_background(self._mark(self._unmarked))
        self._unmarked.append((event, durable))
        self._marks[event.event_id] = self._marking

    async def _mark(self, unmarked: Unmarked) -> None:
        try:
            if not self._ledger.is_ending:
                await asyncio.sleep(MARK_S)
            if unmarked is self._unmarked:
                self._marking = None  # what comes from here on is of another group
            await self._until_marked(unmarked)
        finally:
            for event, _ in unmarked:
                self._marks.pop(event.event_id, None)
        reach("router.verdict_marked")

    async def _until_marked(self, unmarked: Unmarked) -> None:
        for _ in range(MARK_TRIES):
            try:
                await self._write_marks(unmarked)
                break
            except (RedisError, OSError) as error:
                count, first = len(unmarked), unmarked[0][0].event_id
                log.warning(
                    "verdicts not marked, %d: %s", count, error, extra={"action": "verdict_not_marked", "id": first}
                )
            if self._ledger.is_ending:
                break
            await asyncio.sleep(MARK_AGAIN_S)

    async def _write_marks(self, unmarked: Unmarked) -> None:
        keys, words = list[str](), list[str]()
        for event, durable in unmarked:
            keys += VERDICT_KEY + event.pair_id, LOCK_KEY + event.pair_id, receipt_key(event.event_id)
            words += chain.from_iterable(_accepted(event, durable).items())
        await self._notes.run(MARK, keys, words)

    async def marked(self, preference_id: str) -> bool:
        """Wait a moment for a mark that is being written; False when it still is."""
        if mark := self._marks.get(preference_id):
            await asyncio.wait({mark}, timeout=MARK_WAIT_S)
            return mark.done()
        return True


def _accepted(event: PreferenceRecorded, durable: str) -> dict[str, str]:
    """A receipt's first lines; the last says where it is durable."""
    return {
        "pair_id": event.pair_id,
        "user": event.user,
        "accepted_at": event.occurred_at.isoformat(),
        "durable": durable,
    }
