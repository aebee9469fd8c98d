"""The base's log-probs on their way: from an idle engine through a verdict's event to the trainer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from online_trainer.examples import Examples
from online_trainer.ingest import Verdict
from online_trainer.policy import Encoded
from serving.config import BaseConfig
from serving.echo_engine import LOGPROB, EchoEngine
from serving.engine import Engine
from serving.replica import build_replica
from serving.wire import AnswerTokens, ScoreRequest, Scores
from telemetry.config import TelemetryConfig
from telemetry.events import Completion, Message, PreferenceRecorded
from tests.router_stack import Stack, running_stack
from tests.unit.online_trainer import kit
from tests.unit.serving.conftest import tiny_model as tiny_model

PROMPT = (Message("user", "What do gardeners do in spring?"),)


class SlowScores(EchoEngine):
    """Scores when it is told to."""

    def __init__(self) -> None:
        super().__init__(scores_answers=True)
        self.may_score = asyncio.Event()

    async def score(self, request: ScoreRequest) -> Scores:
        await self.may_score.wait()
        return await super().score(request)


@pytest.fixture
async def engine() -> SlowScores:
    return SlowScores()


@pytest.fixture
async def stack(telemetry_config: TelemetryConfig, engine: SlowScores) -> AsyncIterator[Stack]:
    async with running_stack(telemetry_config, engine=engine) as running:
        yield running
        engine.may_score.set()  # a replica ends when its requests have


async def verdict_of(stack: Stack, answer: dict[str, Any]) -> PreferenceRecorded:
    await stack.click(answer, "b")
    (event,) = await stack.events(PreferenceRecorded, expected=1)
    assert isinstance(event, PreferenceRecorded)
    return event


async def test_a_verdict_carries_what_an_idle_replica_said(stack: Stack, engine: SlowScores) -> None:
    engine.may_score.set()
    answer = await stack.pair()
    while not await stack.metric("tiebreak_pair_references_total", result="kept"):
        await asyncio.sleep(0.01)
    event = await verdict_of(stack, answer)
    for side in (event.chosen, event.rejected):
        assert side.reference == engine.base_version
        assert side.reference_logps == (LOGPROB,) * (len(side.token_ids) + 1), "the tokens, and the end"


async def test_a_click_does_not_wait_for_it(stack: Stack) -> None:
    event = await verdict_of(stack, await stack.pair())
    assert event.chosen.reference == ""
    assert event.chosen.reference_logps == ()


@dataclass
class Counted:
    """A trainer's examples, and how often the reference was computed for them."""

    examples: Examples
    computed: int = 0


@pytest.fixture
def counted(tiny_model: Path, real: Engine, monkeypatch: pytest.MonkeyPatch) -> Counted:
    policy = kit.tiny_policy(tiny_model)
    found = Counted(Examples(policy, kit.CONFIG, real.base_version))
    entered = policy.as_reference

    def counting() -> Any:
        found.computed += 1
        return entered()

    monkeypatch.setattr(policy, "as_reference", counting)
    return found


@pytest.fixture
async def real(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Engine]:
    config = BaseConfig(model=str(tiny_model), slots=1, max_context=256, threads=1, dtype="float32")
    built, _ = build_replica("tiny", config, state=tmp_path, replica_id="r1", blocked_patterns=())
    await built.start()
    yield built
    await built.close()


async def scored(engine: Engine, tiny_model: Path) -> Verdict:
    """A verdict whose sides were served, and scored when nothing else was to be done."""
    tokenizer = kit.tiny_policy(tiny_model).tokenizer
    sides = [kit.completion(text) for text in ("They dig, and sow.", "Nothing at all")]
    sides[1] = replace(sides[1], finish_reason="length")
    sides = [replace(s, token_ids=tuple(tokenizer.encode(s.text, add_special_tokens=False))) for s in sides]
    answers = tuple(AnswerTokens(side.token_ids, side.finish_reason == "stop") for side in sides)
    scores = await engine.score(ScoreRequest(PROMPT, answers))
    chosen, rejected = (
        replace(side, reference=scores.version, reference_logps=logps)
        for side, logps in zip(sides, scores.logps, strict=True)
    )
    return Verdict("p", "pair", "u", kit.START, PROMPT, chosen, rejected)


def without(verdict: Verdict, name: str) -> Verdict:
    """The same verdict under another name, as if no replica had been idle."""
    bare = [replace(side, reference="", reference_logps=()) for side in (verdict.chosen, verdict.rejected)]
    return replace(verdict, preference_id=name, chosen=bare[0], rejected=bare[1])


def sums(encoded: Encoded) -> tuple[float, float]:
    return encoded.reference_chosen, encoded.reference_rejected


async def test_the_trainer_takes_it_and_would_have_found_the_same(
    counted: Counted, real: Engine, tiny_model: Path
) -> None:
    verdict = await scored(real, tiny_model)
    (given,) = counted.examples.of([verdict])
    assert counted.computed == 0
    (own,) = counted.examples.of([without(verdict, "bare")])
    assert counted.computed == 1
    assert sums(given.encoded) == pytest.approx(sums(own.encoded), abs=1e-3)
    assert sums(given.encoded) != sums(own.encoded), "chunks and rows round differently: the given one was taken"


def _other_base(side: Completion) -> Completion:
    return replace(side, reference="v000000-ffffffff")


def _other_tokens(side: Completion) -> Completion:
    return replace(side, token_ids=(*side.token_ids[:-1], side.token_ids[-1] + 1))


def _one_missing(side: Completion) -> Completion:
    return replace(side, reference_logps=side.reference_logps[:-1])


@pytest.mark.parametrize("changed", [_other_base, _other_tokens, _one_missing])
async def test_what_is_of_another_base_or_of_other_tokens_is_not_taken(
    changed: Any, counted: Counted, real: Engine, tiny_model: Path
) -> None:
    verdict = await scored(real, tiny_model)
    odd = replace(verdict, rejected=changed(verdict.rejected))
    (found, plain) = counted.examples.of([odd, without(verdict, "bare")])
    assert counted.computed == 1, "both go through the upper layers together"
    assert sums(found.encoded) == pytest.approx(sums(plain.encoded), abs=1e-4)
