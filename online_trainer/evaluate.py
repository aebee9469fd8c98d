"""How far the policy has gone, and whether what it says is still language: numbers before anyone meets it.

``Drift`` is cheap and runs after every step: whole-vocabulary KL to the base on fixed answers of the base.
``probe`` runs before a publication: the version's own sampled answers, judged under itself and under the base.
M predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from online_trainer.batches import PairTokens, pack, prompt_tokens
from online_trainer.learner import Example
from online_trainer.policy import Policy
from telemetry.events import Message
from telemetry.text import repetition_ratio

PROBE_TEMPERATURE = 0.7


class Answers(NamedTuple):
    """Sampled answers as rows whose rejected side is empty, their texts, and the logits they were drawn from."""

    rows: list[PairTokens]
    texts: list[str]
    logits_MV: Tensor  # before the temperature, row after row

    def spoken(self) -> list[PairTokens]:
        """The answers that have a token at all: there is nothing to measure on the others."""
        return [row for row in self.rows if row.chosen]


class Divergence(NamedTuple):
    """Means over positions, in nats. All are whole-vocabulary expectations: what was drawn there adds no noise."""

    kl: float  # KL(policy || base)
    entropy: float  # of the policy
    surprise: float  # −log-prob under the base of what the policy says next at PROBE_TEMPERATURE


@torch.no_grad()
def sample(policy: Policy, prompts: Sequence[PairTokens], *, tokens: int, temperature: float, seed: int) -> Answers:
    """One answer of at most ``tokens`` tokens to each prompt (their other fields are ignored), reproducible."""
    width = max(len(prompt.prompt) for prompt in prompts)
    tokenizer: Any = policy.tokenizer
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end] * (width - len(p.prompt)) + list(p.prompt) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p.prompt)) + [1] * len(p.prompt) for p in prompts])
    model: Any = policy.model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids.to(policy.device), attention_mask=mask.to(policy.device), max_new_tokens=tokens,
            do_sample=True, temperature=temperature, top_k=0, top_p=1.0, pad_token_id=end, eos_token_id=end,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    answers = [_until(end, row) for row in out.sequences[:, width:].tolist()]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    rows = [PairTokens(prompt.prompt, answer, ()) for prompt, answer in zip(prompts, answers, strict=True)]
    logits_BTV = torch.stack(out.logits, dim=1)
    said = [logits_TV[: len(answer)] for logits_TV, answer in zip(logits_BTV, answers, strict=True)]
    return Answers(rows, texts, torch.cat(said))


def _until(end: int, ids: list[int]) -> tuple[int, ...]:
    """``ids`` up to and with the first end token."""
    return tuple(ids[: ids.index(end) + 1] if end in ids else ids)


def divergence(policy_MV: Tensor, base_MV: Tensor) -> Divergence:
    """KL, entropy and surprise from both models' logits."""
    log_p_MV, log_q_MV = policy_MV.float().log_softmax(-1), base_MV.float().log_softmax(-1)
    p_MV = log_p_MV.exp()
    kl = (p_MV * (log_p_MV - log_q_MV)).sum(-1).mean()
    entropy = -(p_MV * log_p_MV).sum(-1).mean()
    said_MV = (policy_MV.float() / PROBE_TEMPERATURE).softmax(-1)
    surprise = -(said_MV * log_q_MV).sum(-1).mean()
    return Divergence(float(kl), float(entropy), float(surprise))


class Drift:
    """KL per token to the base on fixed texts; the base's side is computed once."""

    def __init__(self, policy: Policy, texts: Sequence[PairTokens]) -> None:
        self._policy = policy
        self._rows = pack(texts).to(policy.device)
        self._hidden_BTD = policy.lower(self._rows)
        with torch.no_grad(), policy.as_reference():
            self._base_MV = policy.upper(self._rows, self._hidden_BTD)

    @torch.no_grad()
    def kl_per_token(self) -> float:
        """Of the policy as it is now."""
        policy_MV = self._policy.upper(self._rows, self._hidden_BTD)
        return divergence(policy_MV, self._base_MV).kl


@torch.no_grad()
def compare(policy: Policy, answers: Answers) -> Divergence:
    """The policy as it was when it gave ``answers``, against the base."""
    packed = pack(answers.spoken()).to(policy.device)
    with policy.as_reference():
        base_MV = policy.upper(packed, policy.lower(packed))
    return divergence(answers.logits_MV, base_MV)


def probe_prompts(policy: Policy, texts: Sequence[str], limit: int) -> list[PairTokens]:
    """The probe questions as rows without answers."""
    messages = [(Message(role="user", content=text),) for text in texts]
    return [PairTokens(prompt_tokens(policy.tokenizer, message, limit), (), ()) for message in messages]


def probe(policy: Policy, prompts: Sequence[PairTokens], *, tokens: int, seed: int) -> dict[str, float]:
    """kl_per_token, probe_{repetition,length_tokens,entropy,perplexity} of fresh answers to ``prompts``."""
    return measure(policy, sample(policy, prompts, tokens=tokens, temperature=PROBE_TEMPERATURE, seed=seed))


def measure(policy: Policy, answers: Answers) -> dict[str, float]:
    """``probe``'s numbers of answers that are there."""
    found = compare(policy, answers) if answers.spoken() else Divergence(0.0, 0.0, 0.0)
    return {
        "kl_per_token": found.kl,
        "probe_repetition": _mean([repetition_ratio(text) for text in answers.texts]),
        "probe_length_tokens": _mean([float(len(row.chosen)) for row in answers.rows]),
        "probe_entropy": found.entropy,
        "probe_perplexity": float(torch.tensor(found.surprise).exp()),
    }


def base_yardsticks(
    policy: Policy, prompts: Sequence[PairTokens], *, tokens: int, seed: int
) -> tuple[Drift, dict[str, float]]:
    """Of one set of the base's answers: what every step is measured on, and ``probe``'s numbers as base_probe_…"""
    with policy.as_reference():
        answers = sample(policy, prompts, tokens=tokens, temperature=PROBE_TEMPERATURE, seed=seed)
        found = measure(policy, answers)
    named = {f"base_{name}": value for name, value in found.items() if name != "kl_per_token"}
    return Drift(policy, answers.spoken()), named


@torch.no_grad()
def heldout(policy: Policy, examples: Sequence[Example], micro_batch_pairs: int = 8) -> dict[str, float]:
    """Reward accuracy on verdicts never trained on; equal rewards, as before the first step, count half."""
    margins: list[Tensor] = []
    for start in range(0, len(examples), micro_batch_pairs):
        part = [example.encoded for example in examples[start : start + micro_batch_pairs]]
        own, reference, _ = policy.logps(part)
        margins.append((own.chosen_B - reference.chosen_B) - (own.rejected_B - reference.rejected_B))
    if not margins:
        return {"heldout_pairs": 0.0}
    wins = (torch.sign(torch.cat(margins)) + 1) / 2
    return {"heldout_pairs": float(len(examples)), "heldout_win_rate": float(wins.mean())}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
