"""From logits to one token per sequence, with log-probabilities, in fp32; each row by its own rules and dice.

A row's token depends on its own logits, parameters and random stream only, never on what else is in the
batch. On a GPU rows that nothing shapes are drawn together and read once, for each question waits until the step
is over; on a processor a row at a time stays in its caches. Nucleus sampling looks at the largest
``NUCLEUS_TOKENS`` first and sorts the whole vocabulary only if they do not carry top_p.

Dimensions: N rows, M of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from serving.sampling_rules import Rule, Sampled

NUCLEUS_TOKENS = 256


def summarise(logits_NV: Tensor) -> Tensor:
    """[3, N] float64: the likeliest token, its logit, and the log of the sum of all."""
    logits_NV = logits_NV.float()
    sums_N = logits_NV.logsumexp(dim=-1)
    greedy_N = logits_NV.argmax(dim=-1)
    best_N = logits_NV.gather(1, greedy_N[:, None])[:, 0]
    return torch.stack([greedy_N.double(), best_N.double(), sums_N.double()])


def sample(
    logits_NV: Tensor, rules: Sequence[Rule], summary_3N: Tensor | None = None, *, together: bool | None = None
) -> list[Sampled]:
    """One token per row. Greedy for temperature 0; a row that is not finite is marked, its token 0.

    ``summary_3N``: what ``summarise`` says of these logits, where it is known. ``together``: whether rows that nothing
    shapes are drawn at once; the tokens are the same.
    """
    together = logits_NV.is_cuda if together is None else together
    drawn = [i for i, rule in enumerate(rules) if together and rule.shaping is None and rule.temperature > 0]
    groups = [[i for i in drawn if rules[i].top_p >= 1], [i for i in drawn if rules[i].top_p < 1]]
    listed = [i for i, rule in enumerate(rules) if rule.top_logprobs]
    uniforms = {i: rules[i].dice.random() for i in drawn}
    parts = [summarise(logits_NV) if summary_3N is None else summary_3N]
    for group, draw in zip(groups, (_draw, _draw_nucleus), strict=True):
        if group:
            parts.append(draw(_rows(logits_NV, group), *_given([rules[i] for i in group], group, uniforms, logits_NV)))
    if listed:
        largest, ids = _rows(logits_NV, listed).topk(max(rules[i].top_logprobs for i in listed))
        parts += [largest.double(), ids.double()]
    values = torch.cat([part.flatten() for part in parts]).tolist()  # here the device is waited for, once
    chosen, picked, sums = _table(values, 0, 3, len(rules))
    at = 3 * len(rules)
    for group in groups:
        for i, token, logit, is_short in zip(group, *_table(values, at, 3, len(group)), strict=True):
            if is_short and isfinite(sums[i]):
                token = _pick(logits_NV[i].float(), rules[i], uniforms[i])
                logit = float(logits_NV[i, token])
            chosen[i], picked[i] = token, logit
        at += 3 * len(group)
    for i, rule in enumerate(rules):
        if i not in uniforms and (rule.shaping is not None or rule.temperature > 0) and isfinite(sums[i]):
            token = _choose(logits_NV[i].float(), rule)
            chosen[i], picked[i] = token, float(logits_NV[i, token])
    tops = _tops(values[at:], listed, rules, sums)
    return [
        Sampled(int(token), logit - total, tops.get(i, ()), True) if isfinite(total) else Sampled(0, 0.0, (), False)
        for i, (token, logit, total) in enumerate(zip(chosen, picked, sums, strict=True))
    ]


def _rows(logits_NV: Tensor, wanted: list[int]) -> Tensor:
    if len(wanted) == len(logits_NV):
        return logits_NV.float()
    return torch.stack([logits_NV[i] for i in wanted]).float()


def _table(values: list[float], at: int, columns: int, count: int) -> list[list[float]]:
    return [values[at + i * count : at + (i + 1) * count] for i in range(columns)]


def _given(rules: list[Rule], group: list[int], uniforms: dict[int, float], like: Tensor) -> Tensor:
    """[3, M] float64 on the device of ``like``, nobody waiting: temperatures, top_p, uniform numbers."""
    rows = [[rule.temperature for rule in rules], [rule.top_p for rule in rules], [uniforms[i] for i in group]]
    return torch.tensor(rows, dtype=torch.float64, pin_memory=like.is_cuda).to(like.device, non_blocking=True)


def _draw(logits_MV: Tensor, temperatures_M: Tensor, _: Tensor, uniforms_M: Tensor) -> Tensor:
    """[3, M] float64: the token drawn, its logit, 0."""
    tokens_M = _invert((logits_MV / temperatures_M.float()[:, None]).softmax(dim=-1), uniforms_M)
    logits_M = logits_MV.gather(1, tokens_M[:, None])[:, 0]
    return torch.stack([tokens_M.double(), logits_M.double(), torch.zeros_like(uniforms_M)])


def _draw_nucleus(logits_MV: Tensor, temperatures_M: Tensor, top_p_M: Tensor, uniforms_M: Tensor) -> Tensor:
    """[3, M] float64: the token drawn, its logit, and 1 where the largest do not carry top_p."""
    probs_MV = (logits_MV / temperatures_M.float()[:, None]).softmax(dim=-1)
    largest, ids = probs_MV.topk(min(NUCLEUS_TOKENS, probs_MV.shape[1]))
    is_short_M = largest.sum(dim=-1).double() < top_p_M if largest.shape[1] < probs_MV.shape[1] else uniforms_M * 0
    before = largest.cumsum(dim=-1) - largest
    is_kept = before < top_p_M.float()[:, None]
    last_M = (is_kept.sum(dim=-1) - 1).clamp_min(0)  # of a row that is not finite none is kept
    places_M = _invert(largest * is_kept, uniforms_M).minimum(last_M)
    tokens_M = ids.gather(1, places_M[:, None])[:, 0]
    logits_M = logits_MV.gather(1, tokens_M[:, None])[:, 0]
    return torch.stack([tokens_M.double(), logits_M.double(), is_short_M.double()])


def _invert(weights_MV: Tensor, uniforms_M: Tensor) -> Tensor:
    """Where each row's cumulative distribution passes its uniform number."""
    sums_MV = weights_MV.double().cumsum(dim=-1)
    places_M = torch.searchsorted(sums_MV, uniforms_M[:, None] * sums_MV[:, -1:], right=True)[:, 0]
    return places_M.clamp_max(weights_MV.shape[1] - 1)


def _choose(logits_V: Tensor, rule: Rule) -> int:
    """The next token of one row."""
    if rule.shaping is not None:
        logits_V = rule.shaping.shaped(logits_V)
    return int(logits_V.argmax()) if rule.temperature == 0 else _pick(logits_V, rule, rule.dice.random())


def _pick(logits_V: Tensor, rule: Rule, uniform: float) -> int:
    """Nucleus sampling by inverting the cumulative distribution at one uniform number."""
    probs_V = (logits_V / rule.temperature).softmax(dim=-1)
    if rule.top_p >= 1:
        return _place(probs_V, uniform)
    count = min(NUCLEUS_TOKENS, probs_V.shape[0])
    largest, ids = probs_V.topk(count)
    if float(largest.sum()) < rule.top_p and count < probs_V.shape[0]:
        largest, ids = probs_V.sort(descending=True)
    before = largest.cumsum(0) - largest
    return int(ids[_place(largest[before < rule.top_p], uniform)])  # the smallest set whose mass reaches top_p


def _place(weights: Tensor, uniform: float) -> int:
    sums = weights.double().cumsum(0)
    place = int(torch.searchsorted(sums, uniform * float(sums[-1]), right=True))
    return min(place, weights.shape[0] - 1)


def _tops(
    values: list[float], listed: list[int], rules: Sequence[Rule], sums: list[float]
) -> dict[int, tuple[tuple[int, float], ...]]:
    """Row → its likeliest tokens with their log-probs, from the rows' largest logits and their ids."""
    if not listed:
        return {}
    width = len(values) // (2 * len(listed))
    logits, ids = (_table(values, part * width * len(listed), len(listed), width) for part in range(2))
    return {
        row: tuple((int(ids[k][j]), logits[k][j] - sums[row]) for j in range(rules[row].top_logprobs))
        for k, row in enumerate(listed)
    }
