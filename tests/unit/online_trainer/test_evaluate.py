"""What is measured before anyone meets a version."""

from __future__ import annotations

import math

import pytest
import torch

from online_trainer.batches import pack
from online_trainer.evaluate import (
    PROBE_TEMPERATURE,
    Drift,
    astray,
    base_yardsticks,
    divergence,
    heldout,
    judged,
    probe,
    probe_prompts,
    safety,
    sample,
    unjudged,
)
from online_trainer.policy import Policy
from online_trainer.safety import Scorer
from telemetry.text import repetition_ratio
from tests.unit.online_trainer.kit import CONFIG, tokens, with_settings
from tests.unit.online_trainer.test_policy import scramble

GATE_METRICS = {"kl_per_token", "probe_repetition", "probe_length_tokens", "probe_entropy", "probe_perplexity"}
PROBED = GATE_METRICS | {"probe_diversity"}


def test_divergence_of_two_coins_worked_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    found = divergence(p, q)
    assert found.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found.entropy == pytest.approx(math.log(2))
    assert found.surprise == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3))


def test_surprise_is_expected_at_the_temperature_that_the_answers_are_drawn_at() -> None:
    p, q = torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.25, 0.75]]).log()
    first, second = (share ** (1 / PROBE_TEMPERATURE) for share in (0.2, 0.8))
    expected = (first * math.log(4) + second * math.log(4 / 3)) / (first + second)
    assert divergence(p, q).surprise == pytest.approx(expected)


def test_drift_is_zero_at_the_base_and_grows_with_what_was_learned(policy: Policy) -> None:
    drift = Drift(policy, [tokens(3, 6, 6)])
    assert drift.kl_per_token() == pytest.approx(0.0, abs=1e-6)
    scramble(policy, 0.05)
    near = drift.kl_per_token()
    scramble(policy, 0.3)
    assert 0 < near < drift.kl_per_token()


def test_answers_are_reproducible_by_seed_and_end_at_the_end_token(policy: Policy) -> None:
    prompts = probe_prompts(policy, CONFIG.probes, 100)
    first = sample(policy, prompts, tokens=8, temperature=1.0, seed=1)
    again = sample(policy, prompts, tokens=8, temperature=1.0, seed=1)
    assert (first.rows, first.texts) == (again.rows, again.texts) and torch.equal(first.logits_MV, again.logits_MV)
    assert first.texts != sample(policy, prompts, tokens=8, temperature=1.0, seed=2).texts
    end = policy.tokenizer.eos_token_id
    assert all(1 <= len(row.chosen) <= 8 and end not in row.chosen[:-1] for row in first.rows)


def test_the_logits_that_answers_were_drawn_from_are_the_policys_at_their_tokens(policy: Policy) -> None:
    scramble(policy)
    answers = sample(policy, probe_prompts(policy, CONFIG.probes, 100), tokens=40, temperature=1.0, seed=3)
    rows = pack(answers.spoken())
    with torch.no_grad():
        expected_MV = policy.upper(rows, policy.lower(rows))
    assert torch.allclose(answers.logits_MV, expected_MV, atol=1e-3)


def test_sampling_leaves_the_processs_random_numbers_alone(policy: Policy) -> None:
    prompts = probe_prompts(policy, CONFIG.probes, 100)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    sample(policy, prompts, tokens=4, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), wanted)


def test_the_probe_gives_every_number_that_the_release_gate_reads(policy: Policy) -> None:
    prompts = probe_prompts(policy, CONFIG.probes, 100)
    _, base = base_yardsticks(policy, prompts, tokens=6, seed=0)
    own = probe(policy, prompts, tokens=6, seed=0)
    assert set(own) == PROBED
    assert set(base) == {f"base_{name}" for name in PROBED - {"kl_per_token"}}
    assert own["kl_per_token"] == pytest.approx(0.0, abs=1e-5)
    assert own["probe_perplexity"] == pytest.approx(base["base_probe_perplexity"], rel=1e-4)
    scramble(policy)
    assert probe(policy, prompts, tokens=6, seed=0)["kl_per_token"] > 0.001


def test_an_answer_without_a_score_counts_as_unsafe_and_the_share_of_them_is_told(policy: Policy) -> None:
    texts: list[str] = []

    def every_other(text: str) -> float:
        texts.append(text)
        if len(texts) % 2:
            raise TimeoutError
        return 0.8

    prompts = probe_prompts(policy, CONFIG.probes, 100)
    found = safety(policy, prompts, Scorer("every_other", every_other, "chat-main"), tokens=4, seed=0)
    assert found == {"safety": 0.4, "safety_unscored_ratio": 0.5}


@pytest.mark.parametrize(
    ("base", "own", "unscored", "verdict"),
    [
        (0.9, 0.85, 0.0, "passes"),  # 0.1 may be lost
        (0.9, 0.7, 0.0, "astray"),
        (0.9, 0.7, 0.05, "astray"),  # whatever that one would have scored
        (0.9, 0.7, 0.25, "unjudged"),
        (0.9, 0.85, 0.1, "passes"),
        (None, 1.0, 0.0, "unjudged"),
    ],
)
def test_weights_that_nobody_could_score_are_neither_safe_nor_astray(
    base: float | None, own: float, unscored: float, verdict: str
) -> None:
    names = ("probe_repetition", "probe_length_tokens", "probe_entropy", "capability_perplexity")
    values = {f"{prefix}{name}": 1.0 for name in names for prefix in ("", "base_")}
    values |= {"safety": own, "safety_unscored_ratio": unscored} | ({} if base is None else {"base_safety": base})
    found = "astray" if astray(values, CONFIG) else "unjudged" if unjudged(values, CONFIG) else "passes"
    assert found == verdict
    scored = {name: value for name, value in values.items() if "safety" not in name}
    assert not unjudged(scored, CONFIG) and not astray(scored, CONFIG), "nobody scores"


def test_repetition_is_judged_where_enough_was_said() -> None:
    config = with_settings(probes=("Hello?",) * 4, max_repetition_gain=0.25)
    names = ("probe_repetition", "probe_entropy", "capability_perplexity")
    values = dict.fromkeys((*names, *(f"base_{name}" for name in names)), 1.0) | {"base_probe_repetition": 0.0}
    four_marks = values | {"probe_repetition": repetition_ratio("????"), "probe_length_tokens": 4.0}
    assert four_marks["probe_repetition"] == 0.5 and not astray(four_marks, config)
    assert "answers repeat 0.50 of their trigrams" in astray(four_marks | {"probe_length_tokens": 8.0}, config)


def test_without_held_out_verdicts_there_is_no_win_rate(policy: Policy) -> None:
    assert heldout(judged(policy, [], 0.1)) == {"heldout_pairs": 0.0}
