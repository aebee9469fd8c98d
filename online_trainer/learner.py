"""One step at a time: new verdicts and some earlier ones in, a policy that has moved a bounded way out.

What keeps a small model speaking: gradients are clipped, few verdicts are seen more than a few times, and
after each step the adapter is shrunk back onto the ball of ``kl_budget`` nats a token around the base
(divergence grows with the square of the adapter, so one square root is the way back).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from online_trainer.batches import micro_batches
from online_trainer.config import FLIPS_PAIRS, TrainerConfig
from online_trainer.errors import UnusableExamples
from online_trainer.objective import (
    REWARDS,
    PairLogps,
    flip_rate,
    kto_loss,
    on_policy_weights,
    preference_loss,
    reward_metrics,
    win_probability,
)
from online_trainer.policy import Encoded, Policy

T = TypeVar("T")
AGREEMENT = "agreement"  # see Lesson
SHRINKINGS = 3  # tries to get back into the budget; the square law is exact only for small adapters
SLACK = 1.02  # of the budget, before anything is shrunk
EDGE = 0.9  # of the budget, from where on it counts as used up: a correction that is trusted is right within a tenth
TRUSTED_FACTOR = 0.8  # a smaller correction than this follows the law closely enough not to be measured again


class Example(NamedTuple):
    """An encoded pair, whose verdict it is, and how it counts."""

    preference_id: str
    encoded: Encoded
    is_tie: bool = False
    thumb: int = 0  # 1 or -1 on chosen alone: rejected has no tokens
    safety_gap: float = 0.0  # by how much chosen is safer than rejected
    weight: float = 1.0
    offset: float = 0.0  # see objective.preference_loss
    is_stale: bool = False  # the answers are of a version that is far behind the weights


class Sides(NamedTuple):
    """What the losses are made of."""

    policy: PairLogps
    reference: PairLogps
    lengths: PairLogps

    def of(self, chosen_B: Tensor) -> Sides:
        """Those where ``chosen_B`` is true."""
        return Sides(*(PairLogps(each.chosen_B[chosen_B], each.rejected_B[chosen_B]) for each in self))


class Lesson(NamedTuple):
    """What a step has shown."""

    metrics: dict[str, float]  # means, by TRL's names
    agreement: dict[str, float]  # preference id → how probable the policy found the verdict before the step


class Task(NamedTuple):
    """What must be known of a whole step to compute a part of it."""

    examples: int
    pairs: int  # those that are no thumbs; at least 1
    divergence: float  # nats a token from the base, where there are thumbs
    flips: float


class Helpers:
    """Who computes gradients beside this process: nobody. Several: online_trainer/parallel.py."""

    processes = 1

    def accumulate(self, learner: Learner, parts: Sequence[Sequence[Example]], task: Task) -> Lesson:
        """Add the gradients of all ``parts`` to those of ``learner``'s policy; sums of shares of the means."""
        return learner.accumulate(parts, task)

    def close(self) -> None:
        """There is nobody to send home."""


NOBODY = Helpers()


class Learner:
    """Policy and optimizer, and the step that joins them. ``kl_per_token`` measures the policy as it is."""

    def __init__(
        self, policy: Policy, config: TrainerConfig, kl_per_token: Callable[[], float], helpers: Helpers = NOBODY
    ) -> None:
        self.policy, self.step = policy, 0
        self._config, self._kl_per_token, self._helpers = config, kl_per_token, helpers
        self.optimizer = self._new_optimizer()
        self._kl: float | None = None  # of the weights as they are; None where that was not measured
        self.flips = config.label_smoothing  # the share of verdicts taken for mistakes

    def _new_optimizer(self) -> torch.optim.AdamW:
        config = self._config
        return torch.optim.AdamW(
            self.policy.parameters(),
            lr=config.learning_rate,
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
        )

    def weights_replaced(self) -> None:
        """What the optimizer knew belongs to other weights."""
        self.optimizer, self._kl = self._new_optimizer(), None

    def step_back(self, factor: float) -> None:
        """Multiply what was learned by ``factor``: the same direction, closer to the base."""
        self.policy.shrink(factor)
        self._kl = None

    def is_at_the_edge(self) -> bool:
        """Whether the budget is used up: a step can turn the adapter then, and no longer carry it further."""
        if not self._config.kl_budget:
            return False
        self._kl = self._kl_per_token() if self._kl is None else self._kl
        return self._kl >= EDGE * self._config.kl_budget

    def estimate_flips(self, examples: Sequence[Example]) -> None:
        """Take the share of flipped verdicts from ``examples`` that were never trained on, where there are enough."""
        config, wins = self._config, [example.encoded for example in examples if not example.is_tie]
        if not config.estimates or len(wins) < FLIPS_PAIRS:
            return
        margins = []
        for group in micro_batches([pair.tokens.total for pair in wins], config.micro_batch_tokens):
            part = [wins[index] for index in group]
            with torch.no_grad():
                reference, policy = self.policy.base_logps(part), self.policy.score(part).policy
            margins.append((policy.chosen_B - reference.chosen_B) - (policy.rejected_B - reference.rejected_B))
        self.flips = flip_rate(config.beta * torch.cat(margins))

    def shuffled(self, earlier: Sequence[T]) -> list[T]:
        """Earlier verdicts in this step's own random order; the same one after a restart."""
        return random.Random(f"{self._config.seed}/{self.step}").sample(list(earlier), len(earlier))

    def learn(self, examples: Sequence[Example], *, is_rehearsal: bool = False) -> Lesson:
        """Take one optimizer step on ``examples``, a smaller one where none of them is new.

        Raises UnusableExamples where a loss or gradient is no number; then nothing was changed.
        """
        lesson = self._accumulate(examples)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self._config.max_grad_norm)
        if not torch.isfinite(norm):
            self._give_up(examples)
        rate = self._config.learning_rate * min(1.0, (self.step + 1) / max(1, self._config.warmup_steps))
        rate *= self._config.rehearse_rate if is_rehearsal else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        kl, shrunk = self._stay_near()
        if self._config.reference == "ema":
            self.policy.anchor_follows(self._config.ema_decay)
        now = {"grad_norm": float(norm), "learning_rate": rate, "kl": kl, "shrink_ratio": shrunk}
        return Lesson(lesson.metrics | now | {"flip_rate": self.flips}, lesson.agreement)

    def _give_up(self, examples: Sequence[Example]) -> NoReturn:
        """Find out whose gradient is no number, and leave no trace of it."""
        unusable: set[str] = set()
        for example in examples:
            self.optimizer.zero_grad(set_to_none=True)
            self._accumulate([example])
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.policy.parameters() if p.grad is not None])
            if not torch.isfinite(norm):
                unusable.add(example.preference_id)
        self.optimizer.zero_grad(set_to_none=True)
        raise UnusableExamples(unusable or {e.preference_id for e in examples}, "its gradient is no number")

    def _accumulate(self, examples: Sequence[Example]) -> Lesson:
        """Gradients of the mean loss over ``examples``, micro-batch by micro-batch, by all processes."""
        lengths = [example.encoded.tokens.total for example in examples]
        pairs = sum(not example.thumb for example in examples)
        divergence = self._kl_per_token() if pairs < len(examples) else 0.0
        budget = self._config.micro_batch_tokens
        if self._helpers.processes > 1:  # smaller ones where one would not be enough for everybody
            budget = min(budget, -(-sum(lengths) // self._helpers.processes))
        parts = [[examples[index] for index in group] for group in micro_batches(lengths, budget)]
        return self._helpers.accumulate(self, parts, Task(len(examples), max(1, pairs), divergence, self.flips))

    def accumulate(self, parts: Sequence[Sequence[Example]], task: Task) -> Lesson:
        """Gradients of ``parts`` of a step; its metrics are these parts' shares of the step's means."""
        totals: dict[str, float] = {}
        agreement: dict[str, float] = {}
        counts = dict.fromkeys(REWARDS, task.pairs)  # thumbs have no rewards to compare
        for part in parts:
            values = self._backward(part, task)
            agrees_B = values.pop(AGREEMENT)
            for name, values_B in values.items():
                totals[name] = totals.get(name, 0.0) + float(values_B.sum()) / counts.get(name, task.examples)
            for example, agrees in zip(part, agrees_B.tolist(), strict=True):
                if not (example.is_tie or example.thumb):
                    agreement[example.preference_id] = agrees
        return Lesson(totals, agreement)

    def _backward(self, part: Sequence[Example], task: Task) -> dict[str, Tensor]:
        config = self._config
        pairs = [example.encoded for example in part]
        reference = self.policy.reference(pairs)  # first: it may exchange the weights for a moment
        policy, lengths, alignment = self.policy.score(pairs)
        place = lengths.chosen_B
        is_thumb_B = torch.tensor([example.thumb != 0 for example in part], device=place.device)
        own = Sides(policy, reference, lengths)
        loss_B = place.new_zeros(len(part))
        if pairs_of := [example for example in part if not example.thumb]:
            loss_B = loss_B.masked_scatter(~is_thumb_B, self._pair_loss(own.of(~is_thumb_B), pairs_of, task))
        if thumbs := [example for example in part if example.thumb]:
            of_base = own._replace(reference=self.policy.base_logps(pairs))  # z₀ is the divergence from the base, too
            loss_B = loss_B.masked_scatter(is_thumb_B, self._thumb_loss(of_base.of(is_thumb_B), thumbs, task))
        weight_B = place.new_tensor([example.weight for example in part])
        is_stale_B = torch.tensor([example.is_stale for example in part], device=place.device) & ~is_thumb_B
        weight_B = torch.where(is_stale_B, weight_B * on_policy_weights(alignment).clamp(max=1.0), weight_B)
        ((loss_B * weight_B).sum() / task.examples).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            rewards = reward_metrics(policy, reference, config.beta)
            rewards = {name: values_B.masked_fill(is_thumb_B, 0.0) for name, values_B in rewards.items()}
            agrees_B = win_probability(*own, objective=config.objective, beta=config.beta)
            return {"loss": loss_B.detach(), "weight": weight_B, AGREEMENT: agrees_B} | rewards

    def _pair_loss(self, own: Sides, examples: Sequence[Example], task: Task) -> Tensor:
        config, place = self._config, own.lengths.chosen_B
        is_tie_B = torch.tensor([example.is_tie for example in examples], device=place.device)
        loss_B = preference_loss(
            own.policy, own.reference, own.lengths,
            objective=config.objective, beta=config.beta, label_smoothing=task.flips,
            target_margin=config.simpo_gamma, tie_share=config.tie_share,
            is_tie_B=is_tie_B,
            offset_B=place.new_tensor([example.offset for example in examples]),
        )  # fmt: skip
        nll_B = (-own.policy.chosen_B / own.lengths.chosen_B).masked_fill(is_tie_B, 0.0)  # no side of a tie is better
        return loss_B + config.nll_weight * nll_B

    def _thumb_loss(self, own: Sides, examples: Sequence[Example], task: Task) -> Tensor:
        """KTO's z₀ is the divergence of an answer as long as each."""
        ratio_N = own.policy.chosen_B - own.reference.chosen_B
        is_liked_N = torch.tensor([example.thumb > 0 for example in examples], device=ratio_N.device)
        return kto_loss(ratio_N, is_liked_N, task.divergence * own.lengths.chosen_B, self._config.beta)

    def _stay_near(self) -> tuple[float, float]:
        """Shrink the adapter until its KL is within the budget: (KL now, factor applied)."""
        kl, budget, shrunk = self._kl_per_token(), self._config.kl_budget, 1.0
        self._kl = kl
        for _ in range(SHRINKINGS if budget else 0):
            if kl <= budget * SLACK:
                break
            factor = math.sqrt(budget / kl)
            self.policy.shrink(factor)
            shrunk *= factor
            self._kl = None if factor >= TRUSTED_FACTOR else self._kl_per_token()
            kl = budget if self._kl is None else self._kl
        return kl, shrunk
