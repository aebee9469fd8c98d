"""Valid events for tests, numbered so that two are never mixed up."""

from __future__ import annotations

from datetime import UTC, datetime

from telemetry.events import (
    AuditRecorded,
    BatchTrained,
    Completion,
    CompletionServed,
    FeedbackRecorded,
    Message,
    Outcome,
    PairShown,
    PreferenceRecorded,
    PreferenceRetracted,
    ReleaseChanged,
    VersionPublished,
)

SHOWN_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
BASE = "v000000-00000000"


def completion(number: int, *, text: str = "", version: str = BASE) -> Completion:
    return Completion(
        completion_id=f"completion-{number}",
        text=text or f"answer {number}",
        variant="chat-main",
        version=version,
        channel="stable",
        finish_reason="stop",
        prompt_tokens=7,
        completion_tokens=3,
        ttft_s=0.1,
        duration_s=0.4,
        temperature=0.7,
        top_p=0.95,
    )


def prompt(number: int) -> tuple[Message, ...]:
    return (Message(role="system", content="Be kind."), Message(role="user", content=f"question {number}?"))


def pair(number: int) -> PairShown:
    return PairShown(
        pair_id=f"pair-{number}",
        request_id=f"request-{number}",
        policy="chat",
        user=f"user-{number % 5}",
        prompt=prompt(number),
        a=completion(2 * number),
        b=completion(2 * number + 1),
        propensity=0.5,
    )


def preference(number: int, *, outcome: Outcome = "chosen_rejected") -> PreferenceRecorded:
    return PreferenceRecorded(
        pair_id=f"pair-{number}",
        policy="chat",
        user=f"user-{number % 5}",
        prompt=prompt(number),
        chosen=completion(2 * number, text=f"good {number}"),
        rejected=completion(2 * number + 1, text=f"bad {number}"),
        outcome=outcome,
        chosen_position="a" if outcome == "chosen_rejected" else "",
        propensity=0.5,
        shown_at=SHOWN_AT,
        decided_s=2.5,
        reasons=("shorter",),
    )


def retraction(of: PreferenceRecorded) -> PreferenceRetracted:
    return PreferenceRetracted(preference_id=of.event_id, pair_id=of.pair_id, user=of.user)


def feedback(number: int) -> FeedbackRecorded:
    return FeedbackRecorded(
        completion_id=f"completion-{number}",
        policy="chat",
        user="user-1",
        prompt=prompt(number),
        completion=completion(number),
        rating=1,
    )


def served(number: int) -> CompletionServed:
    return CompletionServed(
        completion_id=f"completion-{number}",
        request_id=f"request-{number}",
        policy="chat",
        variant="chat-main",
        version=BASE,
        channel="stable",
        finish_reason="stop",
    )


def batch(step: int, ids: list[str], dropped: list[tuple[str, str]] | None = None) -> BatchTrained:
    return BatchTrained(
        batch_id=f"chat-main/{step:06d}",
        variant="chat-main",
        step=step,
        preference_ids=tuple(ids),
        dropped=tuple(dropped or ()),
    )


def published(version: str, ids: list[str], *, parent: str = BASE) -> VersionPublished:
    return VersionPublished(
        variant="chat-main",
        version=version,
        parent=parent,
        base="tiny",
        digest="d" * 64,
        uri=f"/versions/{version}",
        step=1,
        preference_ids=tuple(ids),
    )


def release(version: str, state: str) -> ReleaseChanged:
    return ReleaseChanged(variant="chat-main", version=version, state=state, stable=version, reason="test")  # type: ignore[arg-type]


def audit(number: int) -> AuditRecorded:
    return AuditRecorded(actor="ann", action="exported", subject=f"set {number}", details={"rows": "1"})
