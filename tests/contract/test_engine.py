"""One suite for every engine: the shipped fake is trusted because it passes what the real one passes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from serving.config import BaseConfig
from serving.echo_engine import EchoEngine
from serving.engine import Engine
from serving.errors import (
    EngineClosed,
    InvalidRequest,
    NoFreeSlot,
    PromptTooLong,
    UnsupportedTools,
    VersionNotReady,
    VersionUnknown,
)
from serving.replica import build_replica
from serving.wire import GenerateRequest, Sampling, ToolUse
from telemetry.events import Tool
from telemetry.manifest import read_version
from tests.tool_model import make_tool_model, offered, tool
from tests.unit.serving.conftest import tiny_model as tiny_model
from tests.unit.serving.kit import KEY, answer, last_of, publish, request, text_of

Publish = Callable[[int], Awaitable[str]]


@pytest.fixture(params=["echo", "transformers"])
async def engine(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> AsyncIterator[Engine]:
    config = BaseConfig(
        model=str(tiny_model), engine=request.param, slots=3, max_context=256, threads=1, echo_token_s=0.002
    )
    built, _ = build_replica("tiny", config, state=tmp_path, replica_id="r1", blocked_patterns=(r"forbidden words",))
    await built.start()
    yield built
    await built.close()


@pytest.fixture
def load(engine: Engine, tiny_model: Path, tmp_path: Path) -> Publish:
    """Publish adapter ``sequence``, load it into the engine; its version."""

    published: dict[int, tuple[str, Path]] = {}

    async def load_one(sequence: int) -> str:
        if sequence not in published:
            published[sequence] = publish(tmp_path, tiny_model, sequence)
        version, folder = published[sequence]
        await engine.load(version, folder, read_version(folder, KEY))
        return version

    return load_one


@pytest.fixture(scope="session")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tools"
    make_tool_model(7, folder)
    return folder


@pytest.fixture(params=["echo", "transformers"])
async def calling_engine(request: pytest.FixtureRequest, tool_model: Path, tmp_path: Path) -> AsyncIterator[Engine]:
    """An engine over a base whose chat template takes tools."""
    config = BaseConfig(model=str(tool_model), engine=request.param, slots=1, max_context=2048, threads=1)
    built, _ = build_replica("tools", config, state=tmp_path, replica_id="r1", blocked_patterns=())
    await built.start()
    yield built
    await built.close()


def asking(engine: Engine, *tools: Tool, n: int = 1, temperature: float = 1.0, **use: Any) -> GenerateRequest:
    """A request that offers ``tools``."""
    fields = {"names": tuple(tool.name for tool in tools)} | use
    sampling = Sampling(max_tokens=400, temperature=temperature, top_p=1.0, seed=5)
    return GenerateRequest("r", engine.base_version, offered(*tools), sampling, n=n, tool_use=ToolUse(**fields))


async def test_a_call_that_must_come_comes_and_is_told_apart_from_text(calling_engine: Engine) -> None:
    assert calling_engine.status().takes_tools
    chunks = await answer(calling_engine, asking(calling_engine, tool(), n=3, is_required=True, is_parallel=False))
    for index in range(3):
        mine = [chunk for chunk in chunks if chunk.index == index]
        (call,) = (call for chunk in mine for call in chunk.tool_calls)
        assert (call.index, call.name) == (0, "get_weather")
        assert isinstance(json.loads(call.arguments), dict)
        assert "".join(chunk.content or "" for chunk in mine) == ""
        assert call.arguments in text_of(chunks, index), "events keep the text as the model wrote it"
        assert last_of(chunks, index).finish_reason == "stop"


async def test_without_tools_to_use_text_is_all_there_is(calling_engine: Engine) -> None:
    plain = request(calling_engine.base_version, '<tool_call>{"name": "f"}</tool_call>', max_tokens=40)
    chunks = await answer(calling_engine, plain)
    assert all(chunk.content is None and not chunk.tool_calls for chunk in chunks)


async def test_text_and_calls_together_are_what_can_be_read(calling_engine: Engine) -> None:
    chunks = await answer(calling_engine, asking(calling_engine, tool(), temperature=0.0))
    assert not any(chunk.tool_calls for chunk in chunks)
    assert "".join(chunk.content or "" for chunk in chunks) == text_of(chunks)


async def test_functions_that_are_not_offered_cannot_be_called(calling_engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="tool_use"):
        await calling_engine.submit(asking(calling_engine, tool(), names=("set_mood",)))


async def test_a_base_that_takes_no_tools_refuses_them(tiny_model: Path, tmp_path: Path) -> None:
    echo = EchoEngine(takes_tools=False)
    config = BaseConfig(model=str(tiny_model), slots=1, max_context=2048, threads=1)
    plain, _ = build_replica("plain", config, state=tmp_path, replica_id="r1", blocked_patterns=())
    await plain.start()
    for engine in (echo, plain):
        assert not engine.status().takes_tools
        with pytest.raises(UnsupportedTools):
            await engine.submit(asking(engine, tool()))
    await plain.close()


async def test_eight_completions_of_one_prompt_are_eight(engine: Engine) -> None:
    chunks = await answer(engine, request(engine.base_version, temperature=1.0, seed=3, n=8))
    texts = {text_of(chunks, index) for index in range(8)}
    assert len(texts) == 8
    assert all(last_of(chunks, index).finish_reason for index in range(8))


async def test_every_chunk_names_the_version_that_was_asked_for(engine: Engine, load: Publish) -> None:
    version = await load(1)
    for wanted in (engine.base_version, version):
        chunks = await answer(engine, request(wanted))
        assert {chunk.version for chunk in chunks} == {wanted}


async def test_versions_answer_differently(engine: Engine, load: Publish) -> None:
    versions = [engine.base_version, await load(1), await load(2)]
    texts = {text_of(await answer(engine, request(version))) for version in versions}
    assert len(texts) == 3


async def test_only_the_last_chunk_of_each_completion_ends_it_and_counts(engine: Engine) -> None:
    chunks = await answer(engine, request(engine.base_version, n=3, max_tokens=5))
    for index in range(3):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [chunk.finish_reason is not None for chunk in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].completion_tokens == sum(len(chunk.tokens) for chunk in mine) <= 5
        assert mine[-1].prompt_tokens > 0


async def test_an_answer_ends_at_max_tokens_with_reason_length(engine: Engine) -> None:
    last = last_of(await answer(engine, request(engine.base_version, max_tokens=2)))
    assert (last.finish_reason, last.completion_tokens) == ("length", 2)


async def test_text_ends_before_a_stop_string_that_is_never_seen(engine: Engine) -> None:
    whole = text_of(await answer(engine, request(engine.base_version, max_tokens=12)))
    stop = whole[4:7]
    chunks = await answer(engine, request(engine.base_version, max_tokens=12, stop=(stop,)))
    assert text_of(chunks) == whole[: whole.index(stop)]
    assert last_of(chunks).finish_reason == "stop"


async def test_the_same_seed_gives_the_same_text(engine: Engine) -> None:
    wanted = request(engine.base_version, temperature=1.0, seed=7, n=2)
    first, second = await answer(engine, wanted), await answer(engine, wanted)
    assert [text_of(first, i) for i in (0, 1)] == [text_of(second, i) for i in (0, 1)]
    assert text_of(first, 0) != text_of(first, 1)


async def test_alternatives_come_likeliest_first(engine: Engine) -> None:
    chunks = await answer(engine, request(engine.base_version, top_logprobs=3))
    for token in (token for chunk in chunks for token in chunk.tokens):
        assert len(token.top) == 3
        assert [top.logprob for top in token.top] == sorted((top.logprob for top in token.top), reverse=True)


@pytest.mark.parametrize(
    "changes",
    [{"n": 0}, {"n": 99}, {"max_tokens": 0}, {"temperature": float("nan")}, {"temperature": -1.0},
     {"top_p": 0.0}, {"top_p": 1.5}, {"stop": ("",)}, {"top_logprobs": 21}, {"deadline_s": 0.0}],
)  # fmt: skip
async def test_parameters_out_of_range_are_refused(engine: Engine, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(changes))):
        await engine.submit(request(engine.base_version, **changes))  # type: ignore[arg-type]
    assert engine.status().in_flight == {}


async def test_a_prompt_that_fills_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(PromptTooLong, match="256"):
        await engine.submit(request(engine.base_version, "word " * 300))


async def test_an_answer_ends_where_the_context_ends(engine: Engine) -> None:
    last = last_of(await answer(engine, request(engine.base_version, "w " * 100, max_tokens=10_000)))
    assert last.prompt_tokens + last.completion_tokens <= 256


async def test_a_version_that_is_not_loaded_is_refused(engine: Engine) -> None:
    with pytest.raises(VersionNotReady, match="v000009-00000000"):
        await engine.submit(request("v000009-00000000"))


async def test_a_closed_stream_cancels_and_lets_the_version_go(engine: Engine, load: Publish) -> None:
    version = await load(1)
    stream = await engine.submit(request(version, "w " * 60, max_tokens=150))
    await anext(stream)
    assert engine.status().in_flight == {version: 1}
    await stream.aclose()
    await _until(lambda: engine.status().in_flight == {} and engine.status().running == 0)


async def test_a_stream_that_was_never_read_lets_the_version_go(engine: Engine, load: Publish) -> None:
    version = await load(1)
    stream = await engine.submit(request(version, max_tokens=150))
    await stream.aclose()
    await _until(lambda: engine.status().in_flight == {})


async def test_a_request_past_its_deadline_is_cancelled(engine: Engine) -> None:
    last = last_of(await answer(engine, request(engine.base_version, "w " * 60, max_tokens=150, deadline_s=0.004)))
    assert (last.finish_reason, last.error) == ("cancelled", "deadline_exceeded")


async def test_loading_twice_changes_nothing(engine: Engine, load: Publish) -> None:
    version = await load(1)
    assert await load(1) == version
    assert engine.status().versions == (engine.base_version, version)
    assert engine.status().free_slots == 2


async def test_a_full_table_refuses_the_next_version_and_takes_it_after_an_unload(
    engine: Engine, load: Publish
) -> None:
    versions = [await load(i) for i in (1, 2, 3)]
    with pytest.raises(NoFreeSlot, match="unload one first"):
        await load(4)
    await engine.unload(versions[0])
    fourth = await load(4)
    assert engine.status().versions == (engine.base_version, *versions[1:], fourth)


async def test_unloading_waits_for_the_answer_under_way_and_takes_no_new_one(engine: Engine, load: Publish) -> None:
    version = await load(1)
    stream = await engine.submit(request(version, "w " * 60, max_tokens=100))
    await anext(stream)
    unloading = asyncio.create_task(engine.unload(version))
    await asyncio.sleep(0)
    assert engine.status().draining == (version,)
    with pytest.raises(VersionNotReady, match="draining"):
        await engine.submit(request(version))
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].finish_reason in ("length", "stop")
    await unloading
    assert engine.status().versions == (engine.base_version,)
    assert engine.status().free_slots == 3


async def test_a_version_reloaded_after_unloading_answers_as_before(engine: Engine, load: Publish) -> None:
    version = await load(1)
    before = text_of(await answer(engine, request(version)))
    await engine.unload(version)
    await load(2)
    assert await load(1) == version
    assert text_of(await answer(engine, request(version))) == before


async def test_the_base_and_unknown_versions_cannot_be_unloaded(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="base"):
        await engine.unload(engine.base_version)
    with pytest.raises(VersionUnknown):
        await engine.unload("v000009-00000000")


async def test_answers_never_mix_versions_while_versions_come_and_go(engine: Engine, load: Publish) -> None:
    stable = await load(1)
    alone = {v: text_of(await answer(engine, request(v, "keep"))) for v in (engine.base_version, stable)}

    async def swap() -> None:
        for sequence in range(2, 8):
            await engine.unload(await load(sequence))

    async def ask(version: str) -> None:
        while not swapping.done():
            chunks = await answer(engine, request(version, "keep"))
            assert {chunk.version for chunk in chunks} == {version}
            assert text_of(chunks) == alone[version]

    swapping = asyncio.create_task(swap())
    await asyncio.gather(swapping, *(ask(version) for version in (*alone, *alone)))


async def test_a_closed_engine_refuses_requests(engine: Engine) -> None:
    await engine.close()
    with pytest.raises(EngineClosed):
        await engine.submit(request(engine.base_version))
    assert not engine.is_healthy()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
