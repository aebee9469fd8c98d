"""What is known about a version's answers: observations, their summary, and a bound on a win rate. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import sqrt
from statistics import fmean, median

import msgspec

from telemetry.events import CompletionServed

WINDOW = 64  # answers remembered per version
_STRANGE = re.compile(r"[^\W\d_]{21,}|[a-zß-ÿ][A-Z]|[A-Za-z]\d[A-Za-z]|\w_\w|\ufffd")


class Observation(msgspec.Struct, frozen=True, array_like=True):
    """One answer in numbers. An array on disk: windows of them are written often."""

    at_s: float  # unix time
    is_error: bool = False
    is_unsafe: bool = False
    ttft_s: float = 0.0
    tpot_s: float = 0.0  # seconds per token after the first
    tokens: int = 0
    repetition_ratio: float = 0.0
    surprise: float = 0.0  # mean −log-prob per token, nats
    strange_ratio: float = 0.0  # only where the text was at hand (probes)
    glued_ratio: float = 0.0  # likewise


class Summary(msgspec.Struct, frozen=True):
    """Observations of one version taken together; means and medians are over answers that did not fail."""

    answers: int
    errors: int
    unsafe: int
    empty_ratio: float
    ttft_s: float
    tpot_s: float
    tokens: float
    repetition_ratio: float
    surprise: float
    strange_ratio: float
    glued_ratio: float

    @property
    def error_ratio(self) -> float:
        return self.errors / max(1, self.answers + self.errors)

    @property
    def unsafe_ratio(self) -> float:
        return self.unsafe / max(1, self.answers)


def summarise(window: Iterable[Observation]) -> Summary:
    """The numbers guards look at; zeros when nothing was observed."""
    window = tuple(window)
    good = [seen for seen in window if not seen.is_error]
    told = [seen for seen in good if seen.tokens > 0 and not seen.is_unsafe] or good
    return Summary(
        answers=len(good),
        errors=len(window) - len(good),
        unsafe=sum(seen.is_unsafe for seen in good),
        empty_ratio=_mean(float(seen.tokens <= 1 and not seen.is_unsafe) for seen in good),
        ttft_s=median([seen.ttft_s for seen in told] or [0.0]),
        tpot_s=median([seen.tpot_s for seen in told] or [0.0]),
        tokens=_mean(seen.tokens for seen in told),
        repetition_ratio=_mean(seen.repetition_ratio for seen in told),
        surprise=_mean(seen.surprise for seen in told),
        strange_ratio=_mean(seen.strange_ratio for seen in told),
        glued_ratio=_mean(seen.glued_ratio for seen in told),
    )


def observe(event: CompletionServed) -> Observation:
    """The numbers of an answer that went out, or failed. A cancelled answer is no error of the version."""
    further = max(1, event.completion_tokens - 1)
    return Observation(
        at_s=event.occurred_at.timestamp(),
        is_error=bool(event.error) or event.finish_reason == "error",
        is_unsafe=event.is_unsafe,
        ttft_s=event.ttft_s,
        tpot_s=max(0.0, event.duration_s - event.ttft_s) / further,
        tokens=event.completion_tokens,
        repetition_ratio=event.repetition_ratio,
        surprise=-event.mean_logp,
    )


def remember(window: tuple[Observation, ...], seen: Observation) -> tuple[Observation, ...]:
    """``window`` with ``seen`` at its end, the oldest dropped beyond WINDOW."""
    return (*window, seen)[-WINDOW:]


def strange_ratio(text: str) -> float:
    """Share of words that look like none: inner capitals, digits between letters, over 20 letters long."""
    words = text.split()
    return _mean(float(_STRANGE.search(word) is not None) for word in words)


def glued_ratio(tokens: Sequence[str]) -> float:
    """Share of tokens that go on with the word before them, letter to letter.

    Language keeps it low (0.01 to 0.05 in English, 0.16 in a small model's poor French); tokens drawn at random
    from a vocabulary have about 0.3, whatever else they look like.
    """
    neighbours = pairwise(tokens)
    return _mean(float(before[-1:].isalpha() and after[:1].isalpha()) for before, after in neighbours)


def wilson_upper(wins: float, trials: float, z: float) -> float:
    """Upper end of Wilson's score interval (1927) for a share; 1 when there were no trials."""
    if trials <= 0:
        return 1.0
    share, z2 = wins / trials, z * z
    centre = share + z2 / (2 * trials)
    spread = z * sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return min(1.0, (centre + spread) / (1 + z2 / trials))


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return fmean(values) if values else 0.0
