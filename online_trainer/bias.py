"""What makes people choose an answer apart from what it says: where it was shown, and how long it is.

A verdict is taken for σ(d + effects): d is what the policy shall learn, the effects are measured on the verdicts that
came last and taken out of the loss. Positions are drawn at random, so that their effect is no taste. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

RIDGE = 20.0  # as if so many verdicts had shown no effect: a handful proves none
NEWTON_STEPS = 8


class Traits(msgspec.Struct, frozen=True, array_like=True):
    """How a chosen answer differed from the rejected one."""

    position: float  # +1 where it was shown first, −1 where second, 0 unknown
    length: float  # −1 … 1, tanh of the logarithm of the ratio of lengths


class Effects(msgspec.Struct, frozen=True):
    """In nats: by how much a trait of 1 moves the choice."""

    position: float = 0.0
    length: float = 0.0

    def of(self, found: Traits, names: Sequence[str]) -> float:
        """What of a choice is due to those effects that are ``names``."""
        parts = {"position": self.position * found.position, "length": self.length * found.length}
        return sum(parts[name] for name in names)


def lengths_ratio(chosen: str, rejected: str) -> float:
    """``Traits.length`` of two texts."""
    return math.tanh(math.log((1 + len(chosen)) / (1 + len(rejected))))


def traits(position: str, chosen: str, rejected: str) -> Traits:
    """Of a choice: where chosen was shown ("a", "b" or unknown), and both texts."""
    return Traits({"a": 1.0, "b": -1.0}.get(position, 0.0), lengths_ratio(chosen, rejected))


def measured(samples: Sequence[Traits]) -> Effects:
    """The effects that make ``samples`` likeliest under P(chosen) = σ(effects · traits), with a ridge towards none.

    Newton's method on two numbers; the objective is strictly concave.
    """
    position = length = 0.0
    for _ in range(NEWTON_STEPS):
        slope_p, slope_l = -RIDGE * position / 4, -RIDGE * length / 4  # a verdict's information at no effect is 1/4
        curve_pp = curve_ll = RIDGE / 4
        curve_pl = 0.0
        for each in samples:
            share = 1 / (1 + math.exp(-(position * each.position + length * each.length)))
            slope_p += (1 - share) * each.position
            slope_l += (1 - share) * each.length
            weight = share * (1 - share)
            curve_pp += weight * each.position**2
            curve_ll += weight * each.length**2
            curve_pl += weight * each.position * each.length
        determinant = curve_pp * curve_ll - curve_pl**2
        position += (curve_ll * slope_p - curve_pl * slope_l) / determinant
        length += (curve_pp * slope_l - curve_pl * slope_p) / determinant
    return Effects(position, length)
