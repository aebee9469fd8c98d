"""Losses against numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from online_trainer.objective import (
    MOST_FLIPS,
    Objective,
    PairLogps,
    davidson_loss,
    flip_rate,
    ipo_loss,
    on_policy_weights,
    preference_loss,
    rao_kupper_loss,
    reward_metrics,
    robust_loss,
    sigmoid_loss,
    win_probability,
)

LENGTHS = PairLogps(torch.tensor([2.0]), torch.tensor([4.0]))


def logps(chosen: float, rejected: float) -> PairLogps:
    return PairLogps(torch.tensor([chosen], requires_grad=True), torch.tensor([rejected], requires_grad=True))


def test_equal_log_ratios_cost_ln_2_whatever_the_label_smoothing() -> None:
    for smoothing in (0.0, 0.1, 0.5):
        assert sigmoid_loss(torch.zeros(1), smoothing).item() == pytest.approx(math.log(2))


def test_a_margin_of_ln_3_costs_ln_4_thirds() -> None:
    logits = torch.tensor([math.log(3)])  # σ(ln 3) = 3/4
    assert sigmoid_loss(logits).item() == pytest.approx(math.log(4 / 3))


def test_with_beta_near_zero_the_loss_forgets_the_pair_and_pulls_no_more() -> None:
    policy = logps(-5.0, -1.0)
    loss = preference_loss(policy, logps(-1.0, -5.0), LENGTHS, objective="sigmoid", beta=1e-6)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert policy.chosen_B.grad is not None and abs(policy.chosen_B.grad.item()) < 1e-6


def test_at_the_start_the_gradient_is_half_of_beta_up_for_chosen_and_down_for_rejected() -> None:
    policy = logps(-3.0, -3.0)
    preference_loss(policy, logps(-3.0, -3.0), LENGTHS, objective="sigmoid", beta=0.2).sum().backward()
    assert policy.chosen_B.grad is not None and policy.rejected_B.grad is not None
    assert policy.chosen_B.grad.item() == pytest.approx(-0.1)
    assert policy.rejected_B.grad.item() == pytest.approx(0.1)


def test_label_smoothing_stops_the_pull_where_the_probability_is_one_minus_epsilon() -> None:
    logits = torch.tensor([math.log(0.9 / 0.1)], requires_grad=True)  # σ(d) = 0.9
    sigmoid_loss(logits, 0.1).sum().backward()
    assert logits.grad is not None and logits.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_ipo_wants_a_mean_margin_of_one_over_two_beta_and_no_more() -> None:
    assert ipo_loss(torch.tensor([5.0]), 0.1).item() == pytest.approx(0.0)
    policy, reference = logps(-1.0, -8.0), logps(-5.0, -4.0)  # (+4)/2 − (−4)/4 = 3
    loss = preference_loss(policy, reference, LENGTHS, objective="ipo", beta=0.1)
    assert loss.item() == pytest.approx((3 - 5) ** 2)


def test_reward_metrics_count_a_tie_as_half_right() -> None:
    values = reward_metrics(logps(-3.0, -4.0), logps(-3.0, -4.0), 0.1)
    assert values["rewards/accuracies"].item() == 0.5
    better = reward_metrics(logps(-2.0, -6.0), logps(-3.0, -4.0), 0.1)
    assert better["rewards/margins"].item() == pytest.approx(0.1 * (1 + 2))
    assert better["rewards/accuracies"].item() == 1.0


def test_the_robust_loss_of_flipped_verdicts_is_on_average_that_of_the_true_ones() -> None:
    logits, flips = torch.tensor([0.7, -1.3, 2.0]), 0.2
    expected = (1 - flips) * robust_loss(logits, flips) + flips * robust_loss(-logits, flips)
    torch.testing.assert_close(expected, sigmoid_loss(logits))


@pytest.mark.parametrize("loss", [rao_kupper_loss, davidson_loss])
@pytest.mark.parametrize("tie_share", [0.1, 0.5])
def test_win_loss_and_tie_add_up_and_equals_tie_as_often_as_said(loss: Callable[..., Tensor], tie_share: float) -> None:
    logits, win, tie = torch.tensor([-2.0, 0.0, 1.5]), torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    won, tied = (-loss(logits, win, tie_share)).exp(), (-loss(logits, tie, tie_share)).exp()
    lost = (-loss(-logits, win, tie_share)).exp()
    torch.testing.assert_close(won + tied + lost, torch.ones(3))
    assert tied[1].item() == pytest.approx(tie_share)
    assert tied[1] > tied[2] > tied[0]  # the more unequal, the fewer ties


def test_a_tie_draws_both_sides_together_and_other_objectives_refuse_it() -> None:
    policy = logps(-2.0, -5.0)  # the margin is 3: too far apart for a tie
    tie = torch.tensor([True])
    preference_loss(policy, logps(-4.0, -4.0), LENGTHS, objective="davidson", beta=0.5, is_tie_B=tie).sum().backward()
    assert policy.chosen_B.grad is not None and policy.rejected_B.grad is not None
    assert policy.chosen_B.grad.item() > 0 > policy.rejected_B.grad.item()
    with pytest.raises(ValueError, match="sigmoid knows no ties; davidson and rao_kupper do"):
        preference_loss(policy, logps(0.0, 0.0), LENGTHS, objective="sigmoid", beta=0.1, is_tie_B=tie)


def test_a_safer_chosen_side_is_pulled_harder() -> None:
    pulls = []
    for offset in (-1.0, 0.0, 1.0):
        policy = logps(-3.0, -3.0)
        preference_loss(
            policy, logps(-3.0, -3.0), LENGTHS, objective="sigmoid", beta=0.1, offset_B=torch.tensor([offset])
        ).sum().backward()
        assert policy.chosen_B.grad is not None
        pulls.append(-policy.chosen_B.grad.item())
    assert pulls == sorted(pulls) and pulls[0] < pulls[1] < pulls[2]


def test_answers_that_the_policy_would_not_give_any_more_weigh_less() -> None:
    weights = on_policy_weights(PairLogps(torch.tensor([-0.1, -2.0, 0.1]), torch.tensor([-0.1, -1.0, 0.3])))
    assert weights.tolist() == pytest.approx([math.exp(-0.2), math.exp(-3.0), math.exp(0.4)])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.3])
def test_the_share_of_flipped_verdicts_is_found(share: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(4000) * 2
    agrees = torch.rand(4000) < torch.sigmoid(logits)  # Bradley-Terry
    flipped = torch.rand(4000) < share
    seen = torch.where(agrees ^ flipped, logits, -logits)  # d of whoever was chosen
    assert flip_rate(seen) == pytest.approx(share, abs=0.03)
    assert flip_rate(torch.full((500,), -9.0)) == MOST_FLIPS
    assert flip_rate(torch.empty(0)) == pytest.approx(0.1)


def test_ipo_stops_a_bias_s_share_of_a_half_later() -> None:
    policy, reference = logps(-1.0, -4.0), logps(-2.0, -2.0)  # mean margin 1/2 + 1/2, over 2 and 4 tokens
    plain = preference_loss(policy, reference, LENGTHS, objective="ipo", beta=0.5)
    biased = preference_loss(
        policy, reference, LENGTHS, objective="ipo", beta=0.5, offset_B=torch.tensor([0.4])
    )  # an offset of 0.4 log-odds is 0.1 in probability, and 0.2 of margin
    assert plain.item() == pytest.approx(0.0, abs=1e-6) and biased.item() == pytest.approx(0.04)


def test_the_probability_of_a_verdict_is_in_each_objective_s_own_words() -> None:
    policy, reference = logps(-1.0, -4.0), logps(-2.0, -2.0)

    def said(objective: Objective, beta: float) -> float:
        return float(win_probability(policy, reference, LENGTHS, objective=objective, beta=beta))

    assert said("sigmoid", 0.1) == pytest.approx(1 / (1 + math.exp(-0.3)))  # the margin is 1 + 2
    assert said("ipo", 0.3) == pytest.approx(0.8)  # the mean margin is 1, and IPO's is (p − ½)/β
    assert said("ipo", 2.0) == 1.0
    assert said("simpo", 2.0) == pytest.approx(1 / (1 + math.exp(-1.0)))  # −1/2 + 4/4 a token, whatever the reference
