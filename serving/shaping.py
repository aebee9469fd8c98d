"""What a request changes about the next token: penalties on what was said, biases, and a grammar it is held to.

A shaped row is a copy; log-probs that are reported stay those of the model's own distribution. V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor

from serving.errors import InvalidRequest
from serving.tool_calls import CLOSE, COMPACT, OPEN, call_grammar, must_hold
from serving.wire import GenerateRequest, Sampling


class Guides:
    """Makes guides for one model's vocabulary; the first one costs a second, the later ones little."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self.vocabulary = tokenizer, vocabulary
        self._words: LLTokenizer | None = None

    def guide(self, request: GenerateRequest) -> LLMatcher | None:
        """A matcher that lets through exactly what the request's schema and tools allow; None where that is anything.

        Raises InvalidRequest for what cannot be enforced. A large schema takes up to a second.
        """
        if must_hold(request):
            grammar = call_grammar(request, are_marks_special=self._are_special(OPEN, CLOSE))
            return self._matcher("tools", LLMatcher.grammar_from_lark(grammar))
        if not request.sampling.json_schema:
            return None
        try:
            schema = request.sampling.json_schema
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT)  # type: ignore[arg-type]
        except ValueError as error:
            raise InvalidRequest(f"response_format: {error}") from error
        return self._matcher("response_format", grammar)

    def _matcher(self, field: str, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().split("\n", 1)[0]
            raise InvalidRequest(f"{field}: this JSON schema cannot be enforced: {reason}")
        return matcher

    def _vocabulary(self) -> LLTokenizer:
        if self._words is None:
            self._words = from_tokenizer(self._tokenizer, n_vocab=self.vocabulary)
        return self._words

    def _are_special(self, *marks: str) -> bool:
        words = self._vocabulary()
        ids = [words.tokenize_str(mark, parse_special=True) for mark in marks]
        return all(len(tokens) == 1 and words.is_special_token(tokens[0]) for tokens in ids)

    def shaping(self, sampling: Sampling, guide: LLMatcher | None) -> Shaping | None:
        """One completion's own, with a copy of ``guide``; None where the model alone decides."""
        if guide is None and not sampling.is_shaped:
            return None
        if any(not 0 <= token_id < self.vocabulary for token_id in sampling.logit_bias):
            raise InvalidRequest(f"logit_bias: token ids are 0 to {self.vocabulary - 1}")
        return Shaping(sampling, guide.deep_copy() if guide is not None else None)


class Shaping:
    """The shaping of one completion; ``accept`` tells it what was sampled."""

    def __init__(self, sampling: Sampling, guide: LLMatcher | None) -> None:
        self._frequency, self._presence = sampling.frequency_penalty, sampling.presence_penalty
        self._said: Counter[int] = Counter()
        self._biased = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32)
        self._guide = guide

    def shaped(self, logits_V: Tensor) -> Tensor:
        """The logits to sample from. OpenAI's formula: logit − frequency · count − presence · (count > 0) + bias."""
        out_V = logits_V.clone()
        if self._said and (self._frequency or self._presence):
            ids = torch.tensor(list(self._said), device=out_V.device)
            counts = torch.tensor(list(self._said.values()), dtype=out_V.dtype, device=out_V.device)
            out_V[ids] -= self._frequency * counts + self._presence
        if len(self._biased):
            out_V.index_add_(0, self._biased.to(out_V.device), self._bias.to(out_V.device))
        if self._guide is not None:
            allowed_V = torch.frombuffer(bytearray(self._guide.compute_logit_bias()), dtype=torch.uint8)
            out_V.masked_fill_(allowed_V.to(out_V.device) == 0, -torch.inf)
        return out_V

    def accept(self, token_id: int) -> bool:
        """Note a sampled token; False when the grammar's limits broke and nothing more can be said."""
        self._said[token_id] += 1
        return self._guide is None or self._guide.consume_token(token_id)
