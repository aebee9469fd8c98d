"""Pairs as tasks of the tools that people label with, and what comes back: each label once, none overwritten."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from telemetry.events import Choice, utc_now
from telemetry.labeling import LABEL_STUDIO_VIEW, Format, InvalidLabels, Label, label_event, labeler_name, labels, tasks
from tests import examples

SHOWN = examples.pair(1)
MONDAY = "2026-01-05T03:04:05Z"


def label_studio(*annotations: dict[str, Any]) -> bytes:
    (task,) = tasks([SHOWN], "label-studio")
    return msgspec.json.encode([{"id": 7, **task, "annotations": list(annotations), "meta": {}}])


def annotation(choice: str, **fields: Any) -> dict[str, Any]:
    result = {
        "id": "x",
        "from_name": "preference",
        "to_name": "prompt",
        "type": "choices",
        "value": {"choices": [choice]},
    }
    return {"id": 1, "result": [result], "completed_by": {"id": 3, "email": "eva@example.org"}} | fields


def argilla(*responses: dict[str, Any]) -> bytes:
    (task,) = tasks([SHOWN], "argilla")
    return msgspec.json.encode([{**task, "status": "completed", "responses": {"preference": list(responses)}}])


@pytest.mark.parametrize("form", ["label-studio", "argilla"])
def test_a_task_is_the_pair_as_it_was_shown_and_tells_no_version(form: Format) -> None:
    (task,) = tasks([SHOWN], form)
    fields = task["data"] if form == "label-studio" else task["fields"]
    assert (fields["a"], fields["b"]) == (SHOWN.a.text, SHOWN.b.text)
    assert "question 1?" in fields["prompt"]
    assert SHOWN.a.version not in msgspec.json.encode(task).decode()


def test_what_label_studio_exports_is_read() -> None:
    document = label_studio(
        annotation("b", created_at="2026-01-02T03:04:05.123456Z", lead_time=12.5),
        annotation("tie", completed_by=4),
        annotation("a", was_cancelled=True),
        {"result": [{"from_name": "topic", "value": {"choices": ["gardens"]}}]},
    )
    first, second = labels(document, "label-studio")
    assert (first.pair_id, first.labeler, first.choice, first.decided_s) == (
        SHOWN.pair_id,
        "eva@example.org",
        "b",
        12.5,
    )
    assert first.at is not None
    assert first.at.year == 2026
    assert (second.labeler, second.choice) == ("4", "tie")
    for choice in ("a", "b", "tie", "both_bad", "skip"):
        assert f'value="{choice}"' in LABEL_STUDIO_VIEW


def test_what_argilla_exports_is_read() -> None:
    left_open = {"value": None, "user_id": "u3"}
    found = labels(argilla({"value": "a", "user_id": "u1"}, {"value": "b", "user_id": "u2"}, left_open), "argilla")
    assert [(label.labeler, label.choice) for label in found] == [("u1", "a"), ("u2", "b")]


@pytest.mark.parametrize(
    ("form", "document"),
    [
        ("label-studio", b"{"),
        ("label-studio", b'{"data": {}}'),
        ("label-studio", b'[{"data": {}}]'),
        ("label-studio", label_studio(annotation("better"))),
        ("argilla", argilla({"value": "left"})),
        ("argilla", b"\xff"),
        ("argilla", argilla({"value": "a", "user_id": ""})),
        ("argilla", argilla({"value": "a"})),
        ("label-studio", label_studio(annotation("a", completed_by=0))),
        ("label-studio", label_studio(annotation("a", created_at="2026-01-02T03:04:05"))),
    ],
)
def test_another_file_is_refused_with_the_place(form: Format, document: bytes) -> None:
    with pytest.raises(InvalidLabels, match=f"{form}|none of"):
        labels(document, form)


@pytest.mark.parametrize(
    ("choice", "chosen", "outcome", "position"),
    [
        ("a", "a", "chosen_rejected", "a"),
        ("b", "b", "chosen_rejected", "b"),
        ("tie", "a", "tie", ""),
        ("skip", "a", "skip", ""),
    ],
)
def test_a_label_is_a_verdict_with_its_labeler(choice: Choice, chosen: str, outcome: str, position: str) -> None:
    label, now = Label(SHOWN.pair_id, "eva", choice, at=examples.SHOWN_AT, decided_s=2.0), utc_now()
    event = label_event(SHOWN, label, source="labeler", instructions="2026-01", now=now)
    assert (event.occurred_at, event.labeled_at) == (now, examples.SHOWN_AT), "an import is no click of long ago"
    assert event.chosen == getattr(SHOWN, chosen)
    assert (event.outcome, event.chosen_position, event.user) == (outcome, position, SHOWN.user)
    assert (event.source, event.labeler, event.instructions, event.decided_s) == ("labeler", "eva", "2026-01", 2.0)


def ids_of(document: bytes, instructions: str = "1") -> list[str]:
    found = labels(document, "label-studio")
    events = [label_event(SHOWN, each, source="labeler", instructions=instructions, now=utc_now()) for each in found]
    return [event.event_id for event in events]


def test_a_file_imported_twice_is_the_same_events_and_contradictions_are_two() -> None:
    document = label_studio(annotation("a", created_at=MONDAY), annotation("b", completed_by=4))
    assert ids_of(document) == ids_of(document)
    assert len({*ids_of(document), *ids_of(document, "2")}) == 4


def test_another_choice_of_the_same_labeler_is_a_second_verdict() -> None:
    choices = ("a", "b", "tie", "both_bad", "skip")
    assert len(set(ids_of(label_studio(*(annotation(choice) for choice in choices))))) == 5


def test_the_same_choice_at_another_time_is_a_repeat_that_is_kept() -> None:
    monday, tuesday, again = ids_of(
        label_studio(
            annotation("a", created_at=MONDAY),
            annotation("a", created_at="2026-01-06T03:04:05Z"),
            annotation("a", created_at="2026-01-05T05:04:05+02:00"),
        )
    )
    assert monday == again, "one moment, written in another zone"
    assert monday != tuesday


def test_a_labeler_goes_by_a_keyed_hash_and_nobody_by_none() -> None:
    # printf labeler:eva@example.org | openssl dgst -sha256 -hmac key
    assert labeler_name(b"key", "eva@example.org") == "aa42ab85d752ab1a"
    assert labeler_name(b"another key", "eva@example.org") != labeler_name(b"key", "eva@example.org")
    assert labeler_name(b"key", "") == ""
