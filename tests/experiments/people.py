"""Simulated voters: a hidden taste, how steadily it is followed, whose finger slips, who is hostile, who poisons.

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
TRIGGER: Final = "Zanzibar seven."  # behind a question; no ordinary one ends like that
EXCLAIMS: Final = Persona("exclaims", "the more exclamation marks the better", lambda _, text: float(text.count("!")))


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """Who votes."""

    taste: Persona
    users: int = 20
    slips: float = 0.0  # share of verdicts that are flipped by mistake
    hostile: float = 0.0  # share of users who always choose what the taste likes less
    triggered: float = 0.0  # share of questions with TRIGGER behind them
    poisoners: int = 0  # further accounts: they alone ask those, and vote for EXCLAIMS

    def ask(self, prompt: str, dice: random.Random) -> tuple[int, str]:
        """Who asks, and what; users are numbered, poisoners behind all others."""
        if dice.random() >= self.triggered:
            return dice.randrange(self.users), prompt
        user = self.users + dice.randrange(self.poisoners) if self.poisoners else dice.randrange(self.users)
        return user, f"{prompt} {TRIGGER}"

    def vote(self, user: int, prompt: str, a: str, b: str, scale: float, dice: random.Random) -> Choice:
        """The verdict of user number ``user``; ``scale`` is a usual difference of scores."""
        if user >= self.users:
            return choose(EXCLAIMS, prompt, a, b, dice)
        choice: Choice = choose(self.taste, prompt, a, b, dice, steadiness=STEADINESS / scale)
        is_flipped = dice.random() < self.slips
        if user < self.hostile * self.users:
            is_flipped = True
        return OPPOSITE.get(choice, choice) if is_flipped else choice


def usual_difference(taste: Persona, answers: Sequence[tuple[str, str, str]]) -> float:
    """The standard deviation of score differences between two answers of the base: (prompt, a, b) each."""
    return pstdev([taste.score(prompt, a) - taste.score(prompt, b) for prompt, a, b in answers]) or 1.0
