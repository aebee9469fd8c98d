"""Steps: the policy learns what it is shown, and stays near the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from online_trainer.batches import PairTokens
from online_trainer.config import TrainerConfig
from online_trainer.errors import UnusableExamples
from online_trainer.evaluate import Drift, heldout, judged
from online_trainer.learner import Example, Learner, Task
from online_trainer.policy import Policy, load_model
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
    first = found.learn(examples[:4]).metrics
    for _ in range(8):
        last = found.learn(examples[:4]).metrics
    assert first["rewards/accuracies"] == 0.5 and last["rewards/accuracies"] == 1.0
    assert last["loss"] < first["loss"]
    assert heldout(judged(policy, examples[4:], 0.1))["heldout_win_rate"] == 1.0


def thumbs(policy: Policy) -> list[Example]:
    """Liked answers with token 100, disliked ones with token 120."""
    rows = [PairTokens((5 + n, 6 + n), (100 if n % 2 else 120, 100 + n), ()) for n in range(1, 7)]
    return [
        Example(str(n), encoded, thumb=1 if n % 2 else -1) for n, encoded in enumerate(policy.encode(rows), start=1)
    ]


def test_thumbs_teach_a_taste_alone_and_beside_pairs(policy: Policy) -> None:
    found = learner(policy, with_settings(kl_budget=0.0))
    pairs, single = taste(policy), thumbs(policy)
    assert found.learn(single).agreement == {}
    for _ in range(12):
        found.learn(single)
    assert heldout(judged(policy, pairs, 0.1))["heldout_win_rate"] == 1.0
    mixed = found.learn([*pairs[:2], *single])
    assert mixed.agreement.keys() == {"0", "1"} and mixed.metrics["rewards/accuracies"] == 1.0


def test_a_thumb_down_on_everything_takes_likelihood_away(policy: Policy) -> None:
    found = learner(policy, with_settings(kl_budget=0.0))
    disliked = [example for example in thumbs(policy) if example.thumb < 0]
    rows = [example.encoded for example in disliked]
    before = policy.score(rows).policy.chosen_B
    for _ in range(4):
        found.learn(disliked)
    assert bool((policy.score(rows).policy.chosen_B < before).all())


def test_the_divergence_never_leaves_the_budget_however_hard_the_learner_pulls(policy: Policy) -> None:
    found = learner(policy, with_settings(kl_budget=0.01, learning_rate=0.1, warmup_steps=0))
    drift, shrunk = Drift(policy, TEXTS), []
    for _ in range(5):
        shrunk.append(found.learn(taste(policy)).metrics)
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
        values = found.learn(taste(policy)).metrics
        if 0.8 <= values["shrink_ratio"] < 1.0:
            small += 1
            assert len(measured) == before + 1
            assert drift.kl_per_token() == pytest.approx(0.01, rel=0.1)
    assert small > 0


def test_without_a_budget_the_same_pulls_go_far_beyond_it(policy: Policy) -> None:
    found = learner(policy, with_settings(kl_budget=0.0, learning_rate=0.1, warmup_steps=0))
    assert max(found.learn(taste(policy)).metrics["kl"] for _ in range(5)) > 0.1


def test_micro_batches_change_the_memory_and_not_the_step(tiny_model: Path) -> None:
    losses, weights = [], []
    for budget in (10_000, 1):
        policy = tiny_policy(tiny_model)
        found = learner(policy, with_settings(micro_batch_tokens=budget))
        losses.append([found.learn(taste(policy)).metrics["loss"] for _ in range(2)])
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


def test_an_example_without_weight_teaches_nothing_and_one_that_is_explained_less(policy: Policy) -> None:
    config = with_settings(kl_budget=0.0, warmup_steps=0)
    found = learner(policy, config)
    before = policy.tensors()
    found.learn([example._replace(weight=0.0) for example in taste(policy)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.tensors().items())
    losses = [found.learn([taste(policy)[0]._replace(offset=offset, weight=0.0)]).metrics["loss"] for offset in (-1, 0)]
    assert losses[0] < losses[1]  # a choice that its position explains surprises less


def test_stale_answers_count_by_how_likely_they_are_now(policy: Policy) -> None:
    found = learner(policy, with_settings())
    fresh, stale = (found.learn([taste(policy)[0]._replace(is_stale=s)]).metrics["weight"] for s in (False, True))
    assert fresh == 1.0 and 0 < stale < 1


def test_an_example_whose_gradient_is_no_number_is_named_and_nothing_has_changed(policy: Policy) -> None:
    found = learner(policy, with_settings())
    good, bad = taste(policy)[:2]
    bad = bad._replace(encoded=bad.encoded._replace(reference_chosen=float("nan")))
    before = policy.tensors()
    with pytest.raises(UnusableExamples) as caught:
        found.learn([good, bad])
    assert caught.value.preference_ids == {bad.preference_id}
    assert found.step == 0 and not found.optimizer.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.tensors().items())
    assert found.learn([good]).metrics["grad_norm"] > 0


def test_how_probable_a_verdict_was_is_said_before_the_step(policy: Policy) -> None:
    found = learner(policy, with_settings(kl_budget=0.0))
    examples = taste(policy)
    assert list(found.learn(examples[:4]).agreement.values()) == pytest.approx([0.5] * 4, abs=1e-4)
    assert all(value > 0.5 for value in found.learn(examples).agreement.values())
    tied = [examples[0]._replace(is_tie=True), examples[1]]
    ties = Learner(policy, with_settings(objective="davidson"), lambda: 0.0).learn(tied)
    assert list(ties.agreement) == [examples[1].preference_id]


def test_the_reference_is_the_moving_average_of_the_base_and_every_policy_since(policy: Policy) -> None:
    found = learner(policy, with_settings(reference="ema", ema_decay=0.75, kl_budget=0.0))
    base = {name: torch.zeros_like(t) if "lora_B" in name else t.clone() for name, t in policy.tensors().items()}
    average, encoded = base, [example.encoded for example in taste(policy)]
    for _ in range(3):
        found.learn(taste(policy))
        average = {name: 0.75 * average[name] + 0.25 * tensor for name, tensor in policy.tensors().items()}
    assert policy.anchor is not None
    for name, tensor in policy.anchor.items():
        torch.testing.assert_close(tensor, average[name])
    with torch.no_grad():
        said = policy.reference(encoded).chosen_B
        policy.load(average)
        assert torch.allclose(said, policy.score(encoded).policy.chosen_B, atol=1e-4)
    assert (said - torch.tensor([pair.reference_chosen for pair in encoded])).abs().min() > 1e-3


def test_the_share_of_flips_is_estimated_for_the_robust_loss_alone(policy: Policy) -> None:
    robust = Learner(policy, with_settings(objective="robust", estimates_flips=True), lambda: 0.0)
    examples = taste(policy) * 4
    robust.estimate_flips(examples[:20])
    assert robust.flips == robust._config.label_smoothing  # too few
    robust.estimate_flips(examples)
    assert robust.flips == pytest.approx(0.1, abs=0.01)  # a policy that knows nothing says what was taken for granted
    plain = Learner(policy, with_settings(estimates_flips=True), lambda: 0.0)
    plain.estimate_flips(examples)
    assert plain.flips == plain._config.label_smoothing


def test_a_pair_that_is_wrong_beyond_all_measure_is_learned_from_all_the_same(policy: Policy) -> None:
    far = Example("far", policy.encode([tokens(5, 4, 3)])[0]._replace(reference_chosen=1e5))
    lesson = Learner(policy, with_settings(beta=10.0), lambda: 0.0).learn([far])
    assert lesson.agreement == {"far": 0.0}


def test_whatever_preferences_are_measured_against_verdicts_and_thumbs_are_judged_from_the_base(policy: Policy) -> None:
    found = learner(policy, with_settings(kl_budget=0.0))
    for _ in range(3):
        found.learn(taste(policy))
    by_base, anchored = judged(policy, taste(policy), 0.1), learner(policy, with_settings(kl_budget=0.0))
    rate = anchored.accumulate([thumbs(policy)], Task(6, 1, 0.05, 0.0)).metrics["loss"]
    policy.anchor_at(policy.tensors())
    assert judged(policy, taste(policy), 0.1).margin_B.tolist() == by_base.margin_B.tolist()
    assert (by_base.margin_B.abs() > 1e-3).all(), "the anchor itself would say 0"
    assert anchored.accumulate([thumbs(policy)], Task(6, 1, 0.05, 0.0)).metrics["loss"] == pytest.approx(rate, rel=1e-6)


def test_the_likelihood_term_leaves_ties_alone_and_counts_length_as_the_sums_do(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "float32")
    policy = Policy(model, tokenizer, rank=4, alpha=8.0, layers=1, targets=("q_proj",), seed=0, ld_alpha=0.0)
    tie = Example("tie", policy.encode([tokens(4, 3, 3)])[0], is_tie=True)
    longer = Example("longer", policy.encode([tokens(4, 9, 3)])[0])
    losses = {}
    for weight in (0.0, 1.0):
        settings = with_settings(objective="davidson", nll_weight=weight, label_smoothing=0.0)
        each = Learner(policy, settings, lambda: 0.0)
        losses[weight] = [each.accumulate([[one]], Task(1, 1, 0.0, 0.0)).metrics["loss"] for one in (tie, longer)]
    assert losses[1.0][0] == losses[0.0][0]
    first = policy.encode([tokens(4, 3, 3)])[0]  # with ld_alpha 0 only as many tokens count as the other side has
    assert losses[1.0][1] - losses[0.0][1] == pytest.approx(-first.reference_chosen / 3, rel=1e-4)
