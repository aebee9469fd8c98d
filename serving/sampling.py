"""From logits to one token per sequence, with log-probabilities, in fp32; each row by its own rules and dice.

A row's token depends on its own logits, parameters and random stream only, never on what else is in the
batch. On a GPU rows that nothing shapes are drawn together, on a processor a row at a time stays in its caches; either
way they are read once, for each question waits until the step is over. Nucleus sampling looks at the largest
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
    drawn = [i for i, rule in enumerate(rules) if rule.shaping is None and rule.temperature > 0]
    wholes, nuclei = [i for i in drawn if rules[i].top_p >= 1], [i for i in drawn if rules[i].top_p < 1]
    groups = [group for group in (wholes, nuclei) if group] if together else [[i] for i in drawn]
    listed = [i for i, rule in enumerate(rules) if rule.top_logprobs]
    uniforms = {i: rules[i].dice.random() for i in drawn}
    parts = [summarise(logits_NV) if summary_3N is None else summary_3N]
    for group in groups:
        parts.append(_draw(_rows(logits_NV, group), [rules[i] for i in group], [uniforms[i] for i in group]))
    if listed:
        largest, ids = _rows(logits_NV, listed).topk(max(rules[i].top_logprobs for i in listed))
        parts += [largest.double(), ids.double()]
    values = torch.cat([part.flatten() for part in parts]).tolist()  # here the device is waited for, once
    chosen, picked, sums = _table(values, 0, 3, len(rules))
    at = 3 * len(rules)
    for group in groups:
        for i, token, logit, is_short in zip(group, *_table(values, at, 3, len(group)), strict=True):
            if is_short and isfinite(sums[i]):
                token = _of_all(logits_NV[i].float(), rules[i], uniforms[i])
                logit = float(logits_NV[i, token])
            chosen[i], picked[i] = token, logit
        at += 3 * len(group)
    for i, rule in enumerate(rules):
        if rule.shaping is not None and isfinite(sums[i]):
            token = _choose(rule.shaping.shaped(logits_NV[i].float()), rule)
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


def _draw(logits_MV: Tensor, rules: Sequence[Rule], uniforms: Sequence[float]) -> Tensor:
    """[3, M] float64: the token drawn, its logit, and 1 where the largest do not carry top_p.

    All of ``rules`` have a top_p below 1, or none.
    """
    rows = [[rule.temperature for rule in rules], [rule.top_p for rule in rules], uniforms]
    given = torch.tensor(rows, dtype=torch.float64, pin_memory=logits_MV.is_cuda)
    temperatures_M, top_p_M, uniforms_M = given.to(logits_MV.device, non_blocking=True)  # nobody waits
    probs_MV = (logits_MV / temperatures_M.float()[:, None]).softmax(dim=-1)
    is_short_M = torch.zeros_like(uniforms_M)
    if rules[0].top_p >= 1:
        tokens_M = _invert(probs_MV, uniforms_M)
    else:
        largest, ids = probs_MV.topk(min(NUCLEUS_TOKENS, probs_MV.shape[1]))
        if largest.shape[1] < probs_MV.shape[1]:
            is_short_M = (largest.sum(dim=-1).double() < top_p_M).double()
        tokens_M = _in_nucleus(largest, ids, top_p_M, uniforms_M)
    logits_M = logits_MV.gather(1, tokens_M[:, None])[:, 0]
    return torch.stack([tokens_M.double(), logits_M.double(), is_short_M])


def _in_nucleus(probs_MK: Tensor, ids_MK: Tensor, top_p_M: Tensor, uniforms_M: Tensor) -> Tensor:
    """A token of the smallest set whose mass reaches top_p; ``probs`` are the largest, in order."""
    is_kept = probs_MK.cumsum(dim=-1) - probs_MK < top_p_M.float()[:, None]
    last_M = (is_kept.sum(dim=-1) - 1).clamp_min(0)  # of a row that is not finite none is kept
    places_M = _invert(probs_MK * is_kept, uniforms_M).minimum(last_M)
    return ids_MK.gather(1, places_M[:, None])[:, 0]


def _invert(weights_MV: Tensor, uniforms_M: Tensor) -> Tensor:
    """Where each row's cumulative distribution passes its uniform number."""
    sums_MV = weights_MV.double().cumsum(dim=-1)
    places_M = torch.searchsorted(sums_MV, uniforms_M[:, None] * sums_MV[:, -1:], right=True)[:, 0]
    return places_M.clamp_max(weights_MV.shape[1] - 1)


def _of_all(logits_V: Tensor, rule: Rule, uniform: float) -> int:
    """A row's token where the largest do not carry top_p."""
    probs_1V, ids_1V = (logits_V / rule.temperature).softmax(dim=-1)[None].sort(descending=True)
    given = torch.tensor([[rule.top_p], [uniform]], dtype=torch.float64, device=logits_V.device)
    return int(_in_nucleus(probs_1V, ids_1V, *given))


def _choose(logits_V: Tensor, rule: Rule) -> int:
    """The next token of a row that was shaped."""
    if rule.temperature == 0:
        return int(logits_V.argmax())
    uniform = rule.dice.random()
    token, _, is_short = _draw(logits_V[None], [rule], [uniform])[:, 0].tolist()
    return _of_all(logits_V, rule, uniform) if is_short else int(token)


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
