"""A replica's HTTP face on a real socket: streaming, cancellation, versions in and out, refusals."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
import uvicorn

from serving.config import BaseConfig
from serving.http import BODY_MAX_BYTES
from serving.replica import build_replica
from serving.wire import GATHER_HEADER, Chunk, GenerateRequest, ReplicaStatus
from telemetry.manifest import ADAPTER_FILE
from telemetry.process import signing_key
from tests.unit.serving.conftest import tiny_model as tiny_model
from tests.unit.serving.kit import ids_of, publish, request, text_of


class Client:
    """One replica as the router and the control loop see it."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def status(self) -> ReplicaStatus:
        async with self.session.get("/v1/status") as response:
            return msgspec.json.decode(await response.read(), type=ReplicaStatus)

    async def call(self, verb: str, path: str, body: bytes = b"") -> tuple[int, dict[str, object]]:
        async with self.session.request(verb, path, data=body) as response:
            return response.status, msgspec.json.decode(await response.read())

    async def generate(self, wanted: GenerateRequest) -> list[Chunk]:
        async with self.session.post("/v1/generate", data=msgspec.json.encode(wanted)) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "application/x-ndjson"
            return [msgspec.json.decode(line, type=Chunk) async for line in response.content]


@asynccontextmanager
async def replica(engine: str, model: Path, state: Path) -> AsyncIterator[Client]:
    config = BaseConfig(
        model=str(model), engine=engine, slots=2, threads=1, max_context=512, echo_token_s=0.005  # type: ignore[arg-type]
    )  # fmt: skip
    _, app = build_replica("tiny", config, state=state, replica_id="r1", blocked_patterns=())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield Client(session)
    server.should_exit = True
    await serving


@pytest.fixture(params=["echo", "transformers"])
async def client(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> AsyncIterator[Client]:
    async with replica(request.param, tiny_model, tmp_path) as one:
        yield one


async def base_of(client: Client) -> str:
    return (await client.status()).versions[0]


async def test_status_names_the_replica_and_its_base_version_first(client: Client) -> None:
    status = await client.status()
    assert (status.replica_id, status.base, status.free_slots, status.in_flight) == ("r1", "tiny", 2, {})
    assert status.versions[0].startswith("v000000-")


async def test_an_answer_streams_as_lines_of_chunks(client: Client) -> None:
    base = await base_of(client)
    chunks = await client.generate(request(base, "one two three four"))
    assert len(chunks) > 2
    assert {chunk.version for chunk in chunks} == {base}
    assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_what_nobody_reads_along_leaves_in_few_pieces_and_says_the_same(client: Client) -> None:
    wanted = msgspec.structs.replace(request(await base_of(client), "one two three four", max_tokens=24), n=2)
    await client.generate(wanted)  # from now on its prompt is known
    pieces: dict[bool, list[bytes]] = {}
    for is_gathered in (False, True):
        headers = {GATHER_HEADER: "1"} if is_gathered else {}
        body = msgspec.json.encode(wanted)
        async with client.session.post("/v1/generate", data=body, headers=headers) as response:
            pieces[is_gathered] = [piece async for piece, _ in response.content.iter_chunks() if piece]
    assert len(pieces[True]) <= 3 < len(pieces[False]), "the first of each side, and the rest"
    said = [[msgspec.json.decode(line, type=Chunk) for line in b"".join(p).split(b"\n")[:-1]] for p in pieces.values()]
    for side in (0, 1):
        own, gathered = ([chunk for chunk in chunks if chunk.index == side] for chunks in said)
        assert gathered == own


async def test_a_published_version_is_loaded_answers_and_is_unloaded(
    client: Client, tiny_model: Path, tmp_path: Path
) -> None:
    version, _ = publish(tmp_path, tiny_model, 1, key=signing_key(tmp_path))
    path = f"/v1/versions/chat-main/{version}"
    for _ in range(2):
        assert await client.call("PUT", path) == (200, {"version": version, "state": "ready"})
    assert version in (await client.status()).versions
    texts = [text_of(await client.generate(request(v))) for v in (version, await base_of(client))]
    assert texts[0] != texts[1]
    assert await client.call("DELETE", f"/v1/versions/{version}") == (
        200,
        {"version": version, "state": "unloaded"},
    )
    code, body = await client.call("POST", "/v1/generate", msgspec.json.encode(request(version)))
    assert (code, body["error"]["code"]) == (409, "version_not_ready")  # type: ignore[index]


async def test_unloading_a_busy_version_is_accepted_and_ends_after_its_answers(
    client: Client, tiny_model: Path, tmp_path: Path
) -> None:
    version, _ = publish(tmp_path, tiny_model, 1, key=signing_key(tmp_path))
    await client.call("PUT", f"/v1/versions/chat-main/{version}")
    answering = asyncio.create_task(client.generate(request(version, "w " * 90, max_tokens=300)))
    await _until(lambda status: status.in_flight == {version: 1}, client)
    code, body = await client.call("DELETE", f"/v1/versions/{version}")
    assert (code, body["state"]) == (202, "draining")
    assert (await answering)[-1].finish_reason in ("stop", "length")
    await _until(lambda status: version not in status.versions + status.draining, client)


async def test_closing_the_connection_cancels_the_generation(client: Client) -> None:
    base = await base_of(client)
    body = msgspec.json.encode(request(base, "w " * 90, max_tokens=300))
    response = await client.session.post("/v1/generate", data=body)
    await response.content.readline()
    response.close()
    await _until(lambda status: status.in_flight == {} and status.queued == 0, client)


async def test_a_tampered_adapter_is_refused(client: Client, tiny_model: Path, tmp_path: Path) -> None:
    version, folder = publish(tmp_path, tiny_model, 1, key=signing_key(tmp_path))
    with (folder / ADAPTER_FILE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    code, body = await client.call("PUT", f"/v1/versions/chat-main/{version}")
    assert (code, body["error"]["code"]) == (422, "version_refused")  # type: ignore[index]
    assert (await client.status()).free_slots == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"key": b"x" * 32}, "signature"), ({"base_digest": "0" * 64}, "another base"), ({"variant": "spy"}, "spy")],
)
async def test_a_version_that_is_not_ours_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    arguments = {"key": signing_key(tmp_path)} | changes
    version, folder = publish(tmp_path, tiny_model, 1, **arguments)  # type: ignore[arg-type]
    target = tmp_path / "versions" / "chat-main" / version
    if not target.exists():
        target.parent.mkdir(parents=True)
        folder.rename(target)
    async with replica("transformers", tiny_model, tmp_path) as client:
        code, body = await client.call("PUT", f"/v1/versions/chat-main/{version}")
    assert (code, body["error"]["code"]) == (422, "version_refused")  # type: ignore[index]
    assert said in body["error"]["message"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("verb", "path", "body", "code", "name"),
    [
        ("POST", "/v1/generate", b"{", 400, "invalid_request"),
        ("POST", "/v1/generate", b"\xff\xfe", 400, "invalid_request"),
        ("POST", "/v1/generate", b'{"request_id": "x"}', 400, "invalid_request"),
        ("POST", "/v1/generate", b"[" * (BODY_MAX_BYTES + 1), 413, "body_too_large"),
        ("PUT", "/v1/versions/chat-main/v000001-00000000", b"", 404, "version_unknown"),
        ("PUT", "/v1/versions/chat-main/..%2f..%2fetc", b"", 404, None),
        ("PUT", "/v1/versions/../v000001-00000000", b"", 404, None),
        ("DELETE", "/v1/versions/v000001-00000000", b"", 404, "version_unknown"),
    ],
)
async def test_bad_input_is_refused_and_the_next_request_is_served(
    client: Client, verb: str, path: str, body: bytes, code: int, name: str | None
) -> None:
    async with client.session.request(verb, path, data=io.BytesIO(body)) as response:
        assert response.status == code
        if name:
            assert msgspec.json.decode(await response.read())["error"]["code"] == name
    assert ids_of(await client.generate(request(await base_of(client))))


async def test_metrics_and_health_answer(client: Client) -> None:
    await client.generate(request(await base_of(client)))
    assert (await client.call("GET", "/health"))[0] == 200
    async with client.session.get("/metrics") as response:
        assert "tiebreak_adapter_free_slots" in await response.text()


async def _until(condition: Callable[[ReplicaStatus], bool], client: Client) -> None:
    async with asyncio.timeout(20):
        while not condition(await client.status()):
            await asyncio.sleep(0.02)
