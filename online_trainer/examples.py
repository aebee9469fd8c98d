"""Verdicts as encoded examples: each goes through the frozen layers once and is kept while it can be used again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from online_trainer.batches import PairTokens, completion_tokens, micro_batches, prompt_tokens
from online_trainer.config import TrainerConfig
from online_trainer.ingest import Verdict
from online_trainer.learner import Example
from online_trainer.policy import Policy


class Examples:
    """A cache from preference id to example."""

    def __init__(self, policy: Policy, config: TrainerConfig) -> None:
        self._policy, self._config = policy, config
        self._known: dict[str, Example] = {}

    def of(self, verdicts: Sequence[Verdict]) -> list[Example]:
        """The examples of ``verdicts``, in their order."""
        missing = [verdict for verdict in verdicts if verdict.preference_id not in self._known]
        pairs = [self._tokens(verdict) for verdict in missing]
        for group in micro_batches([pair.total for pair in pairs], self._config.micro_batch_tokens):
            encoded = self._policy.encode([pairs[index] for index in group])
            for index, pair in zip(group, encoded, strict=True):
                name = missing[index].preference_id
                self._known[name] = Example(name, pair)
        return [self._known[verdict.preference_id] for verdict in verdicts]

    def keep(self, preference_ids: Collection[str]) -> None:
        """Forget every other example."""
        self._known = {name: example for name, example in self._known.items() if name in preference_ids}

    def _tokens(self, verdict: Verdict) -> PairTokens:
        tokenizer, config = self._policy.tokenizer, self._config
        return PairTokens(
            prompt_tokens(tokenizer, verdict.prompt, config.max_prompt_tokens),
            completion_tokens(tokenizer, verdict.chosen, config.max_completion_tokens),
            completion_tokens(tokenizer, verdict.rejected, config.max_completion_tokens),
        )
