"""Steps: the policy learns what it is shown, and stays near the base."""

from __future__ import annotations

from pathlib import Path

import pytest

from online_trainer.batches import PairTokens
from online_trainer.config import TrainerConfig
from online_trainer.evaluate import Drift, heldout
from online_trainer.learner import Example, Learner
from online_trainer.policy import Policy
from tests.unit.online_trainer.kit import tiny_policy, tokens, with_settings

TEXTS = [tokens(4, 5, 5), tokens(3, 4, 4, start=30)]


def learner(policy: Policy, config: TrainerConfig) -> Learner:
    return Learner(policy, config, Drift(policy, TEXTS).kl_per_token)


def taste(policy: Policy) -> list[Example]:
    """Pairs of one taste: token 100 over token 120, after different prompts."""
    pairs = [PairTokens((5 + n, 6 + n), (100, 100 + n), (120, 120 + n)) for n in range(1, 7)]
    return [Example(str(n), encoded) for n, encoded in enumerate(policy.encode(pairs))]


def test_a_taste_is_learned_and_carries_over_to_new_prompts(policy: Policy) -> None:
    found = learner(policy, with_settings(kl_budget=0.0))
    examples = taste(policy)
    first = found.learn(examples[:4])
    for _ in range(8):
        last = found.learn(examples[:4])
    assert first["rewards/accuracies"] == 0.5 and last["rewards/accuracies"] == 1.0
    assert last["loss"] < first["loss"]
    assert heldout(policy, examples[4:])["heldout_win_rate"] == 1.0


def test_the_divergence_never_leaves_the_budget_however_hard_the_learner_pulls(policy: Policy) -> None:
    found = learner(policy, with_settings(kl_budget=0.01, learning_rate=0.1, warmup_steps=0))
    drift, shrunk = Drift(policy, TEXTS), []
    for _ in range(5):
        shrunk.append(found.learn(taste(policy)))
        assert drift.kl_per_token() <= 0.012
    assert any(values["shrink_ratio"] < 1 for values in shrunk)
    assert shrunk[-1]["rewards/accuracies"] == 1.0


def test_a_small_correction_is_not_measured_again_and_holds_all_the_same(policy: Policy) -> None:
    drift, measured = Drift(policy, TEXTS), []

    def kl() -> float:
        measured.append(drift.kl_per_token())
        return measured[-1]

    found = Learner(policy, with_settings(kl_budget=0.01, learning_rate=1e-3, warmup_steps=0), kl)
    small = 0
    for _ in range(40):
        before = len(measured)
        values = found.learn(taste(policy))
        if 0.8 <= values["shrink_ratio"] < 1.0:
            small += 1
            assert len(measured) == before + 1
            assert drift.kl_per_token() == pytest.approx(0.01, rel=0.1)
    assert small > 0


def test_without_a_budget_the_same_pulls_go_far_beyond_it(policy: Policy) -> None:
    found = learner(policy, with_settings(kl_budget=0.0, learning_rate=0.1, warmup_steps=0))
    assert max(found.learn(taste(policy))["kl"] for _ in range(5)) > 0.1


def test_micro_batches_change_the_memory_and_not_the_step(tiny_model: Path) -> None:
    losses, weights = [], []
    for budget in (10_000, 1):
        policy = tiny_policy(tiny_model)
        found = learner(policy, with_settings(micro_batch_tokens=budget))
        losses.append([found.learn(taste(policy))["loss"] for _ in range(2)])
        weights.append(policy.tensors())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    name = "model.layers.1.self_attn.q_proj.lora_B.weight"
    assert (weights[0][name] - weights[1][name]).abs().max() < 1e-3


def test_replay_draws_the_same_verdicts_again_after_a_restart(policy: Policy) -> None:
    first, second = learner(policy, with_settings()), learner(policy, with_settings())
    first.step = second.step = 17
    assert first.shuffled(range(50)) == second.shuffled(range(50)) != list(range(50))
    assert sorted(first.shuffled(range(50))) == list(range(50))
    second.step = 18
    assert first.shuffled(range(50)) != second.shuffled(range(50))
