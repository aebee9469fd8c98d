"""One step at a time: new verdicts and some earlier ones in, a policy that has moved a bounded way out.

What keeps a small model speaking: gradients are clipped, few verdicts are seen more than a few times, and
after each step the adapter is shrunk back onto the ball of ``kl_budget`` nats a token around the base
(divergence grows with the square of the adapter, so one square root is the way back).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from online_trainer.batches import micro_batches
from online_trainer.config import TrainerConfig
from online_trainer.objective import preference_loss, reward_metrics
from online_trainer.policy import Encoded, Policy

T = TypeVar("T")
SHRINKINGS = 3  # tries to get back into the budget; the square law is exact only for small adapters
SLACK = 1.02  # of the budget, before anything is shrunk
EDGE = 0.9  # of the budget, from where on it counts as used up: a correction that is trusted is right within a tenth
TRUSTED_FACTOR = 0.8  # a smaller correction than this follows the law closely enough not to be measured again


class Example(NamedTuple):
    """An encoded pair and whose verdict it is."""

    preference_id: str
    encoded: Encoded


class Learner:
    """Policy and optimizer, and the step that joins them. ``kl_per_token`` measures the policy as it is."""

    def __init__(self, policy: Policy, config: TrainerConfig, kl_per_token: Callable[[], float]) -> None:
        self.policy, self.step = policy, 0
        self._config, self._kl_per_token = config, kl_per_token
        self.optimizer = self._new_optimizer()
        self._kl: float | None = None  # of the weights as they are; None where that was not measured

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

    def shuffled(self, earlier: Sequence[T]) -> list[T]:
        """Earlier verdicts in this step's own random order; the same one after a restart."""
        return random.Random(f"{self._config.seed}/{self.step}").sample(list(earlier), len(earlier))

    def learn(self, examples: Sequence[Example], *, is_rehearsal: bool = False) -> dict[str, float]:
        """Take one optimizer step on ``examples``, a smaller one where none of them is new; TRL's metric names."""
        metrics = self._accumulate([example.encoded for example in examples])
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self._config.max_grad_norm)
        rate = self._config.learning_rate * min(1.0, (self.step + 1) / max(1, self._config.warmup_steps))
        rate *= self._config.rehearse_rate if is_rehearsal else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        kl, shrunk = self._stay_near()
        return {**metrics, "grad_norm": float(norm), "learning_rate": rate, "kl": kl, "shrink_ratio": shrunk}

    def _accumulate(self, pairs: list[Encoded]) -> dict[str, float]:
        """Gradients of the mean loss over ``pairs``, micro-batch by micro-batch; mean metrics."""
        totals: dict[str, float] = {}
        lengths = [pair.tokens.total for pair in pairs]
        for group in micro_batches(lengths, self._config.micro_batch_tokens):
            for name, value in self._backward([pairs[i] for i in group], len(pairs)).items():
                totals[name] = totals.get(name, 0.0) + value / len(pairs)
        return totals

    def _backward(self, part: list[Encoded], count: int) -> dict[str, float]:
        config = self._config
        policy, reference, lengths = self.policy.logps(part)
        loss_B = preference_loss(
            policy, reference, lengths,
            objective=config.objective, beta=config.beta, label_smoothing=config.label_smoothing,
        )  # fmt: skip
        loss_B = loss_B - config.nll_weight * policy.chosen_B / lengths.chosen_B
        (loss_B.sum() / count).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            values = {"loss": loss_B} | reward_metrics(policy, reference, config.beta)
            return {name: float(value_B.sum()) for name, value_B in values.items()}

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
