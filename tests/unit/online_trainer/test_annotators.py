"""Who can be relied on."""

from __future__ import annotations

from online_trainer.annotators import Annotators


def test_who_contradicts_what_all_others_taught_loses_weight_and_gets_it_back() -> None:
    found = Annotators()
    assert found.weight("ann") == found.weight("bob") == 1.0
    for _ in range(8):
        found.saw("ann", 0.9)
        found.saw("bob", 0.05)
    assert found.weight("ann") == 1.0
    low = found.weight("bob")
    assert low < 0.5
    for _ in range(30):
        found.saw("bob", 0.9)
    assert low < found.weight("bob")


def test_a_policy_that_knows_nothing_suspects_nobody() -> None:
    found = Annotators()
    for _ in range(50):
        found.saw("ann", 0.5)
    assert found.weight("ann") == 1.0


def test_records_survive_and_the_erased_have_none() -> None:
    found = Annotators()
    for _ in range(20):
        found.saw("bob", 0.02)
    again = Annotators(found.records())
    assert again.weight("bob") == found.weight("bob") < 0.3
    again.forget("bob")
    assert again.weight("bob") == 1.0 and not again.records()
