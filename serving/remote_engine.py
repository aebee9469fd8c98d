"""An engine that forwards to a model server (vLLM, SGLang): token ids out, tokens back, adapters loaded there.

Tokenizer, chat template, stop strings and output filter are ours, so an answer reads as the local engine's would;
the server computes. Each completion is one stream of the server under one immutable name, so it comes from one
version. A look every second finds a server that went, came back without our adapters, or keeps old ones.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path

import msgspec
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from serving.completions import Ticket
from serving.config import BaseConfig
from serving.engine import ChunkStream, EngineStatus, check_request, warm_request
from serving.errors import (
    EngineClosed,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    ServerAway,
    ServingError,
    UnsupportedModel,
    UnsupportedTools,
    VersionNotReady,
    VersionRefused,
)
from serving.model_server import Event, ModelServer, base_model, failed, how_to_start
from serving.peft_folder import base_shapes, write_nothing, write_peft
from serving.prompts import PromptEncoder
from serving.remote_stream import RemoteStream
from serving.safety import OutputFilter
from serving.slots import SlotTable
from serving.wire import GenerateRequest, ScoreRequest, Scores
from telemetry.conversation import needs_tools
from telemetry.manifest import VERSION_PATTERN, Manifest, base_version
from telemetry.metrics import TOKENS

log = logging.getLogger(__name__)
SEED_MAX = 2**63 - 1
LEFT_OVER_S = 30.0  # ours there, held by nobody here: unloaded after this, so that a restarted replica finds its own
MISSES = 2  # looks in a row without an answer before the server counts as away


class RemoteEngine:
    """Serves what the server at ``config.url`` computes; see ``serving.engine.Engine`` for the contract."""

    def __init__(
        self,
        digest: str,
        base: str,
        config: BaseConfig,
        output_filter: OutputFilter,
        *,
        state: Path,
        left_over_s: float = LEFT_OVER_S,
    ) -> None:
        self.base_version = base_version(digest)
        self._base, self._config, self._filter = base, config, output_filter
        self._model, self._left_over_s = Path(config.model), left_over_s
        folder = Path("remote") / base  # of converted adapters, in the state folder
        self._here, self._there = state / folder, Path(config.server_state or state) / folder  # as the server sees it
        self._server = ModelServer(config)
        self._slots = SlotTable(config.slots, self.base_version)
        self._streams: set[RemoteStream] = set()
        self._lost: dict[str, str] = {}  # ready here, gone there → why it is not back yet
        self._leftovers: dict[str, float] = {}  # ours there, not held here → since when
        self._changing = asyncio.Lock()  # one load or unload there at a time
        self._looking: asyncio.Task[None] | None = None
        self._kicked = asyncio.Event()
        self._misses = 0
        self._has_base_adapter = False
        self._is_closed = False

    async def start(self) -> None:
        await asyncio.to_thread(self._read_model)
        self._server.open()
        try:
            await self._meet()
        except BaseException:  # re-raised: no connection stays open
            await self._server.close()
            raise
        self._looking = asyncio.create_task(self._look_for_ever())

    def _read_model(self) -> None:
        """The tokenizer's side of the model; its weights are the server's."""
        tokenizer = AutoTokenizer.from_pretrained(self._model)
        model = AutoConfig.from_pretrained(self._model)
        try:
            generation = GenerationConfig.from_pretrained(self._model)
        except OSError:
            generation = GenerationConfig.from_model_config(model)
        self._prompts = PromptEncoder(tokenizer, generation)
        self._vocabulary = int(model.get_text_config().vocab_size)
        self._shapes = base_shapes(self._model)

    async def _meet(self) -> None:
        """Find the base among the server's models and let it say one token; raises ServerAway, UnsupportedModel."""
        base = base_model(await self._server.models(), self._config)
        self._name = base.id
        self._context = min(self._config.max_context, base.max_model_len or self._config.max_context)
        if await self._server.takes_adapters():
            if self._config.base_as_adapter:
                await self._name_base()
        else:
            log.warning(
                "%s takes no adapters, only the base can be served. %s", self._server.url, how_to_start(self._config),
                extra={"action": "no_adapters", "base": self._base},
            )  # fmt: skip
        await self._warm(self.base_version)

    async def _name_base(self) -> None:
        """Load the base as an adapter: some servers answer for one without with the weights of another one's."""
        folder = self._here / self.base_version
        await asyncio.to_thread(write_nothing, folder, model=self._model, shapes=self._shapes)
        await self._load_there(self.base_version)
        self._has_base_adapter = True

    async def submit(self, request: GenerateRequest) -> ChunkStream:
        stream = self._accept(request)
        try:
            await stream.accepted()
        except BaseException:  # re-raised: the server is told to stop
            await stream.aclose()
            raise
        return stream

    def _accept(self, request: GenerateRequest, *, is_warming: bool = False) -> RemoteStream:
        check_request(request)
        if needs_tools(request.messages):  # calls that must come, or must fit, would need our grammar there
            raise UnsupportedTools()
        config, version = self._config, request.version
        if any(not 0 <= token_id < self._vocabulary for token_id in request.sampling.logit_bias):
            raise InvalidRequest(f"logit_bias: token ids are 0 to {self._vocabulary - 1}")
        if request.sampling.top_logprobs and config.server == "sglang":
            raise InvalidRequest("top_logprobs: SGLang does not name alternatives by their ids")
        if request.sampling.json_schema:
            check_json(request.sampling.json_schema)
        if request.n > config.max_batch:
            raise InvalidRequest(f"n: at most {config.max_batch}, the batch of this replica")
        tokens = self._prompts.encode(request.messages)
        room = self._context - len(tokens)
        if room < 1:
            raise PromptTooLong(f"the prompt has {len(tokens)} tokens; this model's context is {self._context}")
        if self._is_closed:
            raise EngineClosed()
        if self._is_away and not is_warming:
            raise ServerAway(f"{self._server.url} does not answer")
        if len(self._streams) >= config.max_batch + config.max_queue and not is_warming:
            raise Overloaded(f"{len(self._streams)} requests are at the server already; try again in a moment")
        if version in self._lost:
            raise VersionNotReady(f"{version} is being loaded again: the server had lost it")
        self._slots.pin(version, is_warming=is_warming)
        ticket = Ticket(request, 0, tokens, room, [None] * request.n)
        stream = RemoteStream(self, ticket, self._prompts, self._filter)
        self._streams.add(stream)
        return stream

    def ended(self, stream: RemoteStream) -> None:
        """A stream's last completion is over: its version may go."""
        self._streams.discard(stream)
        self._slots.unpin(stream.request.version)

    def noticed(self, version: str, error: ServingError) -> None:
        """A request found the server away, or without the version: look now."""
        if isinstance(error, VersionNotReady) and self._is_adapter(version):
            self._lost.setdefault(version, str(error))
        if isinstance(error, ServerAway | VersionNotReady):
            self._kicked.set()

    def complete(self, ticket: Ticket, index: int) -> AsyncGenerator[Event | None]:
        """The server's events for one completion of ``ticket``."""
        request = ticket.request
        document = self._document(ticket, index) | {"model": self._name_there(request.version)}
        return self._server.complete(document, traceparent=request.traceparent)

    def check(self, version: str, event: Event) -> None:
        """Raise for an event that is an error, or another model's."""
        if event.error is not None:
            raise failed(event.error)
        if event.model not in (None, self._name_there(version)):
            raise EngineFailed(f"asked for {version}, the server answers as {event.model}")

    def _name_there(self, version: str) -> str:
        if version == self.base_version and not self._has_base_adapter:
            return self._name
        return f"{self._name}:{version}" if self._config.server == "sglang" else version

    def _is_adapter(self, version: str) -> bool:
        """Whether the server holds it as an adapter."""
        return version != self.base_version or self._has_base_adapter

    def _document(self, ticket: Ticket, index: int) -> dict[str, object]:
        """Everything said, so that no default of the server or of its model folder decides anything."""
        sampling = ticket.request.sampling
        document: dict[str, object] = {
            "prompt": ticket.tokens,
            "max_tokens": ticket.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(self._prompts.end_ids),
            "logprobs": sampling.top_logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if sampling.seed is not None:
            document["seed"] = (sampling.seed * 1_000_003 + index) & SEED_MAX
        if sampling.logit_bias:
            document["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
        if sampling.json_schema:
            schema = {"name": "answer", "schema": msgspec.Raw(sampling.json_schema.encode())}
            document["response_format"] = {"type": "json_schema", "json_schema": schema}
        return document

    def count(self, version: str, tokens: int) -> None:
        TOKENS.labels(self._base, version).inc(tokens)

    async def score(self, request: ScoreRequest) -> Scores:
        raise InvalidRequest("a model server is not asked for scores: whether it is idle cannot be seen from here")

    async def load(self, version: str, folder: Path, manifest: Manifest) -> None:
        if self._slots.reserve(version) is None:
            return
        try:
            if manifest.rank > self._config.rank_max:
                raise VersionRefused(f"{version}: rank {manifest.rank} is above rank_max {self._config.rank_max}")
            write = (folder, manifest, self._here / version)
            await asyncio.to_thread(write_peft, *write, model=self._model, shapes=self._shapes)
            async with self._changing:
                await self._load_there(version)
            await self._warm(version)
        except BaseException as error:  # re-raised: nothing of the version stays
            with suppress(ServingError):
                await self._forget(version)
            self._slots.fail(version, str(error) or type(error).__name__)
            raise
        self._slots.set_ready(version)

    async def _load_there(self, version: str) -> None:
        """Load the converted folder; one that the server holds from another folder is replaced."""
        roots = {model.id: model.root for model in await self._server.models()}
        if version in roots:
            if roots[version] == str(self._there / version):
                return
            await self._server.unload(version)
        await self._server.load(version, self._there / version)

    async def _warm(self, version: str) -> None:
        """One token that nobody sees; raises VersionRefused or UnsupportedModel when it does not come right."""
        request = warm_request(version, self._config.load_timeout_s)
        stream = self._accept(request, is_warming=version != self.base_version)
        async with aclosing(stream):
            chunks = [chunk async for chunk in stream]
        if isinstance(stream.failure, ServerAway | UnsupportedModel):
            raise stream.failure
        if chunks[-1].finish_reason in ("error", "cancelled"):
            reason = stream.failure or chunks[-1].error
            kind = UnsupportedModel if version == self.base_version else VersionRefused
            raise kind(f"{version}: the first token failed: {reason}")

    async def unload(self, version: str) -> None:
        await asyncio.wrap_future(self._slots.drain(version))
        try:
            await self._forget(version)
        except ServerAway as error:  # it has nothing then, or a later look finds what is left
            log.warning("not unloaded: %s", error, extra={"action": "unload_failed", "version": version})
        self._lost.pop(version, None)
        self._slots.free(version)

    async def _forget(self, version: str, *, unless_held: bool = False) -> None:
        """Take the version from the server, then its files: the server may read them as long as it knows it."""
        async with self._changing:
            if unless_held and self._slots.slot_of(version) is not None:
                return
            await self._server.unload(version)
            await asyncio.to_thread(shutil.rmtree, self._here / version, ignore_errors=True)

    async def _look_for_ever(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._kicked.wait(), self._config.look_interval_s)
            self._kicked.clear()
            await self._look()

    async def _look(self) -> None:
        """What the server holds against what is ready here: load what vanished, unload what nobody holds."""
        held = [version for version in self._slots.names("ready") if self._is_adapter(version)]
        try:
            models = {model.id: model.root for model in await self._server.models()}
        except ServerAway as error:
            self._misses += 1
            if self._misses == MISSES:
                log.warning("%s", error, extra={"action": "server_away", "base": self._base})
            return
        if self._is_away:
            log.info("%s answers again", self._server.url, extra={"action": "server_back", "base": self._base})
        self._misses = 0
        for version in {*held, *self._lost}:
            if version not in models:
                await self._load_again(version)
            else:
                self._lost.pop(version, None)
        await self._sweep({name for name, root in models.items() if root == str(self._there / name)})
        async with self._changing:
            await asyncio.to_thread(self._remove_leftovers, set(models))

    async def _load_again(self, version: str) -> None:
        async with self._changing:
            if version not in self._slots.names("ready"):
                self._lost.pop(version, None)
                return
            is_new = version not in self._lost
            self._lost.setdefault(version, "the server had lost it")
            try:
                await self._load_there(version)
            except ServingError as error:
                self._lost[version] = str(error)
                if is_new:
                    log.warning("not loaded again: %s", error, extra={"action": "version_lost", "version": version})
                return
            self._lost.pop(version, None)
            log.info("loaded again", extra={"action": "version_loaded_again", "version": version})

    async def _sweep(self, ours: set[str]) -> None:
        """Unload what an earlier life of this replica left at the server."""
        now = time.monotonic()
        free = {v for v in ours if VERSION_PATTERN.fullmatch(v) and self._slots.slot_of(v) is None}
        self._leftovers = {version: self._leftovers.get(version, now) for version in free}
        for version, since in self._leftovers.items():
            if now - since > self._left_over_s:
                with suppress(ServerAway):
                    await self._forget(version, unless_held=True)

    def _remove_leftovers(self, there: set[str]) -> None:
        """Delete converted folders that neither the server nor anybody here knows."""
        for folder in self._here.glob("*") if self._here.exists() else ():
            version = folder.name.removeprefix(".").partition(".")[0]  # or one that is being written
            is_held = version == self.base_version or self._slots.slot_of(version) is not None
            if not is_held and version not in there:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def _is_away(self) -> bool:
        return self._misses >= MISSES

    def status(self) -> EngineStatus:
        slots = self._slots
        ready = slots.names("ready")
        gone = set(ready) if self._is_away else set(self._lost)
        sequences = sum(stream.request.n for stream in self._streams)
        return EngineStatus(
            versions=tuple(version for version in ready if version not in gone),
            loading=(*slots.names("loading"), *(v for v in ready if v in gone and v != self.base_version)),
            draining=slots.names("draining"),
            failed=slots.failed(),
            in_flight=slots.in_flight(),
            free_slots=slots.free_slots(),
            queued=max(0, sequences - self._config.max_batch),
            running=min(sequences, self._config.max_batch),
        )

    def is_healthy(self) -> bool:
        """A server that is away comes back, and a new replica would find it no sooner."""
        return not self._is_closed and (self._looking is None or not self._looking.done())

    async def close(self) -> None:
        self._is_closed = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait((self._looking,))
        await asyncio.gather(*(stream.end("shutting_down") for stream in list(self._streams)))
        await self._server.close()


def check_json(schema: str) -> None:
    """Raise InvalidRequest for a schema that is no JSON; what it means the server judges."""
    try:
        msgspec.json.decode(schema)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"response_format: {error}") from error
