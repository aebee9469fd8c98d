"""What is kept of the way through the lower layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from online_trainer.examples import Examples
from online_trainer.ingest import Caps, Verdict
from online_trainer.policy import Policy
from online_trainer.safety import Scorer
from tests.unit.online_trainer.kit import intake, verdict, with_settings

BASE = "v000000-00000000"


def verdicts(count: int) -> list[Verdict]:
    own = intake()
    for number in range(count):
        own.record(verdict(number))
    return own.next_batch(Caps(count))


def kept(examples: Examples, given: Sequence[Verdict]) -> list[bool]:
    return [each.preference_id in examples._known for each in given]


def test_what_was_used_least_lately_makes_room_and_is_the_same_when_it_is_wanted_again(policy: Policy) -> None:
    given = verdicts(4)
    (one,) = Examples(policy, with_settings(), BASE).of(given[:1])
    examples = Examples(policy, with_settings(cached_tokens=3 * one.encoded.tokens.total), BASE)
    before = examples.of(given[:3])
    assert kept(examples, given) == [True, True, True, False]
    examples.of(given[:1])
    examples.of(given[3:])
    assert kept(examples, given) == [True, False, True, True]
    (again,) = examples.of(given[1:2])
    assert torch.allclose(again.encoded.hidden_TD, before[1].encoded.hidden_TD, atol=1e-5)


def test_a_step_of_more_than_the_room_has_all_its_examples(policy: Policy) -> None:
    examples = Examples(policy, with_settings(cached_tokens=1), BASE)
    given = verdicts(4)
    assert [each.preference_id for each in examples.of(given)] == [each.preference_id for each in given]
    assert examples.tokens == 0


def test_a_pair_that_the_scorer_fails_on_is_learned_from_without_its_word(policy: Policy) -> None:
    def score(text: str) -> float:
        if text == "no no":
            raise ConnectionError("the service is away")
        return 1.0

    config = with_settings(safety_weight=1.0)
    own = intake()
    own.record(verdict(1, chosen="yes", rejected="maybe"))
    own.record(verdict(2))
    examples = Examples(policy, config, BASE, Scorer("score", score, "chat-main"))
    assert [each.safety_gap for each in examples.of(own.next_batch(Caps(2)))] == [0.0, 0.0]
    harsh = Examples(policy, config, BASE, Scorer("length", lambda text: len(text) / 10, "chat-main"))
    assert [round(each.safety_gap, 6) for each in harsh.of(own.next_batch(Caps(2)))] == [-0.2, 0.3]
