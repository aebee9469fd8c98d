"""Where a device computes apart, text is made while the next step runs: the same answers, each version let go once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serving.completions import Ticket
from serving.config import BaseConfig
from serving.safety import OutputFilter
from serving.sampling_rules import Sampled
from serving.transformers_engine import TransformersEngine
from telemetry.manifest import base_digest
from tests.unit.serving.kit import Reference, answer, ids_of, last_of, request, text_of

OPTIONS = BaseConfig(dtype="float32", threads=1, max_context=256, slots=2, chunk_tokens=8, idle_chunk_tokens=16)


async def started(model: Path) -> TransformersEngine:
    engine = TransformersEngine(model, base_digest(model), "tiny", OPTIONS, OutputFilter(()))
    await engine.start()
    engine._runner.is_apart = True
    engine._runner.replay_decoding(OPTIONS.max_batch)
    return engine


@pytest.fixture
async def engine(tiny_model: Path) -> AsyncIterator[TransformersEngine]:
    engine = await started(tiny_model)
    yield engine
    assert engine.is_healthy()
    assert engine.status().in_flight == {}
    await engine.close()


async def test_answers_are_the_same(engine: TransformersEngine, tiny_model: Path) -> None:
    reference = Reference(tiny_model)
    prompts = [f"{'x' * (i % 7)} number {i}" for i in range(20)]
    asked = [request(engine.base_version, p, max_tokens=5 + i) for i, p in enumerate(prompts)]
    answers = await asyncio.gather(*(answer(engine, one) for one in asked))
    assert [ids_of(chunks) for chunks in answers] == [reference.greedy(p, 5 + i) for i, p in enumerate(prompts)]


async def test_a_stop_string_ends_an_answer_a_step_later_but_not_longer(engine: TransformersEngine) -> None:
    whole = text_of(await answer(engine, request(engine.base_version, "as ever", max_tokens=16)))
    stop = whole[len(whole) // 2 :][:2]
    clipped = await answer(engine, request(engine.base_version, "as ever", max_tokens=16, stop=(stop,), n=3))
    for index in range(3):
        assert text_of(clipped, index) == whole[: whole.find(stop)]
        assert last_of(clipped, index).completion_tokens == len(ids_of(clipped, index))


async def test_a_step_that_is_no_number_is_noticed_where_the_end_was_told_before_it(engine: TransformersEngine) -> None:
    ticket = Ticket(request(engine.base_version), 0, [1, 2, 3], 10, [None])
    [completion] = ticket.begin(engine._prompts, OutputFilter(()))
    completion.note(Sampled(5, 0.0, ()))
    completion.end("stop")
    assert completion.sequence.is_sound
    completion.note(Sampled(0, 0.0, (), is_finite=False))
    assert not completion.sequence.is_sound


async def test_cancelling_lets_go_once(engine: TransformersEngine) -> None:
    stream = await engine.submit(request(engine.base_version, "long", max_tokens=200, n=2))
    others = [asyncio.create_task(answer(engine, request(engine.base_version, f"o{i}"))) for i in range(3)]
    async for _ in stream:
        break
    await stream.aclose()
    assert all(last_of(chunks).finish_reason == "length" for chunks in await asyncio.gather(*others))
    for _ in range(100):
        if not engine.status().in_flight:
            break
        await asyncio.sleep(0.01)


async def test_where_one_text_cannot_be_made_nobody_is_left_waiting(tiny_model: Path) -> None:
    engine = await started(tiny_model)
    version = engine.base_version
    tokens_of = engine._prompts.decode

    def decode(ids: list[int]) -> str:
        running.append(engine.status().running)
        if running[-2:] == [2, 1] and not failed:  # the shorter answer is over, and untold as the longer one's
            failed.append(True)
            raise ValueError("no text")
        return tokens_of(ids)

    running: list[int] = [0]
    failed: list[bool] = []
    engine._prompts.decode = decode  # type: ignore[method-assign]
    asked = [request(version, "same", max_tokens=6), request(version, "same", max_tokens=7)]
    answers = await asyncio.wait_for(asyncio.gather(*(answer(engine, one) for one in asked)), 30)
    assert failed and not engine.is_healthy()
    assert [last_of(chunks).finish_reason in ("error", "length") for chunks in answers] == [True, True]
    assert engine.status().in_flight == {}
    await engine.close()
