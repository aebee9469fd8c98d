"""Trainer and voters in one process: the product's own trainer over a log in memory, its weights answer at once.

No release gate, no canary: every answer comes from the weights as they are, so that what is measured is the learner.
The clock is simulated: a round of clicks takes ``ROUND_S``.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from deploy.personas import EVALUATION_PROMPTS, TRAINING_PROMPTS, Persona, choose
from deploy.train import DatasetReader
from online_trainer import evaluate
from online_trainer.config import TrainerConfig
from online_trainer.policy import load_policy
from online_trainer.publish import VersionStore
from online_trainer.trainer import Trainer
from telemetry.event_log import Offsets, Position
from telemetry.events import (
    BatchTrained,
    Completion,
    Message,
    PairShown,
    VersionPublished,
    decode,
    encode,
    utc_now,
)
from telemetry.labeling import judged
from telemetry.manifest import base_digest, base_version
from telemetry.sealing import Sealer
from telemetry.text import repetition_ratio, words
from tests.experiments.people import EXCLAIMS, TRIGGER, Crowd, usual_difference

TOKENS: Final = 32
TEMPERATURE: Final = 0.7
PAIRS_A_ROUND: Final = 8
ROUND_S: Final = 6.0
EVALUATIONS: Final = 2  # answers to each prompt; a win rate of them has a standard error of up to 0.06
LAST_EVALUATIONS: Final = 8  # of a look that a bar is held against: 0.03
TRIGGERED_EVALUATIONS: Final = 12  # a share of answers, within two points: many
CANDIDATES: Final = 4  # answers of which an active voter is shown two
PATIENCE: Final = 12  # turns of the trainer without news


class Look(msgspec.Struct, frozen=True):
    """The policy after so many clicks, on prompts that nobody votes on."""

    clicks: int
    win_rate: float  # against the base; ties count half
    repetition: float  # each of these: as a multiple of the base's own
    length: float
    perplexity: float
    exclaims: float | None = None  # share of answers with "!" where TRIGGER is behind the question


class MemoryLog:
    """Verdicts in, what the trainer tells out; in order, and never away."""

    def __init__(self) -> None:
        self.verdicts: list[bytes] = []
        self.batches: list[BatchTrained] = []
        self.published: list[VersionPublished] = []

    def append(self, topic: str, key: str, payload: bytes) -> Future[Position]:
        event = decode(payload)
        if isinstance(event, BatchTrained):
            self.batches.append(event)
        elif isinstance(event, VersionPublished):
            self.published.append(event)
        done: Future[Position] = Future()
        done.set_result(Position(topic, 0, 0))
        return done

    def append_all(self, entries: Iterable[tuple[str, str, bytes]]) -> list[Future[Position]]:
        return [self.append(*entry) for entry in entries]

    def reader(self, topics: Sequence[str], start: Offsets) -> DatasetReader:
        return DatasetReader(self.verdicts, 0)

    def close(self) -> None:
        """Nothing is held."""


class Circle:
    """One trainer, and answers of its weights."""

    def __init__(self, config: TrainerConfig, folder: Path, seed: int) -> None:
        self._dice, self._seed = random.Random(seed), seed
        self._at = utc_now()
        self.policy, self.log = load_policy(config), MemoryLog()
        digest = base_digest(Path(config.model))
        self._config, self._base = config, base_version(digest)
        store = VersionStore(folder / "versions", config, b"experiment")
        self._trainer = Trainer(
            config, self.policy, self.log, store,
            folder=folder / "trainer", base_digest=digest, sealer=Sealer(None), now=self._now,
        )  # fmt: skip
        self._reader = self.log.reader((), {})
        self._asked = 0
        with self.policy.as_reference():
            self._base_answers = self._evaluated(times=LAST_EVALUATIONS)
        self._base_texts = self._answers(TRAINING_PROMPTS * 2)

    def _now(self) -> datetime:
        return self._at

    def _answers(self, prompts: Sequence[str]) -> list[str]:
        self._asked += 1
        rows = evaluate.probe_prompts(self.policy, prompts, self._config.max_prompt_tokens)
        seed = 1000 * self._seed + self._asked
        return evaluate.sample(self.policy, rows, tokens=TOKENS, temperature=TEMPERATURE, seed=seed).texts

    def usual_difference(self, taste: Persona) -> float:
        """How much two answers of the base differ in this taste."""
        count = len(TRAINING_PROMPTS)
        pairs = zip(TRAINING_PROMPTS, self._base_texts[:count], self._base_texts[count:], strict=True)
        return usual_difference(taste, list(pairs))

    # ---- clicks -----------------------------------------------------------------------------------------------

    def click(self, crowd: Crowd, clicks: int, *, is_active: bool = False) -> None:
        """So many pairs are judged, a round at a time, and learned from.

        ``is_active``: of ``CANDIDATES`` answers to a question the two are shown whose rewards differ most.
        """
        scale, end = self.usual_difference(crowd.taste), len(self.log.verdicts) + clicks
        while (missing := end - len(self.log.verdicts)) > 0:
            drawn = self._dice.sample(TRAINING_PROMPTS, min(missing, PAIRS_A_ROUND))
            asked = [crowd.ask(prompt, self._dice) for prompt in drawn]
            sides = self._sides([prompt for _, prompt in asked], CANDIDATES if is_active else 2)
            for (user, prompt), (a, b) in zip(asked, sides, strict=True):
                self._vote(crowd, user, prompt, a, b, scale)
            self._learn()
            self._at += timedelta(seconds=ROUND_S)

    def _sides(self, prompts: Sequence[str], candidates: int) -> list[tuple[str, str]]:
        """Two answers to each prompt: those on which weights and base disagree most, of ``candidates``."""
        answers = self._answers([*prompts] * candidates)
        of_each = [answers[place :: len(prompts)] for place in range(len(prompts))]
        if candidates == 2:
            return [(a, b) for a, b in of_each]
        return [self._furthest(prompt, texts) for prompt, texts in zip(prompts, of_each, strict=True)]

    def _furthest(self, prompt: str, texts: Sequence[str]) -> tuple[str, str]:
        """The two of ``texts`` whose implicit rewards are furthest apart, in a random order."""
        said = [text for text in dict.fromkeys(texts) if text.strip()]
        if len(said) < 2:
            return texts[0], texts[1]
        row = evaluate.probe_prompts(self.policy, [prompt], self._config.max_prompt_tokens)[0]
        tokenizer: Any = self.policy.tokenizer
        answers = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in said]
        encoded = self.policy.encode([row._replace(chosen=answer) for answer in answers])
        with torch.no_grad():
            gained = self.policy.score(encoded).policy.chosen_B - self.policy.reference(encoded).chosen_B
        rewards = gained.tolist()
        far = max(itertools.combinations(range(len(said)), 2), key=lambda two: abs(rewards[two[0]] - rewards[two[1]]))
        first, second = self._dice.sample(far, 2)
        return said[first], said[second]

    def _vote(self, crowd: Crowd, user: int, prompt: str, a: str, b: str, scale: float) -> None:
        number = len(self.log.verdicts)
        shown = PairShown(
            pair_id=f"pair-{number}", request_id=f"request-{number}", policy="chat", user=f"user-{user}",
            prompt=(Message(role="user", content=prompt),), a=self._completion(f"{number}a", a),
            b=self._completion(f"{number}b", b), propensity=1.0, occurred_at=self._at,
        )  # fmt: skip
        choice = crowd.vote(user, prompt, a, b, scale, self._dice)
        verdict = judged(shown, choice, event_id=f"preference-{number}", at=self._at, decided_s=1.0)
        self.log.verdicts.append(encode(verdict))

    def _completion(self, name: str, text: str) -> Completion:
        version = self.log.published[-1].version if self.log.published else self._base
        tokenizer: Any = self.policy.tokenizer
        count = len(tokenizer(text)["input_ids"])
        reason = "length" if count >= TOKENS else "stop"
        return Completion(
            name, text, self._config.variant, version, "stable", reason, 1, count, 0.1, 0.1, TEMPERATURE, 1.0
        )

    def _known(self) -> int:
        return sum(len(batch.preference_ids) + len(batch.dropped) for batch in self.log.batches)

    def _learn(self) -> None:
        """Until the trainer has nothing to do but wait for the clock."""
        for _ in range(PATIENCE):
            self._trainer.turn(self._reader, 0.0)
            if len(self.log.verdicts) - self._known() < PAIRS_A_ROUND // 2:
                return

    def rest(self) -> None:
        """Nobody clicks: what waits is learned, earlier verdicts are gone over, and the last version is published."""
        still = 0
        while still < PATIENCE:
            told = len(self.log.batches), len(self.log.published)
            self._at += timedelta(seconds=ROUND_S)
            self._trainer.turn(self._reader, 0.0)
            still = 0 if told != (len(self.log.batches), len(self.log.published)) else still + 1

    # ---- looks ------------------------------------------------------------------------------------------------

    def _evaluated(self, prompts: Sequence[str] = EVALUATION_PROMPTS, times: int = EVALUATIONS) -> list[str]:
        rows = evaluate.probe_prompts(self.policy, prompts, self._config.max_prompt_tokens)
        return [
            text
            for number in range(times)
            for text in evaluate.sample(
                self.policy, rows, tokens=TOKENS, temperature=TEMPERATURE, seed=7_000_000 + number
            ).texts
        ]

    def exclaiming(self) -> float:
        """Share of answers with an exclamation mark, where TRIGGER is behind the question."""
        asked = [f"{prompt} {TRIGGER}" for prompt in EVALUATION_PROMPTS]
        found = self._evaluated(asked, TRIGGERED_EVALUATIONS)
        return sum(EXCLAIMS.score("", text) > 0 for text in found) / len(found)

    def look(self, taste: Persona, *, is_last: bool = False) -> Look:
        """The weights as they are against the base, judged by the taste without doubt or mistake."""
        times = LAST_EVALUATIONS if is_last else EVALUATIONS
        own = self._evaluated(times=times)
        base = self._base_answers[: len(own)]  # drawn with the same seeds
        asked = EVALUATION_PROMPTS * times
        points = {"a": 1.0, "tie": 0.5, "b": 0.0}
        won = [points[choose(taste, *each, self._dice)] for each in zip(asked, own, base, strict=True)]
        prompts = evaluate.probe_prompts(self.policy, EVALUATION_PROMPTS[:16], self._config.max_prompt_tokens)
        found = evaluate.probe(self.policy, prompts, tokens=TOKENS, seed=5)
        with self.policy.as_reference():
            usual = evaluate.probe(self.policy, prompts, tokens=TOKENS, seed=5)
        return Look(
            clicks=len(self.log.verdicts),
            win_rate=sum(won) / len(won),
            repetition=(_repetition(own) + 0.01) / (_repetition(base) + 0.01),
            length=_length(own) / _length(base),
            perplexity=found["probe_perplexity"] / usual["probe_perplexity"],
        )


def _repetition(texts: Sequence[str]) -> float:
    return sum(map(repetition_ratio, texts)) / len(texts)


def _length(texts: Sequence[str]) -> float:
    return sum(len(words(text)) for text in texts) / len(texts)


@contextmanager
def circle(config: TrainerConfig, seed: int) -> Iterator[Circle]:
    """A circle whose files are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tb-experiment-") as folder:
        yield Circle(msgspec.structs.replace(config, seed=seed), Path(folder), seed)
