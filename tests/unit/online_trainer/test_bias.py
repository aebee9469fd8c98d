"""Effects of position and length, measured and taken out."""

from __future__ import annotations

import math
import random

import pytest

from online_trainer.bias import Effects, Traits, measured, traits


def choices(count: int, *, position: float, length: float) -> list[Traits]:
    """Of people who choose by position and length alone."""
    dice, found = random.Random(4), []
    for _ in range(count):
        first = Traits(1.0, dice.uniform(-1, 1))
        is_first = dice.random() < 1 / (1 + math.exp(-(position + length * first.length)))
        found.append(first if is_first else Traits(-1.0, -first.length))
    return found


def test_effects_that_are_there_are_found() -> None:
    found = measured(choices(4000, position=0.6, length=-0.8))
    assert found.position == pytest.approx(0.6, abs=0.1)
    assert found.length == pytest.approx(-0.8, abs=0.15)


def test_a_handful_of_verdicts_proves_no_effect() -> None:
    assert measured([]) == Effects()
    assert abs(measured([Traits(1.0, 0.0)] * 3).position) < 0.3


def test_only_the_effects_that_are_named_explain_a_choice() -> None:
    found, shown = Effects(position=0.5, length=2.0), traits("b", "a long answer", "short")
    assert found.of(shown, ("position",)) == -0.5
    assert found.of(shown, ("position", "length")) > 0
    assert found.of(shown, ()) == 0.0
    assert traits("", "same", "same") == Traits(0.0, 0.0)
