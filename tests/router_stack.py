"""A real router over real replicas with echo engines, real Redis, real sockets, in the test's own event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import msgspec
import redis.asyncio
import uvicorn
from msgspec.structs import replace
from starlette.types import ASGIApp

from router.app import build_app
from router.config import RouterConfig
from router.private import Private
from router.protocol import PatientProtocol
from router.services import open_services
from serving.echo_engine import EchoEngine
from serving.engine import ChunkStream, Engine
from serving.http import ReplicaInfo
from serving.http import build_app as build_replica
from serving.wire import Chunk, GenerateRequest
from telemetry.config import TelemetryConfig, open_log, open_sealer, redis_client_async
from telemetry.event_log import EventLog
from telemetry.events import TOPICS, AnyEvent, decode, utc_now
from telemetry.manifest import Manifest
from telemetry.people import Forgotten
from telemetry.process import signing_key
from telemetry.redaction import Redactor
from telemetry.routing import REPLICAS_KEY, ROUTING_KEY, Replica, ReplicaTable, RoutingTable, VariantRoute
from telemetry.sealing import Sealer

PLAIN = Private(Sealer(None), Redactor(()))  # nothing is sealed or taken out
STABLE = "v000003-0000abcd"
CANARY = "v000004-0000dcba"
POLL_S = 0.05


@dataclass
class Stack:
    """The router's address, and what stands behind it."""

    url: str
    redis: redis.asyncio.Redis
    telemetry: TelemetryConfig
    engine: Engine
    replicas: list[Replica]
    routing: RoutingTable
    http: aiohttp.ClientSession
    stops: list[uvicorn.Server] = field(default_factory=list)

    async def publish(self, *, routing: RoutingTable | None = None, replicas: Sequence[Replica] | None = None) -> None:
        """Write the tables as controller and control loop do, and wait until the router has read them."""
        self.routing = routing or self.routing
        self.replicas = self.replicas if replicas is None else list(replicas)
        await self.redis.set(ROUTING_KEY, msgspec.json.encode(self.routing))
        await self.redis.set(REPLICAS_KEY, msgspec.json.encode(ReplicaTable(time.time(), tuple(self.replicas))))
        await asyncio.sleep(3 * POLL_S)

    async def consent(self, user: str) -> None:
        async with self.http.put(f"/v1/users/{user}/consent", json={"pairing": True}) as response:
            assert response.status == 200

    async def ask(self, prompt: str = "Say something", **body: Any) -> tuple[int, dict[str, Any], Any]:
        """(status, body, headers) of a chat request."""
        request = {"model": "chat", "messages": [{"role": "user", "content": prompt}]} | body
        async with self.http.post("/v1/chat/completions", json=request) as response:
            return response.status, await response.json(), response.headers

    async def pair(self, user: str = "ann", **body: Any) -> dict[str, Any]:
        """The body of a pair shown to an opted-in user."""
        await self.consent(user)
        status, answer, _ = await self.ask(user=user, preference={"pair": "always"}, **body)
        assert status == 200, answer
        return answer

    async def click(self, answer: dict[str, Any], choice: str = "a", **fields: Any) -> tuple[int, dict[str, Any]]:
        """(status, body) of a verdict on the pair in ``answer``."""
        offer = answer["preference"]
        body = {"pair_id": offer["pair_id"], "token": offer["token"], "choice": choice} | fields
        async with self.http.post("/v1/preferences", json=body) as response:
            return response.status, await response.json()

    async def events(self, *kinds: type, expected: int | None = None, timeout_s: float = 5.0) -> list[Any]:
        """Events of ``kinds`` in the log; waits for ``expected`` of them, and a little longer for one too many."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = [event for event in await asyncio.to_thread(self._read_log) if isinstance(event, kinds)]
            if expected is None or len(found) > expected:
                return found
            if len(found) == expected:
                await asyncio.sleep(0.1)
                return [event for event in await asyncio.to_thread(self._read_log) if isinstance(event, kinds)]
            assert time.monotonic() < deadline, f"{len(found)} of {expected} {kinds}"
            await asyncio.sleep(0.02)

    def _read_log(self) -> list[AnyEvent]:
        log = open_log(self.telemetry)
        reader = log.reader(TOPICS, {})
        sealer = open_sealer(self.telemetry)
        events = [opened(sealer, decode(entry.payload)) for entry in reader.poll(max_entries=100_000, timeout_s=0.0)]
        reader.close()
        log.close()
        return events

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry ``labels``."""
        async with self.http.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        samples = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples if all(word in line for word in wanted))


def opened(sealer: Sealer, event: AnyEvent) -> AnyEvent:
    """The event with its texts, unless its person is forgotten."""
    try:
        return sealer.open(event)
    except Forgotten:
        return event


class FaultyEngine(EchoEngine):
    """An echo engine that fails ``version`` after ``good_chunks`` chunks, or misnames the version it answers with."""

    def __init__(self, version: str, good_chunks: int, *, says: str = "", token_s: float = 0.0) -> None:
        super().__init__(token_s=token_s)
        self._faulty = version
        self._good_chunks = good_chunks
        self._says = says
        self.submitted = 0

    async def submit(self, request: GenerateRequest) -> ChunkStream:
        self.submitted += 1
        stream = await super().submit(request)
        return _Faulty(stream, self._good_chunks, self._says) if request.version == self._faulty else stream


class _Faulty:
    def __init__(self, stream: ChunkStream, good_chunks: int, says: str) -> None:
        self._stream, self._says = stream, says
        self._chunks = self._read(good_chunks)

    async def _read(self, good_chunks: int) -> AsyncGenerator[Chunk]:
        async with aclosing(self._stream) as stream:
            count = 0
            async for chunk in stream:
                if not self._says and count == good_chunks:
                    yield Chunk(chunk.index, chunk.version, finish_reason="error", error="engine_failed")
                    return
                yield replace(chunk, version=self._says or chunk.version)
                count += 1

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        await self._chunks.aclose()
        await self._stream.aclose()


@asynccontextmanager
async def serving_on_loopback(app: ASGIApp, http: type[PatientProtocol] = PatientProtocol) -> AsyncIterator[str]:
    """The URL of ``app`` under uvicorn on a free port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on", ws="none", http=http)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        assert not task.done(), "the server did not start"
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


async def load(engine: Engine, *versions: str) -> None:
    """Make an echo engine hold ``versions``; it reads no files."""
    for version in versions:
        manifest = Manifest(
            variant="chat-main", sequence=int(version[1:7]), parent="", base="echo", base_digest="",
            created_at=utc_now(), step=0, rank=1, alpha=1.0, target_modules=(), files={},
        )  # fmt: skip
        await engine.load(version, Path("/nowhere"), manifest)


def routes(engine: Engine, *, canary: str = "", stable: str = STABLE) -> RoutingTable:
    """A policy with two variants over the one base."""
    base = engine.base_version
    main = VariantRoute(
        variant="chat-main", base="echo", base_version=base, stable=stable, previous=base, canary=canary,
        canary_ratio=0.5 if canary else 0.0, temperature=0.8,
    )  # fmt: skip
    calm = VariantRoute(
        variant="chat-calm", base="echo", base_version=base, stable=base, previous=base, temperature=0.3
    )
    return RoutingTable(1, {"chat": (main, calm)})


def replica(
    url: str, *versions: str, name: str = "r0", takes_tools: bool = True, scores_answers: bool = False
) -> Replica:
    return Replica(name, "echo", url, True, versions, 0, 4, takes_tools=takes_tools, scores_answers=scores_answers)


def fast(**fields: Any) -> RouterConfig:
    """Settings for tests: no cross-variant pairs unless asked for, quick polls, short waits."""
    chosen: dict[str, Any] = {
        "table_poll_s": POLL_S,
        "cross_variant_ratio": 0.0,
        "ready_wait_s": 0.5,
        "pair_ratio": 1.0,
    }
    return RouterConfig(**(chosen | fields))


@asynccontextmanager
async def running_stack(
    telemetry: TelemetryConfig,
    *,
    engine: Engine | None = None,
    config: RouterConfig | None = None,
    event_log: EventLog | None = None,
    key: str = "",
    versions: tuple[str, ...] = (STABLE, CANARY),
) -> AsyncIterator[Stack]:
    """A router over one replica that holds the base and ``versions``. Patient with Redis: test machines are busy."""
    telemetry = replace(telemetry, redis_timeout_s=10.0, append_timeout_s=10.0)
    engine = engine or EchoEngine()
    config = config or fast()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with AsyncExitStack() as open_things:
        enter = open_things.enter_async_context
        await load(engine, *versions)
        replica_url = await enter(serving_on_loopback(replica_app(engine, telemetry.state_path)))
        client = redis_client_async(telemetry)
        open_things.push_async_callback(client.aclose)
        opening = None if event_log is None else lambda: open_services(config, telemetry, event_log=event_log)
        url = await enter(serving_on_loopback(build_app(config, telemetry, opening=opening)))
        session = await enter(aiohttp.ClientSession(url, headers=headers))
        held = (engine.base_version, *versions)
        status = engine.status()
        known = replica(replica_url, *held, takes_tools=status.takes_tools, scores_answers=status.scores_answers)
        stack = Stack(url, client, telemetry, engine, [known], routes(engine), session)
        await stack.publish()
        yield stack


def replica_app(engine: Engine, state: Path) -> ASGIApp:
    """A replica's own HTTP application, without Ray."""
    return build_replica(engine, ReplicaInfo("r0", "echo", "", state, signing_key(state)))
