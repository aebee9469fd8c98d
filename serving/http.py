"""A replica's HTTP face: the same ASGI app under Ray Serve's direct ingress and under plain uvicorn.

POST /v1/generate streams newline-delimited chunks; closing the connection cancels. POST /v1/score waits for an idle
moment. Versions come and go by PUT and DELETE, and are verified here before the engine sees them. Errors are
``{"error": {code, message}}``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from serving.engine import ChunkStream, Engine
from serving.errors import EngineFailed, InvalidRequest, ServingError, VersionRefused, VersionUnknown
from serving.wire import GATHER_HEADER, GenerateRequest, ReplicaStatus, ScoreRequest
from telemetry.manifest import VERSION_PATTERN, Manifest, UntrustedVersion, read_version
from telemetry.metrics import ADAPTER_LOADS, ENGINE_BATCH, ENGINE_QUEUE, FREE_SLOTS
from telemetry.process import keep_what_is_loaded

log = logging.getLogger(__name__)
BODY_MAX_BYTES = 4_000_000
NDJSON = "application/x-ndjson"
GATHER_S = 0.5
_requests = msgspec.json.Decoder(GenerateRequest)
_score_requests = msgspec.json.Decoder(ScoreRequest)
_json = msgspec.json.Encoder()


class BodyTooLarge(InvalidRequest):
    """The request's body is larger than a replica reads."""

    status = 413
    code = "body_too_large"


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """Who this replica is and whom it trusts."""

    replica_id: str
    base: str
    base_digest: str  # empty: adapters of any base are taken (echo engine)
    state: Path
    key: bytes


def build_app(engine: Engine, info: ReplicaInfo) -> Starlette:
    """The replica's routes; the engine starts and closes with the app's lifespan."""
    replica = _Replica(engine, info)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await engine.start()
        keep_what_is_loaded()
        yield
        await engine.close()

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/v1/generate", _Generate(engine), methods=["POST"]),
            Route("/v1/score", replica.score, methods=["POST"]),
            Route("/v1/status", replica.status, methods=["GET"]),
            Route("/v1/versions/{variant}/{version}", replica.load, methods=["PUT"]),
            Route("/v1/versions/{version}", replica.unload, methods=["DELETE"]),
            Route("/health", replica.health, methods=["GET"]),
            Route("/metrics", replica.metrics, methods=["GET"]),
        ],
        exception_handlers={ServingError: _answer_error},
    )


class _Generate:
    """POST /v1/generate as a bare ASGI app: chunks leave as they come, a closed connection is seen at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = Request(scope, receive)
            gather_s = GATHER_S if GATHER_HEADER in request.headers else 0.0
            stream = await self._engine.submit(_decoded(await _body(request)))
        except ClientDisconnect:
            return
        except ServingError as error:
            await _error_response(error)(scope, receive, send)
            return
        async with aclosing(stream):
            gone = asyncio.ensure_future(_disconnected(receive))
            sending = asyncio.ensure_future(_send_chunks(stream, send, gather_s))
            try:
                await asyncio.wait((gone, sending), return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                sending.cancel()
                with suppress(asyncio.CancelledError, ConnectionError):
                    await sending


async def _send_chunks(stream: ChunkStream, send: Send, gather_s: float) -> None:
    """Each completion's first chunk at once; later ones when ``gather_s`` has passed since the last write, and the end.

    A write costs two processes more than a token's encoding does.
    """
    headers = [(b"content-type", NDJSON.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    held, begun, sent_s = b"", set[int](), 0.0
    async for chunk in stream:
        held += _json.encode(chunk) + b"\n"
        if chunk.index in begun and time.monotonic() - sent_s < gather_s:
            continue
        begun.add(chunk.index)
        await send({"type": "http.response.body", "body": held, "more_body": True})
        held, sent_s = b"", time.monotonic()
    await send({"type": "http.response.body", "body": held})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_MAX_BYTES:
            raise BodyTooLarge(f"the body is larger than {BODY_MAX_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def _decoded(body: bytes) -> GenerateRequest:
    try:
        return _requests.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"not a generate request: {error}") from error


class _Replica:
    """The routes that are not hot."""

    def __init__(self, engine: Engine, info: ReplicaInfo) -> None:
        self._engine, self._info = engine, info
        self._tasks: set[asyncio.Task[None]] = set()

    async def status(self, _: Request) -> Response:
        return _respond(self._status())

    def _status(self) -> ReplicaStatus:
        now = self._engine.status()
        return ReplicaStatus(
            replica_id=self._info.replica_id,
            base=self._info.base,
            versions=now.versions,
            loading=now.loading,
            draining=now.draining,
            failed=now.failed,
            in_flight=now.in_flight,
            free_slots=now.free_slots,
            queued=now.queued,
            takes_tools=now.takes_tools,
            scores_answers=now.scores_answers,
        )

    async def score(self, request: Request) -> Response:
        """The base's log-probs of given answers."""
        try:
            wanted = _score_requests.decode(await _body(request))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"not a score request: {error}") from error
        return _respond(await self._engine.score(wanted))

    async def load(self, request: Request) -> Response:
        """Verify, load, warm; answers when the version is ready or refused."""
        variant, version = request.path_params["variant"], request.path_params["version"]
        # a client that goes away must not leave half a load behind
        await asyncio.shield(self._keep(self._load(variant, version)))
        return _respond({"version": version, "state": "ready"})

    async def _load(self, variant: str, version: str) -> None:
        if version in self._engine.status().versions:
            return
        try:
            manifest = await asyncio.to_thread(verified_manifest, self._info, variant, version)
            await self._engine.load(version, version_folder(self._info.state, variant, version), manifest)
        except ServingError as error:
            ADAPTER_LOADS.labels(self._info.base, error.code).inc()
            log.warning("version not loaded: %s", error, extra={"action": "version_refused", "version": version})
            raise
        ADAPTER_LOADS.labels(self._info.base, "ready").inc()
        log.info("version ready", extra={"action": "version_ready", "version": version})

    async def unload(self, request: Request) -> Response:
        """Start draining; 202 while requests are in flight, 200 when the slot is free."""
        version = request.path_params["version"]
        task = self._keep(self._engine.unload(version))
        done, _ = await asyncio.wait((task,), timeout=0.05)
        if not done:
            return _respond({"version": version, "state": "draining"}, status=202)
        task.result()
        log.info("version unloaded", extra={"action": "version_unloaded", "version": version})
        return _respond({"version": version, "state": "unloaded"})

    async def health(self, _: Request) -> Response:
        if not self._engine.is_healthy():
            raise EngineFailed()
        return _respond({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        now, base = self._engine.status(), self._info.base
        ENGINE_BATCH.labels(base).set(now.running)
        ENGINE_QUEUE.labels(base).set(now.queued)
        FREE_SLOTS.labels(base, self._info.replica_id).set(now.free_slots)
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def version_folder(state: Path, variant: str, version: str) -> Path:
    """Where the trainer publishes a version; raises VersionUnknown for names that are no version's."""
    if not VERSION_PATTERN.fullmatch(version) or variant in (".", "..") or "/" in variant:
        raise VersionUnknown(f"{variant}/{version} is not a version's name")
    return state / "versions" / variant / version


def verified_manifest(info: ReplicaInfo, variant: str, version: str) -> Manifest:
    """The manifest of a published version that belongs here, after digests and signature were checked."""
    folder = version_folder(info.state, variant, version)
    try:
        manifest = read_version(folder, info.key)
    except FileNotFoundError as error:
        raise VersionUnknown(f"{variant}/{version} is not in the version store: {error}") from error
    except (UntrustedVersion, OSError, msgspec.DecodeError, LookupError, TypeError) as error:
        raise VersionRefused(f"{variant}/{version}: {error}") from error
    if manifest.variant != variant:
        raise VersionRefused(f"{version} belongs to variant {manifest.variant}, not {variant}")
    if info.base_digest and manifest.base_digest != info.base_digest:
        raise VersionRefused(f"{version} was trained on another base ({manifest.base}) than {info.base}")
    return manifest


def _respond(document: object, status: int = 200) -> Response:
    return Response(_json.encode(document), status, media_type="application/json")


def _error_response(error: ServingError) -> Response:
    return _respond({"error": {"code": error.code, "message": str(error)}}, error.status)


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return _error_response(error)
