"""The learning curve as a PNG: win rate against the base while clicks come in, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec


class Point(msgspec.Struct, frozen=True):
    """One look at stable."""

    clicks: int
    at_s: float
    win_rate: float
    prompts: int
    version: str


class Mark(msgspec.Struct, frozen=True):
    """Something that happened after so many clicks."""

    clicks: int
    at_s: float
    text: str


def wilson(win_rate: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); ties count half, which makes it a little too wide."""
    if count == 0:
        return 0.0, 1.0
    centre = (win_rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(win_rate * (1 - win_rate) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def draw(points: Sequence[Point], marks: Sequence[Mark], title: str, path: Path) -> None:
    """Write the picture to ``path``."""
    from matplotlib.figure import Figure  # a second to load, and only at the end

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    x = [point.clicks for point in points]
    bounds = [wilson(point.win_rate, point.prompts) for point in points]
    axes.axhline(0.5, color="0.6", linewidth=1, linestyle="--")
    axes.fill_between(x, [low for low, _ in bounds], [high for _, high in bounds], alpha=0.15, color="tab:blue")
    axes.plot(x, [point.win_rate for point in points], marker="o", color="tab:blue")
    for point in points:
        axes.annotate(
            f"{point.win_rate:.2f}",
            (point.clicks, point.win_rate),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
        )
    for mark in marks:
        axes.axvline(mark.clicks, color="tab:green", linewidth=0.7, alpha=0.5)
    axes.set(xlabel="clicks", ylabel="win rate of stable against the base", ylim=(0, 1.05), title=title)
    axes.text(
        0.99, 0.02, "green: a new version became stable", transform=axes.transAxes, ha="right", fontsize=8, color="0.4"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
