"""One request at a model server: a task for each completion, their chunks in one queue.

What the engine knows of the server it lends by ``Owner``; here is what becomes of the server's events.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec

from serving.completions import Arrivals, Completion, Ticket
from serving.errors import EngineFailed, ServingError, UnsupportedModel
from serving.model_server import Choice, Event
from serving.prompts import PromptEncoder
from serving.safety import OutputFilter
from serving.sampling_rules import Sampled
from serving.wire import Chunk, FinishReason

log = logging.getLogger(__name__)
ID_PREFIX = "token_id:"
FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class Owner(Protocol):
    """The engine, as a stream needs it."""

    def complete(self, ticket: Ticket, index: int) -> AsyncGenerator[Event | None]:
        """The server's events for one completion; None first, once it is accepted. Raises a ServingError."""

    def check(self, version: str, event: Event) -> None:
        """Raise for an event that is an error, or another model's."""

    def count(self, version: str, tokens: int) -> None:
        """So many tokens were made."""

    def noticed(self, version: str, error: ServingError) -> None:
        """A request failed at the server."""

    def ended(self, stream: RemoteStream) -> None:
        """The last completion is over."""


class RemoteStream(Arrivals):
    """The chunks of one request, as they come."""

    def __init__(self, owner: Owner, ticket: Ticket, prompts: PromptEncoder, output_filter: OutputFilter) -> None:
        super().__init__(ticket)
        self.request, self._owner = ticket.request, owner
        self.failure: ServingError | None = None
        loop = asyncio.get_running_loop()
        self._completions = ticket.begin(prompts, output_filter)
        self._accepted = [loop.create_future() for _ in self._completions]
        self._tasks = [loop.create_task(self._follow(completion)) for completion in self._completions]
        self._done = asyncio.gather(*self._tasks, return_exceptions=True)
        self._done.add_done_callback(lambda _: self._over())

    async def accepted(self) -> None:
        """Return when the server has taken every completion; raises what it refused one for."""
        await asyncio.wait(self._accepted)
        for future in self._accepted:
            if (error := future.result()) is not None:
                raise error

    async def aclose(self) -> None:
        await self.end()

    async def end(self, error: str = "") -> None:
        """Close what is still open at the server; whoever reads on sees it cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait((self._done,))
        for completion in self._completions:
            completion.end("cancelled", error=error)
        self._deliver(self._ticket.take())

    def _over(self) -> None:
        """Every task is done: an error that none of them expected ends its completion, then the version may go."""
        for completion, task in zip(self._completions, self._tasks, strict=True):
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("an answer failed", exc_info=error, extra={"action": "answer_failed"})
                completion.end("error", error="engine_failed")
        self._deliver(self._ticket.take())
        self._owner.ended(self)

    async def _follow(self, completion: Completion) -> None:
        """One completion from the request to its last chunk, whatever comes between."""
        accepted, last = self._accepted[completion.index], _Last()
        try:
            async with asyncio.timeout(self.request.deadline_s):
                await self._read(completion, accepted, last)
        except TimeoutError:
            completion.end("cancelled", error="deadline_exceeded")
        except ServingError as error:
            self.failure = error
            self._owner.noticed(self.request.version, error)
            if not accepted.done():
                accepted.set_result(error)
            completion.end("error", error=error.code)
        finally:
            if not accepted.done():
                accepted.set_result(None)
            self._deliver([*last.chunks(), *self._ticket.take()])

    async def _read(self, completion: Completion, accepted: asyncio.Future[ServingError | None], last: _Last) -> None:
        """Deliver as events come; the chunk that ends the completion waits in ``last`` for the server's counts."""
        is_late = bool(self.request.sampling.json_schema)  # a bad schema is refused in the stream, by its first event
        async with aclosing(self._owner.complete(self._ticket, completion.index)) as events:
            async for event in events:
                is_over = event is not None and self._push(completion, event)
                if not accepted.done() and (event is not None or not is_late):
                    accepted.set_result(None)
                if event is not None:
                    last.count(event)
                chunks = self._ticket.take()
                if not completion.is_ended:
                    self._deliver(chunks)
                    continue
                last.keep(chunks)
                if not is_over:
                    break  # it ended by a rule of ours: what else the server would say nobody reads
        if not completion.is_ended:
            raise EngineFailed("the server ended an answer without a reason")

    def _push(self, completion: Completion, event: Event) -> bool:
        """Take the event's tokens; whether the server says that the completion is over."""
        self._owner.check(self.request.version, event)
        is_over = completion.is_ended
        for choice in event.choices:
            tokens = sampled(choice, self.request.sampling.top_logprobs)
            made = completion.made
            for token in tokens:
                if not completion.is_ended:
                    completion.push(token)
            self._owner.count(self.request.version, completion.made - made)
            if choice.finish_reason is not None:
                is_over = True
                completion.end(FINISH.get(choice.finish_reason, "error"))
        return is_over

    def _deliver(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._ticket.arrived.put_nowait(chunk)


class _Last:
    """The chunk that ends a completion, kept until the server has said how much of the prompt it had."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []
        self._cached = 0

    def keep(self, chunks: Sequence[Chunk]) -> None:
        self._chunks += chunks

    def count(self, event: Event) -> None:
        details = event.usage.prompt_tokens_details if event.usage else None
        self._cached = (details.cached_tokens if details else None) or self._cached

    def chunks(self) -> list[Chunk]:
        """What was kept, counted."""
        chunks, self._chunks = self._chunks, []
        return [msgspec.structs.replace(c, cached_tokens=self._cached) if c.finish_reason else c for c in chunks]


def sampled(choice: Choice, top: int) -> list[Sampled]:
    """The tokens of one event with their ``top`` alternatives; raises UnsupportedModel when they have no ids."""
    ids, said = choice.token_ids, choice.logprobs
    if ids is None or (ids and (said is None or len(said.token_logprobs) != len(ids))):
        raise UnsupportedModel(
            "the server returns no token ids or log-probabilities: vLLM 0.10.2 or an SGLang of July 2026 is needed"
        )
    tokens = []
    for place, token_id in enumerate(ids):
        assert said is not None
        logprob = said.token_logprobs[place]
        is_finite = logprob is not None and math.isfinite(logprob)
        others = said.top_logprobs[place] if top and said.top_logprobs else None
        likeliest = sorted((others or {}).items(), key=lambda item: -item[1])[:top]
        named = tuple((int(name.removeprefix(ID_PREFIX)), value) for name, value in likeliest)
        tokens.append(Sampled(token_id, logprob if is_finite and logprob is not None else 0.0, named, is_finite))
    return tokens
