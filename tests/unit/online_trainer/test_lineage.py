"""Which verdicts the weights have learned, through publications and refusals."""

from __future__ import annotations

from online_trainer.ingest import Verdict
from online_trainer.lineage import Lineage
from tests.unit.online_trainer.kit import START, intake, verdict

BASE = "v000000-00000000"


def verdicts(*numbers: int) -> list[Verdict]:
    found = intake()
    for number in numbers:
        found.record(verdict(number))
    return found.pending


def test_a_version_holds_what_was_learned_since_its_parent() -> None:
    lineage = Lineage(BASE).learned(verdicts(0, 1)).published("v1").learned(verdicts(2))
    assert lineage.parent == "v1" and lineage.preference_ids == ("preference-2",)
    assert lineage.descends_from("v1") and not lineage.descends_from("v2")


def test_the_oldest_verdict_is_that_of_the_present_version() -> None:
    lineage = Lineage(BASE).learned(verdicts(3)).learned(verdicts(0, 5))
    assert lineage.oldest_verdict_at == START
    assert lineage.published("v1").oldest_verdict_at is None


def test_a_step_on_earlier_verdicts_alone_counts_and_teaches_nothing_new() -> None:
    lineage = Lineage(BASE).learned(verdicts(3)).learned([])
    assert (lineage.steps, lineage.preference_ids) == (2, ("preference-3",))
    after = lineage.published("v1").learned([])
    assert (after.steps, after.preference_ids, after.oldest_verdict_at) == (1, (), None)


def test_a_refused_version_takes_its_descendants_with_it_and_what_they_learned_is_lost() -> None:
    lineage = Lineage(BASE).learned(verdicts(0)).published("v1").learned(verdicts(1)).published("v2")
    fallen, lost = lineage.learned(verdicts(2)).fallen_back("v1")
    assert fallen.parent == "v1" and fallen.preference_ids == ()
    assert lost == ("preference-1", "preference-2")
    assert fallen.descends_from("v1") and not fallen.descends_from("v2")


def test_falling_back_to_somebody_elses_version_loses_all_of_ours() -> None:
    fallen, lost = Lineage(BASE).learned(verdicts(0)).published("v1").fallen_back("v9-foreign")
    assert fallen.parent == "v9-foreign" and fallen.ancestors == ()
    assert lost == ("preference-0",)
