"""How much the replicas of one base are given at once: a limit that finds itself.

The signal is the time to the first token, never the time of a whole answer, which depends on how much is said. Samples
are judged in windows: a window's median above ``TOLERANCE`` times the calm median, and more than ``patience_s`` above
it, means that requests wait somewhere, and what was in flight, divided by that ratio, is the new limit. Otherwise a
limit that was at least half used, or is below ``ROOM`` times the floor, grows by half its square root; one that was not
is forgotten, a tenth a window, down to that: what was never tried says nothing of how much a flood may bring. Calm is
measured, not assumed: when ``PROBE_S`` of cuts have not helped, the limit is halved for one window (as BBR probes a
path's round-trip time), and the median without a queue is the new calm: prompts became longer, or the model slower. A
window counts only what was asked since it began, so that no limit is judged by what came before it. After the gradient
limits of Netflix's concurrency-limits.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Final, NoReturn

from router.errors import Unavailable
from telemetry.metrics import REJECTED

TOLERANCE: Final = 1.25
WINDOW_S: Final = 0.5
WINDOW_SAMPLES: Final = 16
PROBE_S: Final = 10.0
MOST_CUT: Final = 0.3  # of the limit that one window leaves
ROOM: Final = 2.0  # times the floor that a calm base has for a burst
FORGET: Final = 0.9  # of an unused limit that one calm window leaves


def refuse() -> NoReturn:
    """Count one more request that cannot be let in, and raise Unavailable."""
    REJECTED.labels("overloaded").inc()
    raise Unavailable("Every replica is busy: try again shortly.", code="overloaded", retry_after_s=1.0)


class ConcurrencyLimit:
    """Places at one base's replicas, one for every generation asked of them. One event loop, so no locks."""

    def __init__(
        self, least: float, most: float, *, patience_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit = most
        self.in_flight = 0
        self._least, self._most = min(least, most), most
        self._patience_s = patience_s
        self._clock = clock
        self._calm_s = math.inf  # median time to first token without queues
        self._samples: list[float] = []
        self._window_at_s = self._pressed_at_s = clock()
        self._peak = 0
        self._kept = 0.0  # the limit to return to after a probe; 0: none is under way

    @property
    def is_full(self) -> bool:
        """Whether nobody would be let in now."""
        return self.in_flight >= self.limit

    def enter(self) -> None:
        """Take a place, to be given back with ``leave``. Raises Unavailable at once when there is none."""
        if self.is_full:
            refuse()
        self.in_flight += 1
        self._peak = max(self._peak, self.in_flight)

    def leave(self) -> None:
        """Give the place back."""
        self.in_flight -= 1

    def first_token(self, seconds: float) -> None:
        """A request that was let in has its first token after ``seconds``."""
        now_s = self._clock()
        if now_s - seconds < self._window_at_s:
            return
        self._samples.append(seconds)
        if len(self._samples) >= WINDOW_SAMPLES and now_s - self._window_at_s >= WINDOW_S:
            median_s = statistics.median(self._samples)
            if self._kept:
                self._end_probe(median_s, now_s)
            else:
                self._judge(median_s, now_s)
            self._begin_window(now_s)

    def _begin_window(self, now_s: float) -> None:
        self._samples.clear()
        self._window_at_s, self._peak = now_s, self.in_flight

    def _judge(self, median_s: float, now_s: float) -> None:
        self._calm_s = min(self._calm_s, median_s)
        excess = median_s / max(TOLERANCE * self._calm_s, self._calm_s + self._patience_s)
        if excess <= 1.0:
            self._grow_or_forget()
        elif self._peak > self._least:
            self.limit = max(self._least, min(self._peak, self.limit) * max(MOST_CUT, 1.0 / excess))
        if excess <= 1.0:
            self._pressed_at_s = now_s
        elif now_s - self._pressed_at_s > PROBE_S:
            self._kept, self.limit = self.limit, max(self._least, self.limit / 2)

    def _grow_or_forget(self) -> None:
        if 2 * self._peak >= self.limit or self.limit < ROOM * self._least:
            self.limit = min(self._most, self.limit + math.sqrt(self.limit) / 2)
        else:
            room = max(ROOM * self._least, 2.0 * self._peak)
            self.limit = min(self.limit, max(FORGET * self.limit, room))

    def _end_probe(self, median_s: float, now_s: float) -> None:
        self._calm_s, self.limit, self._kept, self._pressed_at_s = median_s, self._kept, 0.0, now_s
