"""Verdicts as encoded examples: each goes through the frozen layers once and is kept while it can be used again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from online_trainer.batches import (
    PairTokens,
    completion_tokens,
    micro_batches,
    prompt_tokens,
    served_reference,
    token_weights,
)
from online_trainer.config import TrainerConfig
from online_trainer.errors import UnusableExamples
from online_trainer.ingest import Verdict
from online_trainer.learner import Example
from online_trainer.policy import Policy
from online_trainer.safety import Scorer, safety


class Examples:
    """A cache from preference id to example."""

    def __init__(self, policy: Policy, config: TrainerConfig, base_version: str, scorer: Scorer | None = None) -> None:
        self._policy, self._config, self._base_version = policy, config, base_version
        self._scorer = scorer
        self._known: dict[str, Example] = {}

    def of(self, verdicts: Sequence[Verdict]) -> list[Example]:
        """The examples of ``verdicts``, in their order. Raises UnusableExamples."""
        missing = [verdict for verdict in verdicts if verdict.preference_id not in self._known]
        pairs = [self._tokens(verdict) for verdict in missing]
        references = [self._reference(verdict, pair) for verdict, pair in zip(missing, pairs, strict=True)]
        for is_given in (True, False):  # apart: whoever lacks a reference goes through the upper layers, too
            wanted = [index for index, reference in enumerate(references) if (reference is not None) is is_given]
            for group in micro_batches([pairs[index].total for index in wanted], self._config.micro_batch_tokens):
                self._encode([wanted[place] for place in group], missing, pairs, references)
        return [self._known[verdict.preference_id] for verdict in verdicts]

    def _encode(
        self,
        indices: list[int],
        verdicts: Sequence[Verdict],
        pairs: Sequence[PairTokens],
        references: Sequence[tuple[float, float] | None],
    ) -> None:
        given = [reference for index in indices if (reference := references[index]) is not None]
        encoded = self._policy.encode([pairs[index] for index in indices], given or None)
        for index, pair in zip(indices, encoded, strict=True):
            name = verdicts[index].preference_id
            self._known[name] = Example(
                name,
                pair,
                is_tie=verdicts[index].is_tie,
                thumb=verdicts[index].thumb,
                safety_gap=self._safety_gap(verdicts[index]),
            )

    def keep(self, preference_ids: Collection[str]) -> None:
        """Forget every other example."""
        self._known = {name: example for name, example in self._known.items() if name in preference_ids}

    def _tokens(self, verdict: Verdict) -> PairTokens:
        tokenizer, config = self._policy.tokenizer, self._config
        try:
            return PairTokens(
                prompt_tokens(tokenizer, verdict.prompt, config.max_prompt_tokens),
                completion_tokens(tokenizer, verdict.chosen, config.max_completion_tokens),
                () if verdict.thumb else completion_tokens(tokenizer, verdict.rejected, config.max_completion_tokens),
            )
        except Exception as error:  # a chat template is code of the model's: it may raise anything
            raise UnusableExamples({verdict.preference_id}, f"{type(error).__name__}: {error}") from error

    def _safety_gap(self, verdict: Verdict) -> float:
        if not self._config.safety_weight or verdict.thumb:
            return 0.0
        return safety(verdict.chosen, self._scorer) - safety(verdict.rejected, self._scorer)

    def _reference(self, verdict: Verdict, pair: PairTokens) -> tuple[float, float] | None:
        """What serving computed, for the whole prompt; None where it did not."""
        if (
            verdict.thumb
            or not self._config.uses_served_reference
            or len(pair.prompt) >= self._config.max_prompt_tokens
        ):
            return None
        sides = (verdict.chosen, pair.chosen, pair.rejected), (verdict.rejected, pair.rejected, pair.chosen)
        chosen, rejected = (
            served_reference(
                self._policy.tokenizer, side, tokens,
                token_weights(len(tokens), len(other), self._config.ld_alpha), self._base_version,
            )
            for side, tokens, other in sides
        )  # fmt: skip
        return None if chosen is None or rejected is None else (chosen, rejected)
