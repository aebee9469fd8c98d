"""Pairs out to people who label, and their labels back in, in the formats of Label Studio and Argilla.

A task is a pair as it was shown: prompt, ``a``, ``b``. A label is one labeler's choice on it under one version of
the instructions, at a time where the tool tells it; it becomes a verdict of its own with an id that depends on these
and its source alone. So a file imported twice counts once, and labelers who contradict each other or themselves, or
who repeat themselves at another time, are all kept. Labelers are people: they go by ``labeler_name`` everywhere.
"""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import msgspec

from telemetry.conversation import conversation
from telemetry.events import Choice, LabelSource, Outcome, PairShown, PreferenceRecorded

Format = Literal["label-studio", "argilla"]
FORMATS: Final[tuple[Format, ...]] = ("label-studio", "argilla")
QUESTION: Final = "preference"
CHOICES: Final[tuple[Choice, ...]] = ("a", "b", "tie", "both_bad", "skip")
OUTCOMES: Final[dict[Choice, Outcome]] = {
    "a": "chosen_rejected",
    "b": "chosen_rejected",
    "tie": "tie",
    "both_bad": "both_bad",
    "skip": "skip",
}
LABEL_STUDIO_VIEW: Final = """\
<View>
  <Text name="prompt" value="$prompt"/>
  <Header value="a"/><Text name="a" value="$a"/>
  <Header value="b"/><Text name="b" value="$b"/>
  <Choices name="preference" toName="prompt" choice="single-radio" required="true">
    <Choice value="a"/><Choice value="b"/><Choice value="tie"/><Choice value="both_bad"/><Choice value="skip"/>
  </Choices>
</View>
"""
_NAMESPACE: Final = uuid.UUID("b52a5d0e-2a51-5c0b-9d0a-6d3a5b6b3b5d")


class Label(msgspec.Struct, frozen=True):
    """One labeler's choice on one pair."""

    pair_id: str
    labeler: str
    choice: Choice
    at: datetime | None = None
    decided_s: float = 0.0


class InvalidLabels(ValueError):
    """The file is no export of that tool with this project's question; the message says where."""


def labeler_name(key: bytes, labeler: str) -> str:
    """A labeler's keyed hash, 16 hex digits, by the deployment's key (``signing_key``); empty for none."""
    return hmac.new(key, b"labeler:" + labeler.encode(), hashlib.sha256).hexdigest()[:16] if labeler else ""


def judged(
    shown: PairShown, choice: Choice, *, event_id: str, at: datetime, decided_s: float, **fields: Any
) -> PreferenceRecorded:
    """The verdict ``choice`` on a pair, whole in itself; ``fields`` are further ones of the event."""
    is_b = choice == "b"
    return PreferenceRecorded(
        event_id=event_id,
        occurred_at=at,
        pair_id=shown.pair_id,
        policy=shown.policy,
        user=shown.user,
        prompt=shown.prompt,
        chosen=shown.b if is_b else shown.a,
        rejected=shown.a if is_b else shown.b,
        outcome=OUTCOMES[choice],
        chosen_position="a" if choice == "a" else "b" if is_b else "",
        propensity=shown.propensity,
        shown_at=shown.occurred_at,
        decided_s=decided_s,
        cohort=shown.cohort,
        cluster=shown.cluster,
        **fields,
    )


def label_event(
    shown: PairShown, label: Label, *, source: LabelSource, instructions: str, now: datetime
) -> PreferenceRecorded:
    """The label as an event whose id is the same each time; another choice or time of the label is another event."""
    at = label.at.astimezone(UTC).isoformat() if label.at else ""
    name = "\n".join((label.pair_id, source, label.labeler, label.choice, at, instructions))
    return judged(
        shown,
        label.choice,
        event_id=str(uuid.uuid5(_NAMESPACE, name)),
        at=now,
        labeled_at=label.at,
        decided_s=label.decided_s,
        source=source,
        labeler=label.labeler,
        instructions=instructions,
    )


def tasks(pairs: Iterable[PairShown], form: Format) -> Iterator[dict[str, Any]]:
    """The pairs as tasks of that tool."""
    for shown in pairs:
        prompt = "\n\n".join(
            f"{message['role']}: {message.get('content') or ''}" for message in conversation(shown.prompt)
        )
        fields = {"prompt": prompt, "a": shown.a.text, "b": shown.b.text}
        if form == "label-studio":
            yield {"data": {"pair_id": shown.pair_id, **fields}}
        else:
            yield {"id": shown.pair_id, "fields": fields, "metadata": {"policy": shown.policy, "cohort": shown.cohort}}


def labels(document: bytes, form: Format) -> list[Label]:
    """What people chose, as that tool exports it (JSON). Raises InvalidLabels."""
    try:
        found = list((_of_label_studio if form == "label-studio" else _of_argilla)(document))
    except msgspec.MsgspecError as error:
        raise InvalidLabels(f"no {form} export: {error}") from error
    if nameless := [label.pair_id for label in found if label.labeler in ("", "0")]:
        raise InvalidLabels(f"no {form} export of labels that have their labelers: pair {nameless[0]} has none")
    return found


# ---- Label Studio: JSON export -------------------------------------------------------------------------------------


class _Value(msgspec.Struct):
    choices: list[str] = []


class _Result(msgspec.Struct):
    from_name: str = ""
    value: _Value | None = None


class _Person(msgspec.Struct):
    email: str = ""
    id: int = 0


class _Annotation(msgspec.Struct):
    result: list[_Result] = []
    completed_by: int | _Person = 0
    created_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    lead_time: float | None = None
    was_cancelled: bool = False


class _Data(msgspec.Struct):
    pair_id: str


class _Task(msgspec.Struct):
    data: _Data
    annotations: list[_Annotation] = []


def _of_label_studio(document: bytes) -> Iterator[Label]:
    for task in msgspec.json.decode(document, type=list[_Task]):
        for annotation in task.annotations:
            chosen = [c for r in annotation.result if r.from_name == QUESTION and r.value for c in r.value.choices]
            if annotation.was_cancelled or not chosen:
                continue
            if len(chosen) > 1:
                raise InvalidLabels(f"pair {task.data.pair_id}: more than one choice in an annotation")
            by = annotation.completed_by
            labeler = str(by) if isinstance(by, int) else by.email or str(by.id)
            choice = _choice(chosen[0], task.data.pair_id)
            yield Label(task.data.pair_id, labeler, choice, annotation.created_at, annotation.lead_time or 0.0)


def _choice(value: str, pair_id: str) -> Choice:
    for choice in CHOICES:
        if choice == value:
            return choice
    raise InvalidLabels(f"pair {pair_id}: {value!r} is none of {', '.join(CHOICES)}")


# ---- Argilla 2: records as JSON ------------------------------------------------------------------------------------


class _Response(msgspec.Struct):
    user_id: str
    value: str | None = None


class _Record(msgspec.Struct):
    id: str
    responses: dict[str, list[_Response]] = {}


def _of_argilla(document: bytes) -> Iterator[Label]:
    for record in msgspec.json.decode(document, type=list[_Record]):
        for response in record.responses.get(QUESTION, []):
            if response.value is not None:  # else it was left open
                yield Label(record.id, response.user_id, _choice(response.value, record.id))
