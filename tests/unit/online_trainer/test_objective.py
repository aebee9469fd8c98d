"""Losses against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from online_trainer.objective import PairLogps, ipo_loss, preference_loss, reward_metrics, sigmoid_loss

LENGTHS = PairLogps(torch.tensor([2.0]), torch.tensor([4.0]))


def logps(chosen: float, rejected: float) -> PairLogps:
    return PairLogps(torch.tensor([chosen], requires_grad=True), torch.tensor([rejected], requires_grad=True))


def test_equal_log_ratios_cost_ln_2_whatever_the_label_smoothing() -> None:
    for smoothing in (0.0, 0.1, 0.5):
        assert sigmoid_loss(torch.zeros(1), 0.1, smoothing).item() == pytest.approx(math.log(2))


def test_a_margin_of_ln_3_over_beta_costs_ln_4_thirds() -> None:
    margin = torch.tensor([math.log(3) / 0.1])  # σ(ln 3) = 3/4
    assert sigmoid_loss(margin, 0.1).item() == pytest.approx(math.log(4 / 3))


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
    margin = torch.tensor([math.log(0.9 / 0.1) / 0.5], requires_grad=True)  # σ(β·margin) = 0.9
    sigmoid_loss(margin, 0.5, 0.1).sum().backward()
    assert margin.grad is not None and margin.grad.item() == pytest.approx(0.0, abs=1e-6)


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
