"""Verdicts: once per pair, acknowledged only when durable, whatever crashes in between.

A verdict is claimed with its whole event (the first claim fixes the choice) and appended to the log under an event
id that depends on the pair alone (router/claims.py: one step where the log is embedded); then it is acknowledged.
Without its mark the same verdict sent again appends the same event, and consumers deduplicate. ``a`` and ``b`` end
here; from here on the words are chosen and rejected.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Final

from msgspec.structs import replace
from opentelemetry.trace import Span, SpanKind
from redis.exceptions import RedisError

from router.admission import Caller
from router.answers import Receipt
from router.claims import Claim, Claims
from router.errors import Conflict, Forbidden, Gone, NotFound, RouterError, Unavailable
from router.ledger import Ledger
from router.pairs import PairMemory, RememberedPair, Ticket, preference_id, pseudonym, read_ticket
from router.private import Private
from router.receipts import ReceiptBook, receipt
from router.schema import VerdictRequest
from telemetry import metrics, tracing
from telemetry.crashpoints import reach
from telemetry.events import Completion, PairShown, PreferenceRecorded, utc_now
from telemetry.labeling import judged, labeler_name
from telemetry.people import Forgotten, KeysAway, KeyUnusable

POLL_S: Final = 0.005


def to_preference(
    shown: PairShown, body: VerdictRequest, *, at: datetime, trace: tuple[str, str] = ("", ""), labeler: str = ""
) -> PreferenceRecorded:
    """The verdict as an event, whole in itself; its id depends on the pair alone. ``labeler``: by labeler_name."""
    return judged(
        shown,
        body.choice,
        event_id=preference_id(shown.pair_id),
        at=at,
        decided_s=(at - shown.occurred_at).total_seconds(),
        trace_id=trace[0],
        span_id=trace[1],
        source=body.source,
        labeler=labeler,
        reasons=body.reasons or (),
        comment=body.comment or "",
        quality=body.quality,
        edited=body.edited,
    )


async def _redacted_notes(private: Private, event: PreferenceRecorded) -> PreferenceRecorded:
    """Of what the pair showed this was done when it was remembered."""
    if not (event.comment or event.edited or event.reasons):
        return event
    comment, edited = await private.text(event.comment), await private.text(event.edited or "")
    reasons = tuple([await private.text(reason) for reason in event.reasons])
    return replace(event, comment=comment, edited=edited if event.edited is not None else None, reasons=reasons)


def count_verdict(event: PreferenceRecorded) -> None:
    """One count per side, so that a win rate is a ratio of two sums."""
    is_win = event.outcome == "chosen_rejected"
    is_cross = "true" if _identity(event.chosen) != _identity(event.rejected) else "false"
    for side, word in ((event.chosen, "win"), (event.rejected, "loss")):
        outcome = word if is_win else event.outcome
        metrics.VERDICTS.labels(side.variant, side.version, outcome, event.source, is_cross).inc()


def _identity(side: Completion) -> tuple[str, str]:
    return side.variant, side.version


class Preferences:
    """Takes verdicts."""

    def __init__(
        self,
        *,
        key: bytes,
        private: Private,
        pairs: PairMemory,
        ledger: Ledger,
        claims: Claims,
        book: ReceiptBook,
        lease_s: float,
    ) -> None:
        self._key, self._private = key, private
        self._pairs = pairs
        self._ledger = ledger
        self._claims = claims
        self._book = book
        self._lease_s = lease_s

    async def record(self, body: VerdictRequest, caller: Caller) -> Receipt:
        """The receipt of a durable verdict. Raises RouterError; then nothing was acknowledged."""
        started_s = time.perf_counter()
        ticket = read_ticket(self._key, body.token, body.pair_id)
        if body.user and pseudonym(self._key, body.user) != ticket.user:
            raise Forbidden("This pair was shown to another user.", code="not_your_pair", param="user")
        try:
            answer = await self._record(body, ticket, caller)
        except (RedisError, OSError) as error:
            message = "Pairs cannot be read now; nothing was acknowledged."
            raise Unavailable(message, code="state_unavailable", retry_after_s=1.0) from error
        metrics.VERDICT_SECONDS.observe(time.perf_counter() - started_s)
        return answer

    async def _record(self, body: VerdictRequest, ticket: Ticket, caller: Caller) -> Receipt:
        claim: Claim | None = None
        try:
            shown = _judgeable(await self._pairs.recall(ticket.pair_id), ticket, caller)
        except (NotFound, Gone) as error:
            claim = await self._given(body, ticket, caller, error)
        with _span(body, claim.event if claim else shown) as span:
            if claim is None:  # whether there is a verdict already is for the claim to tell
                try:
                    claim = Claim(body.choice, caller.name, await self._sealed(shown, body, tracing.ids(span)))
                except (Gone, Unavailable) as error:
                    claim = await self._given(body, ticket, caller, error)
            span.set_attribute("preference.id", claim.event.event_id)
            answer = await self._settle(claim, body, caller)
            if not answer.replayed:
                span.add_event("gen_ai.evaluation.result", {"preference.outcome": claim.event.outcome})
            return answer

    async def _given(self, body: VerdictRequest, ticket: Ticket, caller: Caller, error: RouterError) -> Claim:
        """What was claimed already, which can be heard of without the pair or its key; otherwise raises ``error``."""
        claim = await self._claims.verdict(ticket.pair_id)
        if claim is None:
            raise error
        _check(claim, body, caller)
        return claim

    async def _sealed(self, shown: PairShown, body: VerdictRequest, trace: tuple[str, str]) -> PreferenceRecorded:
        """The verdict's event as it is written everywhere. Raises Gone for who is forgotten, or Unavailable."""
        private, key_id = self._private, shown.sealed.key_id if shown.sealed else ""
        labeler = labeler_name(self._key, body.labeler or "")
        try:
            event = to_preference(await private.opened(shown), body, at=utc_now(), trace=trace, labeler=labeler)
            return await private.sealed(await _redacted_notes(private, event), key_id)
        except Forgotten as error:
            raise Gone("What this pair showed was erased with its user's data.", code="erased") from error
        except (KeyUnusable, KeysAway, OSError) as error:
            message = "What this pair showed cannot be read now; nothing was acknowledged."
            raise Unavailable(message, code="keys_unavailable", retry_after_s=1.0) from error

    async def _settle(self, claim: Claim, body: VerdictRequest, caller: Caller) -> Receipt:
        """Claim, and append where that is not the same step; or wait for whoever does."""
        give_up_s = time.monotonic() + 2 * self._lease_s
        while time.monotonic() < give_up_s:
            made = await self._claims.make(claim)
            reach("router.verdict_claimed")
            claim = made.claim
            try:
                _check(claim, body, caller)
            except RouterError:
                if made.is_ours and not made.durable:
                    await self._claims.let_go(claim.event)  # for the click that agrees with the claim
                raise
            if made.durable_before:
                return await self._replayed(claim, made.durable_before)
            if made.durable:
                return _acknowledged(claim, made.durable)
            if made.is_ours:
                return await self._append(claim)
            await asyncio.sleep(POLL_S)
        raise Unavailable("This verdict is being recorded by another request.", retry_after_s=1.0)

    async def _replayed(self, claim: Claim, durable: str) -> Receipt:
        status = await self._book.status(claim.event.event_id)
        return receipt(claim.event, claim.choice, durable, replayed=True, status=status)

    async def _append(self, claim: Claim) -> Receipt:
        durable = ""
        try:
            durable = await self._ledger.durable(claim.event)
        finally:
            if not durable:
                await self._claims.let_go(claim.event)
        reach("router.verdict_durable")
        self._claims.mark(claim.event, durable)
        return _acknowledged(claim, durable)


@contextmanager
def _span(body: VerdictRequest, begun: PairShown | PreferenceRecorded) -> Iterator[Span]:
    """The verdict's span, in the trace in which the pair was shown."""
    within = tracing.parent(begun.trace_id, begun.span_id)
    with tracing.span("verdict", within=within, kind=SpanKind.SERVER) as span:
        span.set_attribute("preference.pair_id", body.pair_id)
        yield span


def _acknowledged(claim: Claim, durable: str) -> Receipt:
    count_verdict(claim.event)
    return receipt(claim.event, claim.choice, durable, replayed=False)


def _check(claim: Claim, body: VerdictRequest, caller: Caller) -> None:
    if claim.caller != caller.name:
        raise Forbidden("This pair was asked for with another key.", code="not_your_pair")
    if claim.choice != body.choice:
        message = "This pair has its verdict, and it is another one: a verdict cannot be changed."
        raise Conflict(message, code="verdict_conflict", param="choice")


def _is_over(ticket: Ticket) -> bool:
    return time.time() > ticket.expires_at_s


def _judgeable(pair: RememberedPair | None, ticket: Ticket, caller: Caller) -> PairShown:
    """The pair, if a first verdict on it may be given now."""
    if _is_over(ticket):
        raise Gone("The time for a verdict on this pair is over.", code="pair_expired", param="token")
    if pair is None:
        message = "There is no such pair to judge: it was never complete, or one side was lost."
        raise NotFound(message, code="pair_not_found", param="pair_id")
    if pair.caller != caller.name:
        raise Forbidden("This pair was asked for with another key.", code="not_your_pair")
    return pair.shown
