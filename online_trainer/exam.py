"""What a version is asked before it is published: every number of its manifest, beside the base's own."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from online_trainer import evaluate
from online_trainer.config import TrainerConfig
from online_trainer.evaluate import Judged
from online_trainer.examples import Examples
from online_trainer.ingest import Intake, Verdict
from online_trainer.learner import Learner
from online_trainer.policy import Policy
from online_trainer.safety import Scorer

log = logging.getLogger("online_trainer")

STEP_BACK = 0.7  # of the adapter that strays: half of its KL
JUDGED_PAIRS = 4  # that a version is asked about of each kind that is no held-out one


class Exam:
    """The questions, and what the base answered; ``drift`` measures how far the policy is from it at each step."""

    def __init__(self, policy: Policy, config: TrainerConfig, examples: Examples, scorer: Scorer | None) -> None:
        self._policy, self._config, self._examples, self._scorer = policy, config, examples, scorer
        self._prompts = evaluate.probe_prompts(policy, config.probes, config.max_prompt_tokens)
        self.drift, self._base = evaluate.base_yardsticks(
            policy, self._prompts, tokens=config.probe_tokens, seed=config.seed
        )
        with policy.as_reference():
            self._base["base_capability_perplexity"] = self._capability()
        self._base |= self._base_safety()

    def values(self, learner: Learner, intake: Intake) -> dict[str, float]:
        """What the release gate reads. Weights that stray are shrunk first, and ``intake`` is told what was right."""
        own, limit = self._probe(), self._config.max_perplexity_ratio
        if limit and own["probe_perplexity"] > limit * self._base["base_probe_perplexity"]:
            log.info("too far from the base", extra={"action": "stepped_back", **own})
            learner.step_back(STEP_BACK)
            own = self._probe()
        if "base_safety" not in self._base:  # the scorer was away
            self._base |= self._base_safety()
        values = {**self._base, **own, "capability_perplexity": self._capability(), **self._safety()}
        held_out = self._judged(intake.heldout)
        values |= evaluate.heldout(held_out) | evaluate.curve(held_out)
        for name, verdicts in (("aged", intake.aged), ("regression", intake.regression)):
            values |= evaluate.heldout(self._judged(_few(learner, verdicts)), name)
        few = _few(learner, intake.replay)
        seen = self._judged(few)
        values |= evaluate.heldout(seen, "replay")
        intake.got_right(v for v, margin in zip(few, seen.margin_B.tolist(), strict=True) if margin > 0)
        learner.estimate_flips(self._examples.of(intake.heldout))
        return values | {"flip_rate": learner.flips}

    def _probe(self) -> dict[str, float]:
        config = self._config
        return evaluate.probe(self._policy, self._prompts, tokens=config.probe_tokens, seed=config.seed)

    def _judged(self, verdicts: Sequence[Verdict]) -> Judged:
        return evaluate.judged(self._policy, self._examples.of(_with_sides(verdicts)), self._config.beta)

    def _capability(self) -> float:
        return evaluate.perplexity(self._policy, evaluate.capability_text(self._policy))

    def _safety(self) -> dict[str, float]:
        """How answers to the safety set score; nothing where nobody scores them."""
        config = self._config
        if self._scorer is None or not config.safety_probes:
            return {}
        prompts = evaluate.probe_prompts(self._policy, config.safety_probes, config.max_prompt_tokens)
        return evaluate.safety(self._policy, prompts, self._scorer, tokens=config.probe_tokens, seed=config.seed)

    def _base_safety(self) -> dict[str, float]:
        """The base's score: only one of all its answers is a yardstick."""
        with self._policy.as_reference():
            found = self._safety()
        return {"base_safety": found["safety"]} if found and not found["safety_unscored_ratio"] else {}


def _few(learner: Learner, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Some of those that say what is better, others each time: a version must not wait for all of them."""
    return learner.shuffled(_with_sides(verdicts))[:JUDGED_PAIRS]


def _with_sides(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if not (verdict.is_tie or verdict.thumb)]
