"""An engine without a model, shipped for tests and router benches: it answers with its version's name, or calls a tool.

Deterministic, with every rule of the contract that does not need weights: versions and slots, pinning,
draining, stop strings, limits, cancellation, deadlines. Left out: probabilities that mean anything.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Self

from serving.engine import ChunkStream, EngineStatus, check_request
from serving.errors import EngineClosed, InvalidRequest, PromptTooLong, UnsupportedTools
from serving.safety import OutputFilter
from serving.slots import SlotTable
from serving.text_stream import OutputText
from serving.tool_calls import CLOSE, OPEN, CallReader
from serving.wire import Chunk, FinishReason, GenerateRequest, Sampling, ScoreRequest, Scores, TokenLogprob, TopLogprob
from telemetry.conversation import needs_tools
from telemetry.manifest import Manifest, base_version

_PIECE = re.compile(r"\s*\S+")
LOGPROB = -0.5


class EchoEngine:
    """Answers ``<version> says: <last message>``, one word a token, ``token_s`` seconds each.

    A tool whose name the last message holds is called with that message, the first tool if one must be.
    """

    def __init__(
        self,
        digest: str = "",
        *,
        slots: int = 8,
        max_context: int = 4096,
        token_s: float = 0.0,
        output_filter: OutputFilter | None = None,
        takes_tools: bool = True,
        scores_answers: bool = False,
    ) -> None:
        self.base_version = base_version(digest or "ec40ec40")
        self._slots = SlotTable(slots, self.base_version)
        self._max_context = max_context
        self._token_s = token_s
        self._filter = output_filter or OutputFilter(())
        self._takes_tools, self._scores_answers = takes_tools, scores_answers
        self._running = 0
        self._is_closed = False

    async def start(self) -> None:
        """Nothing to load."""

    async def submit(self, request: GenerateRequest) -> ChunkStream:
        if self._is_closed:
            raise EngineClosed()
        check_request(request)
        if request.sampling.is_shaped:
            raise InvalidRequest(
                "the echo engine has no logits: penalties, logit_bias and response_format need a model"
            )
        if needs_tools(request.messages) and not self._takes_tools:
            raise UnsupportedTools()
        prompt_tokens = sum(len(_PIECE.findall(message.content)) + 1 for message in request.messages)
        if prompt_tokens >= self._max_context:
            raise PromptTooLong(f"the prompt has {prompt_tokens} tokens, the context {self._max_context}")
        return _Pinned(self._slots, request.version, self._answer(request, prompt_tokens))

    async def _answer(self, request: GenerateRequest, prompt_tokens: int) -> AsyncGenerator[Chunk]:
        deadline = time.monotonic() + request.deadline_s
        room = min(request.sampling.max_tokens, self._max_context - prompt_tokens)
        self._running += 1
        try:
            for index in range(request.n):
                answer = self._complete(request, index, prompt_tokens, room, deadline)
                async with aclosing(answer):
                    async for chunk in answer:
                        yield chunk
        finally:
            self._running -= 1

    async def _complete(
        self, request: GenerateRequest, index: int, prompt_tokens: int, room: int, deadline: float
    ) -> AsyncGenerator[Chunk]:
        pieces = _PIECE.findall(_said(request, index))
        text = OutputText(request.sampling.stop, self._filter)
        calls = CallReader(request.tool_use.names) if request.tool_use else None
        finish: FinishReason = "stop" if len(pieces) <= room else "length"
        made = 0
        for made, piece in enumerate(pieces[:room], start=1):
            if self._token_s:
                await asyncio.sleep(self._token_s)
            is_last = made == min(room, len(pieces))
            visible = text.push(piece, is_last=is_last)
            is_last = is_last or text.is_stopped or text.is_unsafe
            content, called = calls.push(visible, is_last=is_last) if calls else (None, ())
            token = _token(piece, made, request.sampling)
            yield Chunk(index, request.version, visible, content, called, (token,))
            if time.monotonic() > deadline or self._is_closed:
                finish = "cancelled"
                break
            if text.is_stopped or text.is_unsafe:
                finish = "stop"
                break
        yield Chunk(
            index=index, version=request.version, finish_reason=finish, prompt_tokens=prompt_tokens,
            completion_tokens=made, is_unsafe=text.is_unsafe, is_clipped=text.is_stopped,
            error="deadline_exceeded" if time.monotonic() > deadline else "",
        )  # fmt: skip

    async def score(self, request: ScoreRequest) -> Scores:
        if not self._scores_answers:
            raise InvalidRequest("this engine scores no answers")
        lengths = (len(answer.token_ids) + answer.is_ended for answer in request.answers)
        return Scores(self.base_version, tuple((LOGPROB,) * length for length in lengths))

    async def load(self, version: str, folder: Path, manifest: Manifest) -> None:
        if self._slots.reserve(version) is not None:
            self._slots.set_ready(version)

    async def unload(self, version: str) -> None:
        await asyncio.wrap_future(self._slots.drain(version))
        self._slots.free(version)

    def status(self) -> EngineStatus:
        slots = self._slots
        return EngineStatus(
            versions=slots.names("ready"), loading=slots.names("loading"), draining=slots.names("draining"),
            failed=slots.failed(), in_flight=slots.in_flight(), free_slots=slots.free_slots(),
            queued=0, running=self._running, takes_tools=self._takes_tools, scores_answers=self._scores_answers,
        )  # fmt: skip

    def is_healthy(self) -> bool:
        return not self._is_closed

    async def close(self) -> None:
        self._is_closed = True


class _Pinned:
    """A chunk stream that holds its version from acceptance until it ends or is closed."""

    def __init__(self, slots: SlotTable, version: str, answer: AsyncGenerator[Chunk]) -> None:
        slots.pin(version)
        self._slots, self._version, self._answer = slots, version, answer
        self._is_open = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        try:
            return await anext(self._answer)
        except StopAsyncIteration:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        await self._answer.aclose()
        if self._is_open:
            self._is_open = False
            self._slots.unpin(self._version)


def _said(request: GenerateRequest, index: int) -> str:
    message, use = request.messages[-1], request.tool_use
    said = f"{request.version} says{f' ({index})' if index else ''}: {message.content}"
    if use is None:
        return said
    names = [name for name in use.names if name in message.content and message.role != "tool"]
    if use.is_required:
        names = names or [use.names[0]]
    calls = [f'{OPEN}\n{{"name": "{name}", "arguments": {json.dumps({"said": said})}}}\n{CLOSE}' for name in names]
    return "\n".join(calls if use.is_parallel else calls[:1]) or said


def _token(piece: str, token_id: int, sampling: Sampling) -> TokenLogprob:
    others = [TopLogprob(f"alternative-{i}", LOGPROB - i) for i in range(1, sampling.top_logprobs)]
    top = (TopLogprob(piece, LOGPROB), *others) if sampling.top_logprobs else ()
    return TokenLogprob(piece, token_id, LOGPROB, top)
