"""The engine seen by its replica: prompts in, chunks out, versions loaded beside each other. Torch-free.

Three implementations, one contract (tests/contract/test_engine.py): ``transformers_engine``, ``remote_engine``
and ``echo_engine``. A request names one version and is pinned to it until its last chunk; unloading waits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol, Self

import msgspec

from serving.errors import InvalidRequest
from serving.wire import Chunk, GenerateRequest, Sampling, ScoreRequest, Scores
from telemetry.events import Message
from telemetry.manifest import Manifest

MAX_N = 8
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_BIASES = 300
MAX_SCHEMA_CHARS = 65_536


class EngineStatus(msgspec.Struct, frozen=True):
    """What an engine holds and does now."""

    versions: tuple[str, ...]  # ready, the base version first
    loading: tuple[str, ...]
    draining: tuple[str, ...]
    failed: dict[str, str]
    in_flight: dict[str, int]  # version → requests
    free_slots: int
    queued: int  # requests that wait for a place in the batch
    running: int  # sequences in the batch
    takes_tools: bool = False  # the chat template renders tools and their calls, in the form that is read here
    scores_answers: bool = False  # takes POST /v1/score


class ChunkStream(Protocol):
    """The chunks of one accepted request, iterated once. Use with ``contextlib.aclosing``."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Chunk: ...

    async def aclose(self) -> None:
        """Cancel what is left and let the version go; harmless when all is done, needed even if nothing was read."""
        ...


class Engine(Protocol):
    """One base model and the versions over it. Called from one event loop."""

    base_version: str

    async def start(self) -> None:
        """Load the base model; raises UnsupportedModel when it would not be served right, ServerAway when remote."""
        ...

    async def submit(self, request: GenerateRequest) -> ChunkStream:
        """Accept ``request`` and return its chunks; closing the stream cancels what is left of it.

        Raises InvalidRequest, PromptTooLong, VersionNotReady, Overloaded or EngineClosed before any chunk.
        """
        ...

    async def score(self, request: ScoreRequest) -> Scores:
        """The base's log-probs of given answers, computed while nothing else is to be done.

        Raises InvalidRequest, PromptTooLong, EngineClosed, or Overloaded where that was not before the deadline.
        """
        ...

    async def load(self, version: str, folder: Path, manifest: Manifest) -> None:
        """Put the verified version into a free slot and make it ready; nothing to do when it is there.

        Raises VersionRefused, NoFreeSlot, or VersionNotReady while it is loading or draining.
        """
        ...

    async def unload(self, version: str) -> None:
        """Take no further request for ``version`` and free its slot once none is in flight."""
        ...

    def status(self) -> EngineStatus: ...

    def is_healthy(self) -> bool:
        """False when the engine can never answer again."""
        ...

    async def close(self) -> None:
        """Cancel what runs and free everything."""
        ...


def warm_request(version: str, deadline_s: float) -> GenerateRequest:
    """One token that nobody sees."""
    sampling = Sampling(max_tokens=1, temperature=0.0)
    return GenerateRequest(f"warm-{version}", version, (Message("user", "Hello"),), sampling, deadline_s=deadline_s)


def check_request(request: GenerateRequest) -> None:
    """Raise InvalidRequest for parameters that no engine takes."""
    sampling = request.sampling
    checks = (
        (bool(request.messages), "messages: at least one message is needed"),
        (1 <= request.n <= MAX_N, f"n: 1 to {MAX_N}"),
        (sampling.max_tokens >= 1, "max_tokens: at least 1"),
        (math.isfinite(sampling.temperature) and 0 <= sampling.temperature <= 2, "temperature: 0 to 2"),
        (0 < sampling.top_p <= 1, "top_p: above 0, at most 1"),
        (len(sampling.stop) <= MAX_STOPS and all(sampling.stop), f"stop: up to {MAX_STOPS} non-empty texts"),
        (0 <= sampling.top_logprobs <= MAX_TOP_LOGPROBS, f"top_logprobs: 0 to {MAX_TOP_LOGPROBS}"),
        (_is_within(2.0, sampling.frequency_penalty), "frequency_penalty: -2 to 2"),
        (_is_within(2.0, sampling.presence_penalty), "presence_penalty: -2 to 2"),
        (
            len(sampling.logit_bias) <= MAX_BIASES and _is_within(100.0, *sampling.logit_bias.values()),
            f"logit_bias: up to {MAX_BIASES} tokens, each -100 to 100",
        ),
        (len(sampling.json_schema) <= MAX_SCHEMA_CHARS, f"response_format: at most {MAX_SCHEMA_CHARS} characters"),
        (request.deadline_s > 0, "deadline_s: above 0"),
        (_names_tools(request), "tool_use: names functions that the prompt's first message does not offer"),
    )
    for is_fine, message in checks:
        if not is_fine:
            raise InvalidRequest(message)


def _names_tools(request: GenerateRequest) -> bool:
    if request.tool_use is None:
        return True
    offered = {tool.name for tool in request.messages[0].tools} if request.messages else set()
    return bool(request.tool_use.names) and offered.issuperset(request.tool_use.names)


def _is_within(limit: float, *values: float) -> bool:
    return all(math.isfinite(value) and abs(value) <= limit for value in values)
