"""Which failures are asked again."""

from __future__ import annotations

from router.backends import RetryBudget


def test_a_tenth_of_the_requests_may_be_asked_again_beyond_the_reserve() -> None:
    budget = RetryBudget(ratio=0.125, reserve=4.0)
    retries = 0
    for _ in range(800):
        budget.earn()
        retries += budget.spend()
    assert retries == 4 + 99, "the first request found the reserve full"


def test_quiet_times_save_up_no_more_than_the_reserve() -> None:
    budget = RetryBudget(ratio=0.5, reserve=3.0)
    for _ in range(100):
        budget.earn()
    assert [budget.spend() for _ in range(5)] == [True, True, True, False, False]
