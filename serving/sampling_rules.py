"""How a row is sampled and what comes of it: the records between completions and sampling. Torch-free."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from serving.shaping import Shaping


class Rule(NamedTuple):
    """How one row is sampled."""

    temperature: float
    top_p: float
    top_logprobs: int
    dice: Random
    shaping: Shaping | None = None  # None: the model's own distribution


class Sampled(NamedTuple):
    """One token; log-probs are natural logs of the model's own distribution, before temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first
    is_finite: bool = True
