"""Simulated voters: a hidden taste, how steadily it is followed, how often the finger slips, and who is hostile.

A taste is a function of text that no trainer sees. A choice is drawn from Bradley-Terry on its scores, whose scale is
set by how much two answers of the base differ.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import pstdev
from typing import Final

import msgspec

from deploy.personas import Persona, choose
from telemetry.events import Choice

STEADINESS: Final = 3.0  # nats for a difference of one standard deviation: chosen rightly in 19 of 20
OPPOSITE: Final[dict[Choice, Choice]] = {"a": "b", "b": "a"}


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """Who votes."""

    taste: Persona
    users: int = 20
    slips: float = 0.0  # share of verdicts that are flipped by mistake
    hostile: float = 0.0  # share of users who always choose what the taste likes less

    def vote(self, user: int, prompt: str, a: str, b: str, scale: float, dice: random.Random) -> Choice:
        """The verdict of user number ``user``; ``scale`` is a usual difference of scores."""
        choice: Choice = choose(self.taste, prompt, a, b, dice, steadiness=STEADINESS / scale)
        is_flipped = dice.random() < self.slips
        if user < self.hostile * self.users:
            is_flipped = True
        return OPPOSITE.get(choice, choice) if is_flipped else choice


def usual_difference(taste: Persona, answers: Sequence[tuple[str, str, str]]) -> float:
    """The standard deviation of score differences between two answers of the base: (prompt, a, b) each."""
    return pstdev([taste.score(prompt, a) - taste.score(prompt, b) for prompt, a, b in answers]) or 1.0
