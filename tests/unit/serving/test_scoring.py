"""Scores are transformers' own log-probs, however they are cut, and are read only when nothing else is to be done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serving.config import BaseConfig
from serving.engine import Engine
from serving.errors import EngineClosed, InvalidRequest, Overloaded, PromptTooLong
from serving.replica import build_replica
from serving.wire import AnswerTokens, ScoreRequest
from telemetry.events import Message
from telemetry.manifest import read_version
from tests.unit.serving.kit import KEY, Reference, answer, publish, request

PROMPT = "What do gardeners do in spring?"
ANSWERS = (AnswerTokens(tuple(range(100, 121)), is_ended=True), AnswerTokens((7, 200, 5), is_ended=False))
ASKED = ScoreRequest((Message("user", PROMPT),), ANSWERS)


@pytest.fixture(params=[1, 5, 64])
async def engine(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> AsyncIterator[Engine]:
    """Reads chunks of so many tokens."""
    config = BaseConfig(
        model=str(tiny_model), slots=2, max_context=256, threads=1, dtype="float32", chunk_tokens=request.param
    )
    built, _ = build_replica("tiny", config, state=tmp_path, replica_id="r1", blocked_patterns=())
    await built.start()
    yield built
    await built.close()


async def test_scores_are_transformers_own_also_beside_other_versions(
    engine: Engine, tiny_model: Path, tmp_path: Path
) -> None:
    version, folder = publish(tmp_path, tiny_model, 1)
    await engine.load(version, folder, read_version(folder, KEY))
    reference = Reference(tiny_model)
    prompt = reference.prompt_ids(PROMPT)
    scores, _ = await asyncio.gather(engine.score(ASKED), answer(engine, request(version)))
    assert scores.version == engine.base_version
    for given, found in zip(ANSWERS, scores.logps, strict=True):
        ids = [*given.token_ids, *([reference.tokenizer.eos_token_id] if given.is_ended else [])]
        logps = reference.logprobs(prompt + ids)[len(prompt) - 1 : -1]
        assert found == pytest.approx([float(logps[i, token]) for i, token in enumerate(ids)], abs=1e-3)


async def test_nothing_is_scored_while_somebody_waits_for_an_answer(engine: Engine) -> None:
    asked = ScoreRequest(ASKED.messages, ANSWERS, deadline_s=0.02)
    running = asyncio.create_task(answer(engine, request(engine.base_version, max_tokens=200)))
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="idle"):
        await engine.score(asked)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await engine.score(ASKED)).logps


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ((), InvalidRequest),
        ((AnswerTokens((), is_ended=False),), InvalidRequest),
        ((AnswerTokens((1_000_000,), is_ended=False),), InvalidRequest),
        ((AnswerTokens((-1,), is_ended=False),), InvalidRequest),
        ((AnswerTokens((1,) * 300, is_ended=False),), PromptTooLong),
    ],
)
async def test_what_cannot_be_scored_is_refused(
    engine: Engine, answers: tuple[AnswerTokens, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await engine.score(ScoreRequest(ASKED.messages, answers))


async def test_who_waits_when_the_engine_closes_hears_it(engine: Engine) -> None:
    running = asyncio.create_task(answer(engine, request(engine.base_version, max_tokens=200)))
    await asyncio.sleep(0.01)
    scoring = [asyncio.create_task(engine.score(ASKED)) for _ in range(3)]
    await asyncio.sleep(0)
    await engine.close()
    await asyncio.gather(running, return_exceptions=True)
    results = await asyncio.gather(*scoring, return_exceptions=True)
    assert {type(result) for result in results} == {EngineClosed}
    with pytest.raises(EngineClosed):
        await engine.score(ASKED)
