"""Sampling by numbers worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
import torch

from serving.sampling import NUCLEUS_TOKENS, sample, summarise
from serving.sampling_rules import Rule

PROBABILITIES = (0.5, 0.3, 0.15, 0.05)
LOGITS = torch.tensor([PROBABILITIES]).log()


def draws(rule: Rule, count: int = 4_000) -> dict[int, float]:
    seen = Counter(sampled.token_id for sampled in sample(LOGITS.expand(count, 4), [rule] * count))
    return {token: times / count for token, times in seen.items()}


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draws(Rule(0.0, 1.0, 0, Random(1)), 20) == {0: 1.0}


def test_temperature_one_draws_by_probability() -> None:
    seen = draws(Rule(1.0, 1.0, 0, Random(1)))
    assert [seen[i] for i in range(4)] == pytest.approx(PROBABILITIES, abs=0.03)


def test_temperature_sharpens_as_the_formula_says() -> None:
    seen = draws(Rule(0.5, 1.0, 0, Random(1)))
    squares = [p * p for p in PROBABILITIES]
    assert [seen.get(i, 0.0) for i in range(4)] == pytest.approx([s / sum(squares) for s in squares], abs=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    seen = draws(Rule(1.0, 0.75, 0, Random(1)))  # 0.5 + 0.3 reach 0.75
    assert set(seen) == {0, 1}
    assert seen[0] == pytest.approx(0.5 / 0.8, abs=0.03)


def test_a_flat_distribution_over_a_large_vocabulary_is_cut_exactly() -> None:
    size = 4 * NUCLEUS_TOKENS
    rules = [Rule(1.0, 0.5, 0, Random(1))] * 5_000
    seen = {sampled.token_id for sampled in sample(torch.zeros(1, size).expand(5_000, size), rules)}
    assert len(seen) == pytest.approx(size / 2, rel=0.02)


def test_logprobs_are_those_of_the_plain_distribution() -> None:
    sampled = sample(LOGITS * 1.0, [Rule(0.0, 0.1, 2, Random(1))])[0]
    assert sampled.logprob == pytest.approx(math.log(0.5))
    assert [(token, round(math.exp(logprob), 3)) for token, logprob in sampled.top] == [(0, 0.5), (1, 0.3)]


def test_rows_do_not_influence_each_other() -> None:
    rows = torch.cat([LOGITS, LOGITS.flip(1), torch.full((1, 4), torch.nan)])
    first, second, broken = sample(rows, [Rule(0.0, 1.0, 0, Random(1))] * 3)
    assert (first.token_id, second.token_id) == (0, 3)
    assert first.is_finite and second.is_finite and not broken.is_finite


@pytest.mark.parametrize("spread", [1.0, 3.0, 6.0])
def test_rows_drawn_together_are_the_rows_drawn_one_by_one(spread: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(24, 5 * NUCLEUS_TOKENS) * spread
    logits[7] = torch.nan
    found = [
        sample(
            logits,
            [Rule((0.0, 0.7, 1.3)[i % 3], (1.0, 0.9, 0.5)[i // 3 % 3], (0, 5)[i % 2], Random(i)) for i in range(24)],
            summarise(logits) if together else None,
            together=together,
        )
        for together in (False, True)
    ]
    assert found[0] == found[1]
