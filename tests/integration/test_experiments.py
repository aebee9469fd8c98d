"""The experiments' own machinery: voters are who they say, and the product's trainer learns from them."""

from __future__ import annotations

import random
from pathlib import Path

from msgspec.structs import replace

from deploy.personas import Persona
from tests.experiments.circle import PAIRS_A_ROUND, circle
from tests.experiments.people import Crowd, usual_difference
from tests.unit.online_trainer.kit import CONFIG, tiny_folder

LONG = Persona("long", "the more letters the better", lambda _, text: float(len(text)))


def votes(crowd: Crowd, user: int, count: int = 2000) -> float:
    """Share of verdicts for the better answer, which differs by one usual difference."""
    dice = random.Random(3)
    return sum(crowd.vote(user, "?", "aaaa", "aa", 2.0, dice) == "a" for _ in range(count)) / count


def test_who_slips_and_who_is_hostile_votes_so() -> None:
    steady = votes(Crowd(taste=LONG), 0)
    assert 0.93 < steady < 0.97  # Bradley-Terry: σ(3)
    slipping = votes(Crowd(taste=LONG, slips=0.3), 0)
    assert abs(slipping - (0.7 * steady + 0.3 * (1 - steady))) < 0.04
    crowd = Crowd(taste=LONG, users=20, hostile=0.1)
    assert [votes(crowd, user) < 0.5 for user in range(4)] == [True, True, False, False]


def test_the_usual_difference_of_equal_answers_is_no_zero() -> None:
    assert usual_difference(LONG, [("?", "aa", "bb")]) == 1.0


def test_clicks_become_steps_of_the_products_trainer_and_a_look_compares_with_the_base(tmp_path: Path) -> None:
    config = replace(CONFIG, model=str(tiny_folder(tmp_path)), batch_pairs=PAIRS_A_ROUND, max_pairs_per_user=0)
    with circle(config, seed=1) as own:
        before = own.look(LONG)
        own.click(Crowd(taste=LONG), 2 * PAIRS_A_ROUND)
        own.rest()
        after = own.look(LONG)
        told = [name for batch in own.log.batches for name in (*batch.preference_ids, *dict(batch.dropped))]
    assert (before.clicks, before.win_rate) == (0, 0.5), "the base is as good as itself"
    assert after.clicks == 16 and sorted(told) == sorted(f"preference-{n}" for n in range(16))
    assert own.log.published
