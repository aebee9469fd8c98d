"""Thumbs on single answers: durable before they are acknowledged, on text that we served."""

from __future__ import annotations

from redis.exceptions import RedisError

from router.admission import Caller
from router.answers import FeedbackReceipt
from router.errors import Forbidden, Gone, NotFound, Unavailable
from router.ledger import Ledger
from router.pairs import derived_id, pseudonym
from router.schema import FeedbackRequest
from telemetry import metrics
from telemetry.events import FeedbackRecorded
from telemetry.people import Forgotten, KeysAway, KeyUnusable
from telemetry.sealing import SHAPES


async def record_feedback(body: FeedbackRequest, caller: Caller, *, key: bytes, ledger: Ledger) -> FeedbackReceipt:
    """The receipt of a durable thumb; the same thumb again carries the same event id. Raises RouterError."""
    try:
        kept = await ledger.recall_completion(body.completion_id)
    except (RedisError, OSError) as error:
        raise Unavailable("Answers cannot be read now.", code="state_unavailable", retry_after_s=1.0) from error
    if kept is None:
        message = "There is no such single answer, or its time is over; pairs take verdicts instead."
        raise NotFound(message, code="completion_not_found", param="completion_id")
    if kept.caller != caller.name or (body.user and pseudonym(key, body.user) != kept.user):
        raise Forbidden("This answer was given to another user.", code="not_your_completion")
    private = ledger.private
    bare = FeedbackRecorded(
        event_id=derived_id("feedback", body.completion_id, str(body.rating)),
        completion_id=body.completion_id,
        policy=kept.policy,
        user=kept.user,
        prompt=kept.prompt,
        completion=kept.completion,
        rating=body.rating,
        comment=body.comment or "",
    )
    try:
        event = await private.redacted(bare, SHAPES[FeedbackRecorded])
        await ledger.durable(event, key_id=kept.key_id or await private.key_of(kept.user))
    except Forgotten as error:
        raise Gone("This answer was erased with its user's data.", code="erased") from error
    except (KeyUnusable, KeysAway, OSError) as error:
        raise Unavailable("This answer cannot be read now.", code="keys_unavailable", retry_after_s=1.0) from error
    metrics.FEEDBACK.labels(kept.completion.variant, kept.completion.version, str(body.rating)).inc()
    return FeedbackReceipt(event.event_id, body.completion_id, body.rating, event.occurred_at)
