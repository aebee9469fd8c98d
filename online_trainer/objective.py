"""Losses on implicit rewards, pure: log-probs in, one loss per pair and the numbers people watch out.

B pairs. ``*_logps_B`` are sums over a completion's tokens; ``lengths`` count them. With the log-ratios
c = log π(chosen) − log π_ref(chosen) and r alike for rejected, the margin is c − r.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Objective = Literal["sigmoid", "ipo"]


class PairLogps(NamedTuple):
    """Summed log-probs of both sides of B pairs under one model."""

    chosen_B: Tensor
    rejected_B: Tensor


def sigmoid_loss(margin_B: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−(1−ε)·log σ(β·margin) − ε·log σ(−β·margin): DPO (arXiv 2305.18290, eq. 7), ε = 0 is the original.

    ε is the assumed share of flipped verdicts ("conservative DPO", Mitchell 2023): the loss has its minimum at
    σ(β·margin) = 1 − ε, so that no pair pulls for ever.
    """
    logits_B = beta * margin_B
    return -(1 - label_smoothing) * logsigmoid(logits_B) - label_smoothing * logsigmoid(-logits_B)


def ipo_loss(margin_B: Tensor, beta: float) -> Tensor:
    """(margin − 1/(2β))²: IPO (arXiv 2310.12036, eq. 17); the margin must be of per-token means."""
    return (margin_B - 1 / (2 * beta)) ** 2


def preference_loss(
    policy: PairLogps,
    reference: PairLogps,
    lengths: PairLogps,
    *,
    objective: Objective,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair, shape B."""
    chosen_B = policy.chosen_B - reference.chosen_B
    rejected_B = policy.rejected_B - reference.rejected_B
    if objective == "ipo":
        return ipo_loss(chosen_B / lengths.chosen_B - rejected_B / lengths.rejected_B, beta)
    return sigmoid_loss(chosen_B - rejected_B, beta, label_smoothing)


def reward_metrics(policy: PairLogps, reference: PairLogps, beta: float) -> dict[str, Tensor]:
    """TRL's names → values of shape B; a reward accuracy of equal rewards counts half."""
    chosen_B = beta * (policy.chosen_B - reference.chosen_B)
    rejected_B = beta * (policy.rejected_B - reference.rejected_B)
    margin_B = chosen_B - rejected_B
    return {
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/margins": margin_B,
        "rewards/accuracies": (torch.sign(margin_B) + 1) / 2,
        "logps/chosen": policy.chosen_B,
        "logps/rejected": policy.rejected_B,
    }
