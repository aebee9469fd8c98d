"""How far the policy has gone, and whether what it says is still language: numbers before anyone meets it.

``Drift`` is cheap and runs after every step: whole-vocabulary KL to the base on fixed answers of the base.
``probe`` runs before a publication: the version's own sampled answers, judged under itself and under the base.
M predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from online_trainer.batches import PairTokens, pack, prompt_tokens
from online_trainer.config import TrainerConfig
from online_trainer.learner import Example
from online_trainer.policy import Policy
from online_trainer.safety import Scorer
from telemetry.events import Message
from telemetry.text import distinct_ratio, repetition_ratio

PROBE_TEMPERATURE = 0.7
LEAST_SAID = 32  # tokens, all probe answers together: of fewer, one answer of four like marks is half repetition
BINS = 5
NOTHING = torch.empty(0)
CAPABILITY = (
    "Water boils when its vapour pressure equals the pressure of the air around it. At sea level that happens at one "
    "hundred degrees Celsius. On a mountain the air is thinner, so water boils earlier and food takes longer to cook. "
    "In 1679 Denis Papin built a closed pot whose steam could not escape. The pressure in it rose, the water became "
    "hotter than in an open pot, and bones turned soft within an hour. Twelve pots cost him three months of work; a "
    "valve with a weight kept them from bursting. If a pot holds two litres and loses a tenth of its water every ten "
    "minutes, about one litre is left after an hour and five minutes."
)


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


class Judged(NamedTuple):
    """What the policy makes of verdicts."""

    margin_B: Tensor  # β times chosen's log-ratio less rejected's
    drop_B: Tensor  # by how much chosen became less likely, in nats a token


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
    """kl_per_token, probe_{repetition,diversity,length_tokens,entropy,perplexity} of fresh answers to ``prompts``."""
    return measure(policy, sample(policy, prompts, tokens=tokens, temperature=PROBE_TEMPERATURE, seed=seed))


def measure(policy: Policy, answers: Answers) -> dict[str, float]:
    """``probe``'s numbers of answers that are there."""
    found = compare(policy, answers) if answers.spoken() else Divergence(0.0, 0.0, 0.0)
    return {
        "kl_per_token": found.kl,
        "probe_repetition": _mean([repetition_ratio(text) for text in answers.texts]),
        "probe_diversity": distinct_ratio(answers.texts),
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
def judged(policy: Policy, examples: Sequence[Example], beta: float, micro_batch_pairs: int = 8) -> Judged:
    """The policy's margins on verdicts, ties left out."""
    examples = [example for example in examples if not example.is_tie]
    margins: list[Tensor] = []
    drops: list[Tensor] = []
    for start in range(0, len(examples), micro_batch_pairs):
        part = [example.encoded for example in examples[start : start + micro_batch_pairs]]
        reference = policy.base_logps(part)  # one that moves would hide what was learned
        own, lengths, _ = policy.score(part)
        chosen_B = own.chosen_B - reference.chosen_B
        margins.append(beta * (chosen_B - (own.rejected_B - reference.rejected_B)))
        drops.append(-chosen_B / lengths.chosen_B)
    return Judged(torch.cat(margins).cpu(), torch.cat(drops).cpu()) if margins else Judged(NOTHING, NOTHING)


def curve(found: Judged) -> dict[str, float]:
    """The calibration curve as ``heldout_said_<n>`` (mean probability of a bin) and ``heldout_came_<n>`` (share)."""
    points = calibration(found.margin_B) if len(found.margin_B) else []
    said = {f"heldout_said_{n}": point[0] for n, point in enumerate(points)}
    return said | {f"heldout_came_{n}": point[1] for n, point in enumerate(points)}


def heldout(found: Judged, name: str = "heldout") -> dict[str, float]:
    """``<name>_``{pairs, win_rate, loss, calibration_error, chosen_drop} of verdicts; equal rewards count half.

    The calibration error is the mean distance of σ(margin) to the share of verdicts that agree, over BINS bins by
    σ(margin) with weights (ECE, arXiv 1706.04599). The drop is how much less likely chosen answers became, in nats a
    token.
    """
    count = len(found.margin_B)
    if not count:
        return {f"{name}_pairs": 0.0}
    wins_B = (torch.sign(found.margin_B) + 1) / 2
    values = {
        "pairs": float(count),
        "win_rate": float(wins_B.mean()),
        "loss": float(-logsigmoid(found.margin_B).mean()),
        "calibration_error": sum(abs(said - came) * share for said, came, share in calibration(found.margin_B)),
        "chosen_drop": float(found.drop_B.mean()),
    }
    return {f"{name}_{key}": value for key, value in values.items()}


def calibration(margin_B: Tensor) -> list[tuple[float, float, float]]:
    """Of each bin that is not empty: mean probability said, share that came true, share of all pairs.

    Which of the two answers is asked about is arbitrary: each pair counts by the side that the policy prefers.
    """
    said_B, is_right_B = torch.sigmoid(margin_B.abs()), (torch.sign(margin_B) + 1) / 2
    bin_B = ((said_B - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    bins = ((said_B[bin_B == n], is_right_B[bin_B == n]) for n in range(BINS))
    return [(float(s.mean()), float(r.mean()), len(s) / len(margin_B)) for s, r in bins if len(s)]


@torch.no_grad()
def perplexity(policy: Policy, row: PairTokens) -> float:
    """Of a fixed text, ``row.chosen`` after ``row.prompt``: whether what no taste is about is still known."""
    scored = policy.score(policy.encode([row], [(0.0, 0.0)]))
    return float((-scored.policy.chosen_B / scored.lengths.chosen_B).exp())


def capability_text(policy: Policy) -> PairTokens:
    """CAPABILITY as a row."""
    tokenizer: Any = policy.tokenizer
    ids = tokenizer.encode(CAPABILITY, add_special_tokens=False)
    return PairTokens(tuple(ids[:1]), tuple(ids[1:]), ())


def safety(
    policy: Policy, prompts: Sequence[PairTokens], scorer: Scorer, *, tokens: int, seed: int
) -> dict[str, float]:
    """What ``scorer`` says of answers to questions that invite harm: the mean, 0 to 1, and the share it failed on.

    An answer without a score counts as 0: what nobody could look at is not taken for safe.
    """
    answers = sample(policy, prompts, tokens=tokens, temperature=PROBE_TEMPERATURE, seed=seed)
    scores = [scorer(text) for text in answers.texts]
    unscored = sum(score is None for score in scores) / len(scores)
    return {"safety": _mean([score or 0.0 for score in scores]), "safety_unscored_ratio": unscored}


def unjudged(values: Mapping[str, float], config: TrainerConfig) -> str:
    """Of weights that are not astray: why nobody can say that they are safe, or "". The scorer failed, not they."""
    if "safety" not in values:
        return ""
    if "base_safety" not in values:
        return "the safety scorer fails on the base's own answers to the safety set"
    if values["safety"] < values["base_safety"] - config.max_safety_loss:
        return f"the safety scorer fails on {values['safety_unscored_ratio']:.0%} of the answers to the safety set"
    return ""


def astray(values: Mapping[str, float], config: TrainerConfig) -> str:
    """Why these weights must not go on, or "": one of their numbers has turned, whatever their win rate is."""
    repetition, base_repetition = values["probe_repetition"], values["base_probe_repetition"]
    entropy, base_entropy = values["probe_entropy"], values["base_probe_entropy"]
    perplexity, base_perplexity = values["capability_perplexity"], values["base_capability_perplexity"]
    drop = values.get("replay_chosen_drop", 0.0)
    has_said_enough = values["probe_length_tokens"] * len(config.probes) >= LEAST_SAID
    if has_said_enough and repetition > base_repetition + config.max_repetition_gain:
        return f"answers repeat {repetition:.2f} of their trigrams, the base's {base_repetition:.2f}"
    if entropy < config.min_entropy_ratio * base_entropy:
        return f"answers are nearly fixed: {entropy:.2f} nats a token, the base's {base_entropy:.2f}"
    if drop > config.max_chosen_drop:
        return f"chosen answers sink with the rejected ones, by {drop:.2f} nats a token"
    if perplexity > config.max_capability_ratio * base_perplexity:
        return f"the perplexity of a plain text is {perplexity:.1f}, the base's {base_perplexity:.1f}"
    safest = values.get("safety", 0.0) + values.get("safety_unscored_ratio", 0.0)  # whatever those would score
    if safest < values.get("base_safety", 0.0) - config.max_safety_loss:
        return f"answers to the safety set score {values['safety']:.2f}, the base's {values['base_safety']:.2f}"
    return ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
