"""The remote engine when its server misbehaves: refusals, resets, silence, restarts, forgotten and left adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from serving.config import BaseConfig
from serving.errors import (
    EngineFailed,
    InvalidRequest,
    Overloaded,
    ServerAway,
    ServingError,
    UnsupportedModel,
    UnsupportedTools,
    VersionNotReady,
    VersionRefused,
)
from serving.remote_engine import RemoteEngine
from serving.safety import OutputFilter
from telemetry.events import Message, Tool
from telemetry.manifest import base_digest, read_version
from tests.integration.fake_model_server import FakeModelServer
from tests.unit.serving.conftest import tiny_model as tiny_model
from tests.unit.serving.kit import KEY, answer, last_of, publish, request, text_of

SCHEMA = '{"type": "object"}'


@pytest.fixture
async def server() -> AsyncIterator[FakeModelServer]:
    fake = FakeModelServer()
    await fake.start()
    yield fake
    await fake.stop()


def build(server: FakeModelServer, model: Path, state: Path, **changes: Any) -> RemoteEngine:
    fields: dict[str, Any] = {
        "engine": "openai", "url": server.url, "model": str(model), "slots": 2, "max_batch": 2, "max_queue": 1,
        "look_interval_s": 0.05, "connect_timeout_s": 1.0, "base_as_adapter": False, "token_timeout_s": 0.3,
    }  # fmt: skip
    left_over_s = changes.pop("left_over_s", 30.0)
    config = BaseConfig(**(fields | changes))
    return RemoteEngine(
        base_digest(model), "tiny", config, OutputFilter(()), state=state, left_over_s=left_over_s
    )  # fmt: skip


@pytest.fixture
async def engine(server: FakeModelServer, tiny_model: Path, tmp_path: Path) -> AsyncIterator[RemoteEngine]:
    built = build(server, tiny_model, tmp_path)
    await built.start()
    yield built
    await built.close()


@pytest.fixture
async def version(engine: RemoteEngine, tiny_model: Path, tmp_path: Path) -> str:
    """One version, loaded."""
    name, folder = publish(tmp_path, tiny_model, 1)
    await engine.load(name, folder, read_version(folder, KEY))
    return name


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_answer_is_its_tokens_in_our_tokenizers_text(engine: RemoteEngine, server: FakeModelServer) -> None:
    chunks = await answer(engine, request(engine.base_version))
    last = last_of(chunks)
    assert [token.token_id for chunk in chunks for token in chunk.tokens] == server.says
    assert (last.finish_reason, last.completion_tokens, last.cached_tokens) == ("stop", 2, 2)
    assert engine.status().in_flight == {}


async def test_nothing_is_left_to_the_servers_defaults(engine: RemoteEngine, server: FakeModelServer) -> None:
    await answer(engine, request(engine.base_version, n=2, seed=3, temperature=0.7))
    first, second = sorted(server.asked[-2:], key=lambda asked: asked["seed"])
    assert (first["top_k"], first["repetition_penalty"], first["min_p"]) == (-1, 1.0, 0.0)
    assert second["seed"] == first["seed"] + 1
    assert first["prompt"] == second["prompt"] and all(isinstance(token, int) for token in first["prompt"])


@pytest.mark.parametrize(
    ("mood", "kind"),
    [("429", Overloaded), ("503", Overloaded), ("500", EngineFailed), ("400", InvalidRequest), ("403", ServerAway)],
)
async def test_a_refusal_is_told_before_any_chunk(
    engine: RemoteEngine, server: FakeModelServer, mood: str, kind: type[ServingError]
) -> None:
    server.mood = mood
    with pytest.raises(kind):
        await engine.submit(request(engine.base_version, n=2))
    assert engine.status().in_flight == {}
    server.mood = ""
    assert last_of(await answer(engine, request(engine.base_version))).finish_reason == "stop"


async def test_a_bad_schema_is_refused_before_any_chunk_though_the_server_streams_its_refusal(
    engine: RemoteEngine, server: FakeModelServer
) -> None:
    server.mood = "error_event"
    with pytest.raises(InvalidRequest, match="bad"):
        await engine.submit(request(engine.base_version, json_schema=SCHEMA))


async def test_a_schema_that_is_no_json_is_refused(engine: RemoteEngine) -> None:
    with pytest.raises(InvalidRequest, match="response_format"):
        await engine.submit(request(engine.base_version, json_schema="{"))
    assert engine.status().in_flight == {}


@pytest.mark.parametrize(
    ("mood", "code"),
    [("reset", "server_away"), ("silent", "server_away"), ("no_done", ""), ("other_model", "engine_failed")],
)
async def test_an_answer_that_breaks_ends_as_an_error_and_lets_its_version_go(
    engine: RemoteEngine, server: FakeModelServer, mood: str, code: str
) -> None:
    """Where only the end mark is missing the answer is whole."""
    server.mood = mood
    last = last_of(await answer(engine, request(engine.base_version)))
    assert (last.finish_reason, last.error) == (("error", code) if code else ("stop", ""))
    assert engine.status().in_flight == {}


async def test_too_many_requests_are_refused_here(engine: RemoteEngine, server: FakeModelServer) -> None:
    server.mood = "silent"
    streams = [await engine.submit(request(engine.base_version)) for _ in range(3)]
    with pytest.raises(Overloaded):
        await engine.submit(request(engine.base_version))
    for stream in streams:
        await stream.aclose()
    assert (engine.status().running, engine.status().in_flight) == (0, {})


async def test_a_server_without_token_ids_is_refused_at_the_start(
    server: FakeModelServer, tiny_model: Path, tmp_path: Path
) -> None:
    server.mood = "no_ids"
    engine = build(server, tiny_model, tmp_path)
    with pytest.raises(UnsupportedModel, match="returns no token ids"):
        await engine.start()
    await engine.close()


async def test_a_server_that_is_not_there_is_named_at_the_start(
    server: FakeModelServer, tiny_model: Path, tmp_path: Path
) -> None:
    await server.stop()
    engine = build(server, tiny_model, tmp_path)
    with pytest.raises(ServerAway, match=server.url):
        await engine.start()
    await engine.close()


async def test_the_key_in_the_file_is_sent(server: FakeModelServer, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    engine = build(server, tiny_model, tmp_path, api_key_file=str(tmp_path / "key"))
    await engine.start()
    await engine.close()
    assert server.keys == {"Bearer secret"}


async def test_a_server_that_takes_no_adapters_serves_its_base_and_says_how_it_would(
    tiny_model: Path, tmp_path: Path
) -> None:
    server = FakeModelServer()
    server.mood = "no_adapters"
    await server.start()
    engine = build(server, tiny_model, tmp_path)
    await engine.start()
    assert last_of(await answer(engine, request(engine.base_version))).finish_reason == "stop"
    name, folder = publish(tmp_path, tiny_model, 1)
    with pytest.raises(VersionRefused, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        await engine.load(name, folder, read_version(folder, KEY))
    await engine.close()
    await server.stop()


async def test_an_adapter_that_the_server_refuses_is_remembered_and_its_files_go(
    engine: RemoteEngine, server: FakeModelServer, tiny_model: Path, tmp_path: Path
) -> None:
    server.mood = "refuses_adapters"
    name, folder = publish(tmp_path, tiny_model, 1)
    with pytest.raises(VersionRefused, match="too large"):
        await engine.load(name, folder, read_version(folder, KEY))
    status = engine.status()
    assert (status.free_slots, list(status.failed)) == (2, [name])
    assert not (tmp_path / "remote" / "tiny" / name).exists()


async def test_a_rank_above_the_configured_one_never_reaches_the_server(
    engine: RemoteEngine, server: FakeModelServer, tiny_model: Path, tmp_path: Path
) -> None:
    name, folder = publish(tmp_path, tiny_model, 1, rank=32)
    with pytest.raises(VersionRefused, match="rank_max"):
        await engine.load(name, folder, read_version(folder, KEY))
    assert f"load {name}" not in server.calls


async def test_the_server_reads_adapters_where_it_sees_the_state_folder(
    server: FakeModelServer, tiny_model: Path, tmp_path: Path
) -> None:
    engine = build(server, tiny_model, tmp_path, server_state="/mnt/state")
    await engine.start()
    name, folder = publish(tmp_path, tiny_model, 1)
    await engine.load(name, folder, read_version(folder, KEY))
    assert server.adapters == {name: f"/mnt/state/remote/tiny/{name}"}
    await engine.close()


async def test_the_base_is_asked_for_as_an_adapter_that_changes_nothing(
    server: FakeModelServer, tiny_model: Path, tmp_path: Path
) -> None:
    """vLLM 0.32 on a CPU computes a plain base request with the weights of its last adapter slot."""
    engine = build(server, tiny_model, tmp_path, left_over_s=0.1, base_as_adapter=True)
    await engine.start()
    base = engine.base_version
    await answer(engine, request(base))
    assert server.asked[-1]["model"] == base
    server.adapters.clear()
    await until(lambda: base in server.adapters)
    await until(lambda: engine.status().versions == (base,))
    await asyncio.sleep(0.3)
    assert base in server.adapters and engine.status().free_slots == 2
    await engine.close()


async def test_an_adapter_that_vanished_is_loaded_again(
    engine: RemoteEngine, server: FakeModelServer, version: str
) -> None:
    server.adapters.clear()
    await until(lambda: version in server.adapters)
    await until(lambda: engine.status().versions == (engine.base_version, version))


async def test_a_request_that_finds_its_version_gone_says_so_and_has_it_loaded(
    server: FakeModelServer, tiny_model: Path, tmp_path: Path
) -> None:
    engine = build(server, tiny_model, tmp_path, look_interval_s=60.0)
    await engine.start()
    name, folder = publish(tmp_path, tiny_model, 1)
    await engine.load(name, folder, read_version(folder, KEY))
    server.adapters.clear()
    with pytest.raises(VersionNotReady):
        await engine.submit(request(name))
    await until(lambda: engine.status().versions == (engine.base_version, name))
    assert last_of(await answer(engine, request(name))).finish_reason == "stop"
    await engine.close()


async def test_a_server_that_restarts_is_away_for_a_while_and_then_holds_everything(
    engine: RemoteEngine, server: FakeModelServer, version: str
) -> None:
    await server.stop()
    await until(lambda: engine.status().versions == ())
    assert engine.status().loading == (version,)
    assert engine.is_healthy()
    with pytest.raises(ServerAway):
        await engine.submit(request(version))
    await server.start()
    await until(lambda: engine.status().versions == (engine.base_version, version))
    assert text_of(await answer(engine, request(version)))


async def test_a_restarted_replica_takes_what_the_server_still_holds_and_clears_the_rest_away(
    engine: RemoteEngine, server: FakeModelServer, version: str, tiny_model: Path, tmp_path: Path
) -> None:
    other, other_folder = publish(tmp_path, tiny_model, 2)
    await engine.load(other, other_folder, read_version(other_folder, KEY))
    await engine.close()
    server.adapters["somebody-elses"] = "/elsewhere"
    calls = len(server.calls)
    again = build(server, tiny_model, tmp_path, left_over_s=0.3)
    await again.start()
    folder = tmp_path / "versions" / "chat-main" / version
    await again.load(version, folder, read_version(folder, KEY))
    assert server.calls[calls:] == []
    await until(lambda: set(server.adapters) == {version, "somebody-elses"})
    await until(lambda: not (tmp_path / "remote" / "tiny" / other).exists())
    await again.close()


async def test_the_same_name_from_another_folder_is_replaced(
    engine: RemoteEngine, server: FakeModelServer, tiny_model: Path, tmp_path: Path
) -> None:
    name, folder = publish(tmp_path, tiny_model, 1)
    server.adapters[name] = "/of/another/deployment"
    await engine.load(name, folder, read_version(folder, KEY))
    assert server.adapters == {name: str(tmp_path / "remote" / "tiny" / name)}


async def test_unloading_while_the_server_is_away_frees_the_slot_and_in_the_end_the_files(
    engine: RemoteEngine, server: FakeModelServer, version: str, tmp_path: Path
) -> None:
    folder = tmp_path / "remote" / "tiny" / version
    await server.stop()
    await engine.unload(version)
    assert (engine.status().free_slots, engine.status().draining) == (2, ())
    assert folder.exists()
    server.adapters.clear()  # it restarts
    await server.start()
    await until(lambda: not folder.exists())


async def test_tools_are_refused_as_what_this_engine_does_not_do(engine: RemoteEngine) -> None:
    offered = (Message("user", "Which way?", tools=(Tool("turn", "", "{}"),)),)
    with pytest.raises(UnsupportedTools):
        await engine.submit(msgspec.structs.replace(request(engine.base_version), messages=offered))
    assert not engine.status().takes_tools
