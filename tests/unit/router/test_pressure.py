"""The limit that finds itself, over a simulated replica: ``PLACES`` requests at a time, the others in a queue."""

from __future__ import annotations

import heapq
import random
import statistics
from collections import deque
from typing import NamedTuple

import pytest

from router.errors import Unavailable
from router.pressure import FORGET, ROOM, ConcurrencyLimit

PLACES = 16
LEAST, MOST = 4.0, 256.0


class Outcome(NamedTuple):
    """What a stretch of simulated time brought."""

    served_per_s: float
    refused: int
    waits_s: list[float]  # time to first token of those let in


class Simulation:
    """Poisson arrivals, a first token after half the service; time is simulated."""

    def __init__(self, service_s: float = 0.1, patience_s: float = 0.0) -> None:
        self.now_s, self.service_s = 0.0, service_s
        self.limit = ConcurrencyLimit(LEAST, MOST, patience_s=patience_s, clock=lambda: self.now_s)
        self._dice = random.Random(0)
        self._events: list[tuple[float, int, str, float]] = []
        self._waiting: deque[float] = deque()
        self._busy, self._number = 0, 0

    def run(self, rate: float, seconds: float) -> Outcome:
        waits: list[float] = []
        served = refused = 0
        end_s = self.now_s + seconds
        self._at(self.now_s, "arrival", 0.0)
        while self._events[0][0] < end_s:
            self.now_s, _, kind, asked_s = heapq.heappop(self._events)
            if kind == "arrival":
                self._at(self.now_s + self._dice.expovariate(rate), "arrival", 0.0)
                try:
                    self.limit.enter()
                except Unavailable:
                    refused += 1
                    continue
                self._waiting.append(self.now_s)
            elif kind == "first":
                self.limit.first_token(self.now_s - asked_s)
                waits.append(self.now_s - asked_s)
            else:
                self.limit.leave()
                self._busy -= 1
                served += 1
            while self._waiting and self._busy < PLACES:
                asked_s, self._busy = self._waiting.popleft(), self._busy + 1
                self._at(self.now_s + self.service_s / 2, "first", asked_s)
                self._at(self.now_s + self.service_s, "done", asked_s)
        self._events = [event for event in self._events if event[2] != "arrival"]
        heapq.heapify(self._events)
        self.now_s = end_s
        return Outcome(served / seconds, refused, waits)

    def _at(self, when_s: float, kind: str, asked_s: float) -> None:
        self._number += 1
        heapq.heappush(self._events, (when_s, self._number, kind, asked_s))


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def test_what_the_replica_can_do_is_let_in_whole() -> None:
    simulation = Simulation()
    calm = simulation.run(rate=80, seconds=120)
    assert calm.refused == 0
    assert calm.served_per_s == pytest.approx(80, rel=0.05)


@pytest.mark.parametrize("service_s", [0.02, 0.1, 1.0])
def test_four_times_too_much_is_served_at_full_speed_and_without_a_queue(service_s: float) -> None:
    simulation = Simulation(service_s)
    peak = PLACES / service_s
    calm = simulation.run(rate=0.5 * peak, seconds=60)
    simulation.run(rate=4 * peak, seconds=60)  # finds its limit
    flood = simulation.run(rate=4 * peak, seconds=120)
    assert flood.served_per_s >= 0.9 * peak
    assert p99(flood.waits_s) <= 2.5 * p99(calm.waits_s), "and the calm simulation has no spread at all"
    after = simulation.run(rate=0.5 * peak, seconds=30)
    assert after.refused <= 0.05 * 0.5 * peak * 30, "calm again, everybody is let in"


def test_many_long_answers_are_no_pressure() -> None:
    """Near the most that is allowed, with first tokens as quick as ever, nobody is refused."""
    now_s = 0.0
    limit = ConcurrencyLimit(LEAST, MOST, patience_s=0.0, clock=lambda: now_s)
    for _ in range(220):
        limit.enter()
    for _ in range(600):
        now_s += 0.1
        limit.enter()
        limit.first_token(0.05)
        limit.leave()
    assert limit.limit == MOST


def test_what_was_asked_before_the_window_began_is_not_held_against_the_present_limit() -> None:
    now_s = 0.0
    limit = ConcurrencyLimit(LEAST, MOST, patience_s=0.0, clock=lambda: now_s)
    for _ in range(64):
        limit.enter()

    def answer(seconds: float) -> None:
        for _ in range(16):
            limit.first_token(seconds)

    now_s = 1.0
    answer(0.05)
    now_s = 2.0
    answer(5.0)
    assert limit.limit == FORGET * MOST, "a quarter of it was used in the first window; the second began after those"
    now_s = 10.0
    answer(5.0)
    assert limit.limit < 64


def test_a_queue_shorter_than_the_patience_is_let_be() -> None:
    patient = Simulation(0.02, patience_s=0.5)
    patient.run(rate=400, seconds=30)
    flood = patient.run(rate=3000, seconds=120)
    assert 0.02 < statistics.median(flood.waits_s) < 0.7
    assert flood.served_per_s >= 0.9 * PLACES / 0.02


def test_slow_answers_to_few_are_no_queue_that_a_limit_could_shorten() -> None:
    simulation = Simulation(0.05)
    simulation.run(rate=60, seconds=30)
    simulation.service_s = 0.1
    simulation.run(rate=20, seconds=60)
    assert ROOM * LEAST <= simulation.limit.limit <= PLACES, "what nobody uses is forgotten, and not cut"


def test_a_flood_after_a_calm_time_meets_a_limit_near_what_was_needed() -> None:
    """Without it the first window lets in as many as the limit ever was."""
    simulation = Simulation(0.1)
    simulation.run(rate=80, seconds=60)
    first = simulation.run(rate=640, seconds=2)
    assert max(first.waits_s) < 1.0, "256 in line for 16 places wait 1.6 s"


def test_a_cut_by_a_mere_pause_heals_while_few_ask() -> None:
    now_s = 0.0
    limit = ConcurrencyLimit(LEAST, MOST, patience_s=0.0, clock=lambda: now_s)

    def window(in_flight: int, first_s: float) -> None:
        nonlocal now_s
        for _ in range(in_flight):
            limit.enter()
        now_s += 6.0
        for _ in range(16):
            limit.first_token(first_s)
        for _ in range(in_flight):
            limit.leave()

    window(6, 0.05)
    while limit.limit > LEAST:
        window(6 if limit.limit > 6 else int(limit.limit), 5.0)
    for _ in range(20):
        window(1, 0.05)
    assert limit.limit >= ROOM * LEAST


def test_longer_prompts_are_no_queue() -> None:
    """The time to the first token triples for good: after a probe that is the new calm, and the limit comes back."""
    simulation = Simulation(0.05)
    simulation.run(rate=160, seconds=60)
    simulation.service_s = 0.15
    simulation.run(rate=90, seconds=30)
    later = simulation.run(rate=90, seconds=60)
    assert later.refused <= 0.01 * 90 * 60
    assert simulation.limit.limit >= PLACES


def test_the_limit_never_closes() -> None:
    simulation = Simulation()
    for service_s in (0.01, 0.1, 1.0, 3.0):
        simulation.service_s = service_s
        simulation.run(rate=400, seconds=30)
        assert simulation.limit.limit >= LEAST


def test_a_refusal_says_so_at_once_and_takes_no_place() -> None:
    limit = ConcurrencyLimit(1.0, 1.0, patience_s=0.0)
    limit.enter()
    with pytest.raises(Unavailable) as refused:
        limit.enter()
    assert (refused.value.code, limit.in_flight) == ("overloaded", 1)
    limit.leave()
    limit.enter()
