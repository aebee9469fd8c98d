"""Losses on implicit rewards, pure: log-probs in, one loss per pair and the numbers people watch out.

B pairs. ``*_logps_B`` are sums over a completion's tokens; ``lengths`` count them. With the log-ratios
c = log π(chosen) − log π_ref(chosen) and r alike for rejected, the margin is c − r, and d = β·margin.

| objective        | loss                                              | source                              |
|------------------|---------------------------------------------------|-------------------------------------|
| ``sigmoid``      | −(1−ε)·log σ(d) − ε·log σ(−d)                     | DPO, arXiv 2305.18290; cDPO for ε>0 |
| ``robust``       | the same without the bias of flips with rate ε    | rDPO, arXiv 2403.00409              |
| ``ipo``          | (mean margin − 1/(2β))²                           | IPO, arXiv 2310.12036               |
| ``simpo``        | −log σ(β·(mean chosen − mean rejected) − γ)       | SimPO, arXiv 2405.14734             |
| ``rao_kupper``,  | −log P(win) or −log P(tie), Bradley-Terry with    | DPO-RK and DPO-D, arXiv 2409.17431  |
| ``davidson``     | ties in two forms                                 |                                     |

Those that TRL has are compared with TRL's in value and gradient: tests/contract/test_objective_against_trl.py.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Objective = Literal["sigmoid", "robust", "ipo", "simpo", "rao_kupper", "davidson"]
KNOW_TIES: frozenset[Objective] = frozenset({"rao_kupper", "davidson"})
MOST_FLIPS = 0.45  # at one half verdicts say nothing, and the robust loss divides by zero
EM_ROUNDS = 50
REWARDS = (  # TRL's names
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


class PairLogps(NamedTuple):
    """One number for each side of B pairs: mostly summed log-probs under one model."""

    chosen_B: Tensor
    rejected_B: Tensor


def sigmoid_loss(logits_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−(1−ε)·log σ(d) − ε·log σ(−d): DPO (arXiv 2305.18290, eq. 7), ε = 0 is the original.

    ε is the assumed share of flipped verdicts ("conservative DPO", Mitchell 2023): the loss has its minimum at
    σ(d) = 1 − ε, so that no pair pulls for ever.
    """
    return -(1 - label_smoothing) * logsigmoid(logits_B) - label_smoothing * logsigmoid(-logits_B)


def robust_loss(logits_B: Tensor, flip_rate: float) -> Tensor:
    """(−(1−ε)·log σ(d) + ε·log σ(−d)) / (1−2ε): rDPO (arXiv 2403.00409, eq. 12).

    Its mean over verdicts of which a share ε is flipped is DPO's mean over the true ones. 0 ≤ ε < ½.
    """
    observed_B = -(1 - flip_rate) * logsigmoid(logits_B) + flip_rate * logsigmoid(-logits_B)
    return observed_B / (1 - 2 * flip_rate)


def ipo_loss(mean_margin_B: Tensor, beta: float) -> Tensor:
    """(margin − 1/(2β))²: IPO (arXiv 2310.12036, eq. 17); the margin must be of per-token means."""
    return (mean_margin_B - 1 / (2 * beta)) ** 2


def rao_kupper_loss(logits_B: Tensor, is_tie_B: Tensor, tie_share: float) -> Tensor:
    """−log of P(win) = σ(d − α) or P(tie) = (e^2α − 1)·σ(d − α)·σ(−d − α): DPO-RK (arXiv 2409.17431, eq. 6–7).

    ``tie_share`` is P(tie) between equals, 0 < p < 1: e^α = (1 + p)/(1 − p).
    """
    alpha = math.log1p(tie_share) - math.log1p(-tie_share)
    win_B = logsigmoid(logits_B - alpha)
    tie_B = math.log(math.expm1(2 * alpha)) + win_B + logsigmoid(-logits_B - alpha)
    return -torch.where(is_tie_B, tie_B, win_B)


def davidson_loss(logits_B: Tensor, is_tie_B: Tensor, tie_share: float) -> Tensor:
    """−log of P(win) = 1/Z or P(tie) = 2ν·e^(−d/2)/Z, Z = 1 + e^−d + 2ν·e^(−d/2): DPO-D (arXiv 2409.17431, eq. 8–9).

    ``tie_share`` is P(tie) between equals, 0 < p < 1: ν = p/(1 − p).
    """
    tie_B = math.log(2 * tie_share / (1 - tie_share)) - logits_B / 2
    log_z_B = torch.stack((torch.zeros_like(logits_B), -logits_B, tie_B)).logsumexp(0)
    return log_z_B - torch.where(is_tie_B, tie_B, torch.zeros_like(tie_B))


def kto_loss(log_ratio_N: Tensor, is_liked_N: Tensor, kl_N: Tensor, beta: float) -> Tensor:
    """1 − σ(β·(ratio − z₀)) of liked answers, 1 − σ(β·(z₀ − ratio)) of the others: KTO (arXiv 2402.01306, eq. 8).

    Of N single answers with a thumb each. z₀ ≥ 0 is the policy's divergence from the reference, in nats an answer;
    no gradient flows through it.
    """
    sign_N = torch.where(is_liked_N, 1.0, -1.0)
    return 1 - torch.sigmoid(beta * sign_N * (log_ratio_N - kl_N.clamp(min=0.0)))


def preference_loss(
    policy: PairLogps,
    reference: PairLogps,
    lengths: PairLogps,
    *,
    objective: Objective,
    beta: float,
    label_smoothing: float = 0.0,
    target_margin: float = 0.0,
    tie_share: float = 0.5,
    is_tie_B: Tensor | None = None,
    offset_B: Tensor | None = None,
) -> Tensor:
    """The loss of each pair, shape B.

    ``target_margin`` is SimPO's γ. ``is_tie_B`` marks pairs whose sides were found equal; ValueError where the
    objective knows no ties. ``offset_B`` is subtracted from d: how much likelier chosen should be for another reason
    than the verdict, such as a safety model's score (MODPO, arXiv 2310.03708, eq. 9). IPO's β·margin is a probability
    less one half, not log-odds, so that it takes a quarter of it: σ's slope between equals.
    """
    if is_tie_B is not None and objective not in KNOW_TIES and bool(is_tie_B.any()):
        raise ValueError(f"the objective {objective} knows no ties; {' and '.join(sorted(KNOW_TIES))} do")
    if objective == "simpo":
        mean_B = policy.chosen_B / lengths.chosen_B - policy.rejected_B / lengths.rejected_B
        logits_B = beta * mean_B - target_margin
    else:
        chosen_B = policy.chosen_B - reference.chosen_B
        rejected_B = policy.rejected_B - reference.rejected_B
        if objective == "ipo":
            mean_B = chosen_B / lengths.chosen_B - rejected_B / lengths.rejected_B
            return ipo_loss(mean_B if offset_B is None else mean_B - offset_B / (4 * beta), beta)
        logits_B = beta * (chosen_B - rejected_B)
    if offset_B is not None:
        logits_B = logits_B - offset_B
    if objective == "robust":
        return robust_loss(logits_B, label_smoothing)
    if objective in KNOW_TIES:
        tied_B = torch.zeros_like(logits_B, dtype=torch.bool) if is_tie_B is None else is_tie_B
        of = rao_kupper_loss if objective == "rao_kupper" else davidson_loss
        return of(logits_B, tied_B, tie_share)
    return sigmoid_loss(logits_B, label_smoothing)


@torch.no_grad()
def win_probability(
    policy: PairLogps, reference: PairLogps, lengths: PairLogps, *, objective: Objective, beta: float
) -> Tensor:
    """How probable the policy finds it that chosen is preferred, were there no ties; shape B, no gradient.

    σ(d) with each objective's own d, SimPO's without its γ; IPO's margin is (p − ½)/β (arXiv 2310.12036, eq. 7).
    """
    if objective == "simpo":
        return torch.sigmoid(beta * (policy.chosen_B / lengths.chosen_B - policy.rejected_B / lengths.rejected_B))
    chosen_B, rejected_B = policy.chosen_B - reference.chosen_B, policy.rejected_B - reference.rejected_B
    if objective == "ipo":
        return (0.5 + beta * (chosen_B / lengths.chosen_B - rejected_B / lengths.rejected_B)).clamp(0.0, 1.0)
    return torch.sigmoid(beta * (chosen_B - rejected_B))


def on_policy_weights(alignment: PairLogps) -> Tensor:
    """WPO's weight of each pair: how likely the policy now is to say such answers (arXiv 2406.11827, eq. 2).

    ``alignment``: of each side the mean over its tokens of log π(token) − log Σ_v π(v)². No gradient. Above 1
    for answers that are likelier than what the policy draws on average.
    """
    return (alignment.chosen_B + alignment.rejected_B).detach().exp()


def flip_rate(logits_B: Tensor, *, prior: tuple[float, float] = (1.0, 9.0)) -> float:
    """The share of verdicts that were flipped, estimated by EM on pairs that the policy was never trained on.

    ``logits_B`` are d of B pairs, by a policy that learned with ``robust``: its σ(d) is the preference without flips
    (one that learned with ``sigmoid`` has them in σ(d) already). Each verdict is true with 1 − ε and then agrees with
    σ(d), else with σ(−d); ε has a Beta prior (by default one flip seen in ten). At most MOST_FLIPS.
    """
    agrees_B, flips = torch.sigmoid(logits_B.double()), prior[0] / sum(prior)
    for _ in range(EM_ROUNDS):
        flipped_B = flips * (1 - agrees_B)
        flipped_B = flipped_B / (flipped_B + (1 - flips) * agrees_B)
        flips = (float(flipped_B.sum()) + prior[0]) / (len(logits_B) + sum(prior))
    return min(flips, MOST_FLIPS)


def reward_metrics(policy: PairLogps, reference: PairLogps, beta: float) -> dict[str, Tensor]:
    """TRL's names → values of shape B; a reward accuracy of equal rewards counts half."""
    chosen_B = beta * (policy.chosen_B - reference.chosen_B)
    rejected_B = beta * (policy.rejected_B - reference.rejected_B)
    margin_B = chosen_B - rejected_B
    accuracy_B = (torch.sign(margin_B) + 1) / 2
    values = (chosen_B, rejected_B, margin_B, accuracy_B, policy.chosen_B, policy.rejected_B)
    return dict(zip(REWARDS, values, strict=True))
