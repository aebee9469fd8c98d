"""Verdicts as tokens, and tokens as rows: prompt, chosen and rejected in one row, the prompt computed once.

A row is ``prompt chosen rejected``; a mask keeps rejected from seeing chosen, and its positions start again
after the prompt, so that both see exactly what they saw when served (prefix sharing, arXiv 2410.20305).
On a GPU all pairs share one row. Only positions that predict a completion's tokens get logits. B rows (one a
pair, or one for all), T tokens, M predicted tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from online_trainer.segments import Segments, segments_of
from telemetry.conversation import conversation, tools_of
from telemetry.events import Completion, Message


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    eos_token_id: int | None

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class PairTokens(NamedTuple):
    """One pair as token ids."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def total(self) -> int:
        """Length of the pair's row."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


class Rows(NamedTuple):
    """A batch of pairs. Values 0…pairs−1 of ``side_M`` are chosen sides, the ones behind them rejected sides."""

    tokens_BT: Tensor
    positions_BT: Tensor
    sees: Tensor | Segments  # B, 1, T, T, true where a query may look; or what one packed row's queries see
    starts: tuple[int, ...]  # flat index into B·T of each pair's first token
    source_M: Tensor  # flat index into B·T of the position that predicts
    target_M: Tensor  # the token that it should predict
    side_M: Tensor
    weight_M: Tensor  # of the token's log-prob in its side's sum

    @property
    def pairs(self) -> int:
        return len(self.starts)

    def to(self, device: torch.device) -> Rows:
        """The same rows on ``device``."""
        return self._replace(
            tokens_BT=self.tokens_BT.to(device),
            positions_BT=self.positions_BT.to(device),
            sees=self.sees.to(device),
            source_M=self.source_M.to(device),
            target_M=self.target_M.to(device),
            side_M=self.side_M.to(device),
            weight_M=self.weight_M.to(device),
        )


def prompt_tokens(tokenizer: Tokenizer, prompt: Sequence[Message], limit: int) -> tuple[int, ...]:
    """The chat template over ``prompt`` and its tools up to where the answer begins; its last ``limit`` tokens."""
    ids = tokenizer.apply_chat_template(
        conversation(prompt), tools=tools_of(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return tuple(ids[-limit:])


def completion_tokens(tokenizer: Tokenizer, completion: Completion, limit: int) -> tuple[int, ...]:
    """The answer's tokens; with the end token if it ended by itself, so that length can be learned."""
    ids = tokenizer.encode(completion.text, add_special_tokens=False)
    is_ended = completion.finish_reason == "stop" and not completion.is_clipped
    if is_ended and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return tuple(ids[:limit])


def served_reference(
    tokenizer: Tokenizer, completion: Completion, tokens: Sequence[int], weights: Sequence[float], base_version: str
) -> float | None:
    """The weighted sum of the base's log-probs of ``tokens`` as serving computed them; None where it has not."""
    ids = completion.token_ids
    if len(completion.reference_logps) > len(ids) and tokenizer.eos_token_id is not None:
        ids = (*ids, tokenizer.eos_token_id)
    is_of_these = len(completion.reference_logps) == len(ids) and tuple(tokens) == ids[: len(tokens)]
    if completion.reference != base_version or not is_of_these:
        return None
    return math.fsum(map(operator.mul, completion.reference_logps, weights))


def token_weights(length: int, other: int, ld_alpha: float) -> list[float]:
    """Weights of a side's ``length`` tokens: 1 up to the ``other`` side's length, ``ld_alpha`` beyond.

    LD-DPO (arXiv 2409.06411, eq. 8): what only the longer answer has is where length itself is rewarded. An answer
    that has no other beside it counts whole.
    """
    if not other:
        return [1.0] * length
    return [1.0] * min(length, other) + [ld_alpha] * max(0, length - other)


def pack(pairs: Sequence[PairTokens], ld_alpha: float = 1.0) -> Rows:
    """``pairs`` as one padded batch of shared-prompt rows."""
    length = max(pair.total for pair in pairs)
    tokens_BT = torch.zeros(len(pairs), length, dtype=torch.long)
    positions_BT = torch.zeros(len(pairs), length, dtype=torch.long)
    mask_BTT = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(pairs), 1, 1)
    for row, pair in enumerate(pairs):
        start, second = len(pair.prompt), len(pair.prompt) + len(pair.chosen)
        tokens_BT[row, : pair.total] = torch.tensor(pair.prompt + pair.chosen + pair.rejected)
        positions_BT[row, : pair.total] = _positions(pair)
        mask_BTT[row, second:, start:second] = False
    starts = tuple(row * length for row in range(len(pairs)))
    return Rows(tokens_BT, positions_BT, mask_BTT[:, None], starts, *_predictions(pairs, starts, ld_alpha))


def pack_flat(pairs: Sequence[PairTokens], ld_alpha: float = 1.0) -> Rows:
    """``pairs`` one after the other in one row, without padding."""
    starts = tuple(accumulate((pair.total for pair in pairs[:-1]), initial=0))
    tokens_T = torch.tensor([token for pair in pairs for side in pair for token in side])
    positions_T = torch.cat([_positions(pair) for pair in pairs])
    sees = segments_of([(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs])
    return Rows(tokens_T[None], positions_T[None], sees, starts, *_predictions(pairs, starts, ld_alpha))


def _positions(pair: PairTokens) -> Tensor:
    """Of a pair's tokens; rejected's start again after the prompt."""
    start = len(pair.prompt)
    return torch.cat([torch.arange(start + len(pair.chosen)), torch.arange(start, start + len(pair.rejected))])


def _predictions(
    pairs: Sequence[PairTokens], starts: Sequence[int], ld_alpha: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each token of the answers is predicted, the token, its side, and its weight: all of shape M."""
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for row, (begin, pair) in enumerate(zip(starts, pairs, strict=True)):
        start, second = len(pair.prompt), len(pair.prompt) + len(pair.chosen)
        sides = (row, start, pair.chosen, pair.rejected), (row + len(pairs), second, pair.rejected, pair.chosen)
        for side, first, ids, other in sides:
            source = torch.arange(first - 1, first - 1 + len(ids))
            source[:1] = start - 1  # both sides' first token follows the prompt
            weight = torch.tensor(token_weights(len(ids), len(other), ld_alpha))
            target = torch.tensor(ids, dtype=torch.long)
            parts.append((source + begin, target, torch.full((len(ids),), side), weight))
    source_M, target_M, side_M, weight_M = (torch.cat(column) for column in zip(*parts, strict=True))
    return source_M, target_M, side_M, weight_M


def micro_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices in groups whose padded size (longest × count) stays within ``token_budget``, similar lengths together.

    A pair longer than the budget gets a group of its own.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and lengths[index] * (len(group) + 1) > token_budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
