"""Verdicts as encoded examples: what went through the frozen layers is kept while it can be used again.

Of so many tokens at most: those that were used least lately make room, and take the way again when they are wanted.
"""

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
from online_trainer.policy import Encoded, Policy
from online_trainer.safety import Scorer, safety


class Examples:
    """A bounded cache from preference id to example."""

    def __init__(self, policy: Policy, config: TrainerConfig, base_version: str, scorer: Scorer | None = None) -> None:
        self._policy, self._config, self._base_version = policy, config, base_version
        self._scorer = scorer
        self._known: dict[str, Example] = {}  # the last used last

    @property
    def tokens(self) -> int:
        """That are kept."""
        return sum(example.encoded.tokens.total for example in self._known.values())

    def of(self, verdicts: Sequence[Verdict]) -> list[Example]:
        """The examples of ``verdicts``, in their order. Raises UnusableExamples."""
        names = [verdict.preference_id for verdict in verdicts]
        found = {name: self._known[name] for name in names if name in self._known}
        found |= self._encoded([verdict for verdict in verdicts if verdict.preference_id not in found])
        for name, example in found.items():
            self._known.pop(name, None)
            self._known[name] = example
        self._make_room()
        return [found[name] for name in names]

    def _make_room(self) -> None:
        room = self._config.cached_tokens - self.tokens
        for name in list(self._known):
            if room >= 0:
                break
            room += self._known.pop(name).encoded.tokens.total

    def _encoded(self, verdicts: Sequence[Verdict]) -> dict[str, Example]:
        pairs = [self._tokens(verdict) for verdict in verdicts]
        references = [self._reference(verdict, pair) for verdict, pair in zip(verdicts, pairs, strict=True)]
        examples: dict[str, Example] = {}
        for is_given in (True, False):  # apart: whoever lacks a reference goes through the upper layers, too
            wanted = [index for index, reference in enumerate(references) if (reference is not None) is is_given]
            for group in micro_batches([pairs[index].total for index in wanted], self._config.micro_batch_tokens):
                examples |= self._encode([wanted[place] for place in group], verdicts, pairs, references)
        return examples

    def _encode(
        self,
        indices: list[int],
        verdicts: Sequence[Verdict],
        pairs: Sequence[PairTokens],
        references: Sequence[tuple[float, float] | None],
    ) -> dict[str, Example]:
        given = [reference for index in indices if (reference := references[index]) is not None]
        encoded = self._policy.encode([pairs[index] for index in indices], given or None)
        rows = [(verdicts[index], pair) for index, pair in zip(indices, encoded, strict=True)]
        return {verdict.preference_id: self._example(verdict, pair) for verdict, pair in rows}

    def _example(self, verdict: Verdict, encoded: Encoded) -> Example:
        return Example(
            verdict.preference_id,
            encoded,
            is_tie=verdict.is_tie,
            thumb=verdict.thumb,
            safety_gap=self._safety_gap(verdict),
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
        """By how much chosen is safer than rejected; 0 where one of them has no score."""
        if not self._config.safety_weight or verdict.thumb:
            return 0.0
        chosen, rejected = safety(verdict.chosen, self._scorer), safety(verdict.rejected, self._scorer)
        return 0.0 if chosen is None or rejected is None else chosen - rejected

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
