"""The client of a model server that speaks OpenAI's API (vLLM, SGLang): its models, adapters and token streams.

One call, one request; nothing is kept here. What goes wrong becomes one of ``serving.errors``. Torch-free.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import msgspec

from serving.config import BaseConfig
from serving.errors import (
    EngineFailed,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    ServerAway,
    ServerUnreachable,
    ServingError,
    VersionNotReady,
    VersionRefused,
)

PATHS = {"vllm": "/v1", "sglang": ""}  # before /load_lora_adapter and /unload_lora_adapter
LOOK_S = 5.0
KEEPALIVE_S = 2.0  # below the 5 s after which these servers close a quiet connection
REASON_CHARS = 500
BROKEN = (aiohttp.ClientError, OSError, TimeoutError)
STALE = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)  # what a kept connection shows that had been closed


class Model(msgspec.Struct, frozen=True):
    """One entry of GET /v1/models; an adapter has a parent, and its root is the folder it was loaded from."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class Logprobs(msgspec.Struct, frozen=True):
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct, frozen=True):
    """A piece of one completion: the ids that came with this event, and how likely they were."""

    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens_details: PromptDetails | None = None


class Failure(msgspec.Struct, frozen=True):
    message: str = ""
    code: int | str | None = None
    param: str | None = None


class Event(msgspec.Struct, frozen=True):
    """One server-sent event of a completion."""

    model: str | None = None
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Failure | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[Model]


class _Refusal(msgspec.Struct, frozen=True):
    error: Failure | str | None = None
    error_message: str | None = None  # SGLang, of adapters
    message: str | None = None  # SGLang, of requests
    detail: Any = None  # FastAPI's own


_models = msgspec.json.Decoder(_Models)
_events = msgspec.json.Decoder(Event)
_refusals = msgspec.json.Decoder(_Refusal)
_json = msgspec.json.Encoder()


class ModelServer:
    """The server at ``config.url``. ``open`` it in the event loop that uses it."""

    def __init__(self, config: BaseConfig) -> None:
        self.url, self._config = config.url.rstrip("/"), config
        self._adapters = self.url + PATHS[config.server]

    def open(self) -> None:
        """Open the connection pool; raises ServerAway for a key file that cannot be read."""
        headers = {"Content-Type": "application/json"}
        if key := read_key(self._config.api_key_file):
            headers["Authorization"] = f"Bearer {key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    async def close(self) -> None:
        await self._session.close()

    async def models(self) -> list[Model]:
        """What the server serves now; raises ServerAway."""
        try:
            async with self._session.get(f"{self.url}/v1/models", timeout=self._timeout(LOOK_S)) as response:
                body = await response.read()
                if response.status != 200:
                    raise ServerAway(f"{self.url}/v1/models answers {response.status}: {reason(body)}")
                return _models.decode(body).data
        except BROKEN as error:
            raise self.away(error) from error
        except msgspec.DecodeError as error:
            raise ServerAway(f"{self.url}/v1/models is no list of models: {error}") from error

    async def takes_adapters(self) -> bool:
        """Whether adapters can be loaded while the server runs: asked by GET, which their path refuses with 405."""
        url = f"{self._adapters}/load_lora_adapter"
        try:
            async with self._session.get(url, timeout=self._timeout(LOOK_S)) as response:
                return response.status != 404
        except BROKEN as error:
            raise self.away(error) from error

    async def load(self, name: str, path: Path) -> None:
        """Load the adapter that the server sees at ``path``; raises VersionRefused, or ServerAway."""
        status, body = await self._post(
            f"{self._adapters}/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}
        )
        if status == 404 and _is_no_route(body):
            raise VersionRefused(f"{name}: {self.url} takes no adapters. {how_to_start(self._config)}")
        if status != 200:
            raise VersionRefused(f"{name}: {self.url} does not load it: {reason(body)}")

    async def unload(self, name: str) -> None:
        """Forget the adapter; nothing to do where it is not known. Raises ServerAway."""
        status, body = await self._post(f"{self._adapters}/unload_lora_adapter", {"lora_name": name})
        if status >= 500:
            raise ServerAway(f"{self.url} does not unload {name}: {reason(body)}")

    async def _post(self, url: str, document: Mapping[str, object]) -> tuple[int, bytes]:
        timeout = self._timeout(self._config.load_timeout_s)
        try:
            async with self._session.post(url, data=_json.encode(document), timeout=timeout) as response:
                return response.status, await response.read()
        except BROKEN as error:
            raise self.away(error) from error

    async def complete(self, document: Mapping[str, object], *, traceparent: str = "") -> AsyncGenerator[Event | None]:
        """None once the server has accepted, then its events to the last; closing the generator cancels there.

        Raises a ServingError for a refusal, ServerAway for a connection that breaks.
        """
        body = _json.encode(document)
        try:
            response = await self._accepted(body, {"traceparent": traceparent} if traceparent else {})
            try:
                if response.status != 200:
                    refuse(response.status, await response.read())
                yield None
                async for event in _read(response.content):
                    yield event
            finally:
                response.close()  # in the middle of an answer this is what cancels it
        except BROKEN as error:
            raise self.away(error) from error
        except msgspec.DecodeError as error:
            raise EngineFailed(f"{self.url} answers what cannot be read: {error}") from error

    async def _accepted(self, body: bytes, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """The answer's head. Asked once more where a kept connection turns out to have been closed meanwhile."""
        config, url = self._config, f"{self.url}/v1/completions"
        timeout = aiohttp.ClientTimeout(sock_connect=config.connect_timeout_s, sock_read=config.token_timeout_s)
        try:
            return await self._session.post(url, data=body, headers=headers, timeout=timeout)
        except STALE as error:
            if isinstance(error, aiohttp.ClientConnectorError):
                raise
            return await self._session.post(url, data=body, headers=headers, timeout=timeout)

    def _timeout(self, total_s: float) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=total_s, sock_connect=self._config.connect_timeout_s)

    def away(self, error: BaseException) -> ServerAway:
        return ServerUnreachable(f"{self.url} does not answer ({str(error) or type(error).__name__})")


async def _read(content: aiohttp.StreamReader) -> AsyncGenerator[Event]:
    """The events of a stream; one that ends without [DONE] is broken. Read to its end, the connection is kept."""
    rest, is_done = b"", False
    async for data in content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            payload = line[5:].strip() if line.startswith(b"data:") else b""
            is_done = is_done or payload == b"[DONE]"
            if payload and not is_done:
                yield _events.decode(payload)
    if not is_done:
        raise aiohttp.ClientPayloadError("the stream ended before [DONE]")


def refuse(status: int, body: bytes) -> NoReturn:
    """Raise what the server's refusal of a request means here."""
    text = reason(body)
    if status == 404 and not _is_no_route(body):
        raise VersionNotReady(f"the server does not hold it: {text}")
    if status in (429, 503):
        raise Overloaded(f"the server is full: {text}")
    if status in (400, 413, 422) and "context length" in text:
        raise PromptTooLong(text)
    if status in (400, 413, 422):
        raise InvalidRequest(text)
    if status in (401, 403):
        raise ServerAway(f"the server takes no such key ({status}): see api_key_file")
    if status == 404:
        raise ServerAway("the server has no POST /v1/completions")
    raise EngineFailed(f"the server answers {status}: {text}")


def failed(error: Failure) -> ServingError:
    """What an error in the middle of a stream means."""
    try:
        code = str(error.code)  # a status, or a word
        refuse(int(code) if code.isdigit() else 500, _json.encode({"error": error}))
    except ServingError as meaning:
        return meaning


def reason(body: bytes) -> str:
    """The message in an error's body, in one line."""
    try:
        document = _refusals.decode(body)
    except msgspec.DecodeError:
        return " ".join(body.decode(errors="replace").split())[:REASON_CHARS]
    error = document.error
    text = error.message if isinstance(error, Failure) else error
    found = text or document.error_message or document.message or str(document.detail or "no reason given")
    return " ".join(found.split())[:REASON_CHARS]


def _is_no_route(body: bytes) -> bool:
    """A 404 of the web framework, not of the server's own."""
    try:
        document = _refusals.decode(body)
    except msgspec.DecodeError:
        return True
    return document.error is None and document.error_message is None and document.message is None


def read_key(path: str) -> str:
    """The API key in the file at ``path``, "" for no path; raises ServerAway."""
    if not path:
        return ""
    try:
        return Path(path).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServerAway(f"api_key_file cannot be read: {error}") from error


def how_to_start(config: BaseConfig) -> str:
    """The server's command line, for people."""
    if config.server == "sglang":
        return "Start SGLang with --enable-lora --max-lora-rank N --lora-target-modules all"
    return "Start vLLM with --enable-lora --max-lora-rank N and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


def base_model(models: Sequence[Model], config: BaseConfig) -> Model:
    """The entry of the base among what the server serves; raises ServerAway that says what to configure."""
    bases = [model for model in models if model.parent is None]
    found = [model for model in bases if model.id == config.server_model] if config.server_model else bases
    if len(found) == 1:
        return found[0]
    names = ", ".join(model.id for model in bases) or "none"
    wanted = f"no model {config.server_model!r}" if config.server_model else "not exactly one base model"
    raise ServerAway(f"{config.url} serves {wanted}: set server_model to one of: {names}")


async def probe(config: BaseConfig) -> Model:
    """The base that the server at ``config.url`` serves; raises ServerAway."""
    server = ModelServer(config)
    server.open()
    try:
        return base_model(await server.models(), config)
    finally:
        await server.close()
