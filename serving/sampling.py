"""From logits to one token per sequence, with log-probabilities, in fp32; each row by its own rules and dice.

A row's token depends on its own logits, parameters and random stream only, never on what else is in the
batch. Nucleus sampling looks at the largest ``NUCLEUS_TOKENS`` first and sorts the whole vocabulary only if
they do not carry top_p.

Dimensions: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.sampling_rules import Rule, Sampled

NUCLEUS_TOKENS = 256


def sample(logits_NV: Tensor, rules: Sequence[Rule]) -> list[Sampled]:
    """One token per row. Greedy for temperature 0; a row that is not finite is marked, its token 0."""
    logits_NV = logits_NV.float()
    log_sums_N = logits_NV.logsumexp(dim=-1)
    greedy = logits_NV.argmax(dim=-1).tolist()
    finite = torch.isfinite(log_sums_N).tolist()
    chosen = [
        _choose(logits_NV[i], rule, greedy[i]) if is_finite else greedy[i]
        for i, (rule, is_finite) in enumerate(zip(rules, finite, strict=True))
    ]
    picked_N = logits_NV.gather(1, torch.tensor(chosen, device=logits_NV.device)[:, None])[:, 0]
    logprobs = (picked_N - log_sums_N).tolist()
    return [
        Sampled(token, logprob, _top(logits_NV[i], log_sums_N[i], rules[i].top_logprobs), True)
        if finite[i]
        else Sampled(0, 0.0, (), False)
        for i, (token, logprob) in enumerate(zip(chosen, logprobs, strict=True))
    ]


def _choose(logits_V: Tensor, rule: Rule, greedy: int) -> int:
    """The row's next token; ``greedy`` is its likeliest without shaping."""
    if rule.shaping is not None:
        logits_V = rule.shaping.shaped(logits_V)
        greedy = int(logits_V.argmax())
    return greedy if rule.temperature == 0 else _draw(logits_V, rule)


def _draw(logits_V: Tensor, rule: Rule) -> int:
    """Nucleus sampling by inverting the cumulative distribution at one uniform number."""
    probs_V = (logits_V / rule.temperature).softmax(dim=-1)
    uniform = rule.dice.random()
    if rule.top_p >= 1:
        return _invert(probs_V, uniform)
    count = min(NUCLEUS_TOKENS, probs_V.shape[0])
    largest, ids = probs_V.topk(count)
    if float(largest.sum()) < rule.top_p and count < probs_V.shape[0]:
        largest, ids = probs_V.sort(descending=True)
    before = largest.cumsum(0) - largest
    kept = largest[before < rule.top_p]  # the smallest set whose mass reaches top_p
    return int(ids[_invert(kept, uniform)])


def _invert(weights: Tensor, uniform: float) -> int:
    sums = weights.double().cumsum(0)
    place = int(torch.searchsorted(sums, uniform * float(sums[-1]), right=True))
    return min(place, weights.shape[0] - 1)


def _top(logits_V: Tensor, log_sum: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    largest, ids = logits_V.topk(count)
    return tuple(zip(ids.tolist(), (largest - log_sum).tolist(), strict=True))
