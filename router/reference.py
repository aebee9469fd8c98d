"""The base's log-probs of a pair's answers, asked of an idle replica while the user reads, for the verdict's event.

A learner needs them of every pair that is judged. What is not there when the verdict comes, because no replica was idle
or none can say, the trainer computes itself. Nobody waits for any of this, and a failure loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from msgspec.structs import replace
from redis.exceptions import RedisError

from router.backends import ReplicaPool
from router.errors import RouterError
from router.exchange import Exchange
from router.pairs import PairMemory
from router.private import NOT_TO_BE_READ, Private
from router.tables import Tables
from serving.wire import AnswerTokens, ScoreRequest, Scores
from telemetry import metrics
from telemetry.events import Completion, PairShown

MOST: Final = 32  # pairs that are asked for at once; beyond, replicas are too busy to be idle soon
WAIT_S: Final = 20.0  # for an idle moment
log = logging.getLogger(__name__)


class References:
    """Asks, and completes the pairs that are remembered."""

    def __init__(self, pool: ReplicaPool, tables: Tables, pairs: PairMemory, private: Private) -> None:
        self._pool, self._tables, self._pairs, self._private = pool, tables, pairs, private
        self._asking: set[asyncio.Task[None]] = set()

    def ask(self, exchange: Exchange) -> None:
        """Begin for a pair that was just remembered, where it has one base that can say."""
        bases = {answer.arm.base for answer in exchange.shown}
        if len(bases) != 1 or len(self._asking) >= MOST or not self._tables.scorers(base := bases.pop()):
            return
        task = asyncio.create_task(self._ask(base, exchange.pair_id))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def _ask(self, base: str, pair_id: str) -> None:
        pair = self._pairs.recent(pair_id)
        if pair is None:
            return
        try:
            shown = await self._private.opened(pair.shown)
            answers = tuple(AnswerTokens(side.token_ids, _is_ended(side)) for side in (shown.a, shown.b))
            scorers = self._tables.scorers(base)
            if not scorers or not all(answer.token_ids for answer in answers):  # redacted, or nobody left
                return
            replica = min(scorers, key=lambda replica: replica.in_flight)
            scores = await self._pool.score(replica, ScoreRequest(shown.prompt, answers, WAIT_S))
            if scored := _completed(shown, scores):
                key_id = pair.shown.sealed.key_id if pair.shown.sealed else ""
                await self._pairs.complete(replace(pair, shown=await self._private.sealed(scored, key_id)))
                metrics.REFERENCES.labels(base, "kept").inc()
                return
        except (RouterError, RedisError, OSError, *NOT_TO_BE_READ) as error:
            log.debug("no reference of a pair: %s", error)
        metrics.REFERENCES.labels(base, "missing").inc()


def _is_ended(side: Completion) -> bool:
    return side.finish_reason == "stop" and not side.is_clipped


def _completed(shown: PairShown, scores: Scores) -> PairShown | None:
    """The pair with its scores; None where these are not of its answers."""
    if len(scores.logps) != 2:
        return None
    a, b = (
        replace(side, reference=scores.version, reference_logps=logps)
        for side, logps in zip((shown.a, shown.b), scores.logps, strict=True)
    )
    return replace(shown, a=a, b=b)
