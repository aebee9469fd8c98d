"""Sets of verdicts are told apart by what people prefer in them, and by nothing else."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from telemetry.drift import counts, divergences
from telemetry.events import PreferenceRecorded
from tests import examples

SHORT, LONG = "Yes.", "Yes, and I would like to say why that is so."


def verdicts(count: int, chosen: str, rejected: str, position: str = "a") -> list[PreferenceRecorded]:
    found = []
    for number in range(count):
        one = examples.preference(number)
        sides = {"chosen": replace(one.chosen, text=chosen), "rejected": replace(one.rejected, text=rejected)}
        found.append(replace(one, **sides, chosen_position=position))  # type: ignore[arg-type]
    return found


def test_what_turned_is_named_first_and_measured() -> None:
    old, new = counts(verdicts(30, SHORT, LONG)), counts([*verdicts(15, SHORT, LONG), *verdicts(15, LONG, SHORT)])
    found = divergences(old, new)
    assert next(iter(found)) in ("length", "long sentences")
    more, less, none = 15.5 / 31.5, 15.5 / 31.5, 0.5 / 31.5
    expected = more * math.log(more / none) + less * math.log(less / (30.5 / 31.5))
    assert found["length"] == pytest.approx(expected)
    assert found["position"] == pytest.approx(0.0)


def test_the_same_preferences_on_other_texts_are_no_drift() -> None:
    found = divergences(counts(verdicts(40, SHORT, LONG)), counts(verdicts(40, "No!", "No! " + LONG)))
    assert found["length"] == pytest.approx(0.0)


def test_ties_say_nothing_and_an_empty_set_is_no_error() -> None:
    tied = [replace(each, outcome="tie") for each in verdicts(5, SHORT, LONG)]
    assert counts(tied) == counts([])
    assert all(value == 0 for value in divergences(counts(tied), counts([])).values())


def test_a_habit_of_taking_the_first_is_seen() -> None:
    found = divergences(counts(verdicts(20, SHORT, LONG, "b")), counts(verdicts(20, SHORT, LONG, "a")))
    assert next(iter(found)) == "position"
