"""How far behind the weights an answer's version is."""

from __future__ import annotations

from online_trainer.lineage import Lineage


def name(sequence: int) -> str:
    return f"v{sequence:06d}-aaaaaaaa"


def test_the_newest_version_before_another_that_users_met_is_found() -> None:
    lineage = Lineage(name(0))
    for sequence in range(1, 5):
        lineage = lineage.published(name(sequence))
    assert lineage.met_before(name(4)) == ""
    lineage = lineage.accepted(name(1)).accepted(name(3))
    assert [lineage.met_before(name(n)) for n in (1, 2, 3, 4, 9)] == ["", name(1), name(1), name(3), ""]
    assert lineage.fallen_back(name(2))[0].met_before(name(2)) == name(1)


def test_an_answer_older_than_all_that_is_remembered_is_no_fresh_one() -> None:
    lineage = Lineage(name(0))
    assert lineage.distance([name(7)]) == 0, "nothing was published yet"
    for sequence in range(1, 301):
        lineage = lineage.published(name(sequence))
    assert lineage.distance([name(300)]) == 0
    assert lineage.distance([name(299), name(250)]) == 1
    assert lineage.distance([name(140)]) == 160
    assert lineage.distance([name(2)]) == lineage.distance([name(0)]) == 200
