"""One accepted request and its completions on their way: sampled tokens in, chunks out. Torch-free.

The engine's thread pushes tokens; the chunks they make are collected and delivered once a step.
"""

from __future__ import annotations

import asyncio
import time
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Self

from serving.prompts import PromptEncoder
from serving.safety import OutputFilter
from serving.sampling_rules import Rule, Sampled
from serving.scheduler import Sequence
from serving.text_stream import Detokenizer, OutputText
from serving.tool_calls import CallReader
from serving.wire import Chunk, FinishReason, GenerateRequest, TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from serving.shaping import Shaping

_entropy = SystemRandom()


class Ticket:
    """A request the engine has accepted. ``arrived`` belongs to the event loop, all else to the engine's thread."""

    def __init__(
        self, request: GenerateRequest, slot: int, tokens: list[int], room: int, shapings: list[Shaping | None]
    ) -> None:
        """``shapings``: one for each of the n completions."""
        self.request, self.slot, self.tokens, self.shapings = request, slot, tokens, shapings
        self.max_tokens = min(request.sampling.max_tokens, room)
        self.deadline = time.monotonic() + request.deadline_s
        self.is_cancelled = False
        self.arrived: asyncio.Queue[Chunk] = asyncio.Queue()
        self.unfinished = request.n
        self._chunks: list[Chunk] = []

    def begin(self, prompts: PromptEncoder, output_filter: OutputFilter) -> list[Completion]:
        """The n completions; the first one leads and computes the prompt for all."""
        completions = [Completion(self, index, prompts, output_filter) for index in range(self.request.n)]
        leader, *forks = completions
        leader.forks = forks
        leader.sequence.forks = [fork.sequence for fork in forks]
        return completions

    def emit(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self.unfinished -= chunk.finish_reason is not None

    def take(self) -> list[Chunk]:
        """The chunks made since the last take."""
        chunks, self._chunks = self._chunks, []
        return chunks


class Arrivals:
    """A ticket's chunks as they arrive, iterated once; a stream is this and a way to end it."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._left = ticket.request.n

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if not self._left:
            raise StopAsyncIteration
        chunk = await self._ticket.arrived.get()
        self._left -= chunk.finish_reason is not None
        return chunk


class Completion:
    """One of a ticket's completions: its tokens, its visible text, its own dice."""

    def __init__(self, ticket: Ticket, index: int, prompts: PromptEncoder, output_filter: OutputFilter) -> None:
        request, sampling = ticket.request, ticket.request.sampling
        self.ticket, self.index, self.made, self.is_ended = ticket, index, 0, False
        self.forks: list[Completion] = []
        self.sequence = Sequence(
            request.version, ticket.slot, list(ticket.tokens), len(ticket.tokens), is_forked=index > 0
        )
        seed = _entropy.getrandbits(64) if sampling.seed is None else sampling.seed * 1_000_003 + index
        self._shaping = ticket.shapings[index]
        self.rule = Rule(sampling.temperature, sampling.top_p, sampling.top_logprobs, Random(seed), self._shaping)
        self._prompts = prompts
        self._pieces = Detokenizer(prompts.decode)
        self._text = OutputText(sampling.stop, output_filter)
        self._calls = CallReader(request.tool_use.names) if request.tool_use else None
        self._unsent: list[TokenLogprob] = []
        self._noted: Sampled | None = None
        self._over: tuple[FinishReason, str] | None = None

    def push(self, sampled: Sampled) -> None:
        """Take the next token and tell it; ends the completion when it is the last one."""
        self.note(sampled)
        self.tell()

    @property
    def is_over(self) -> bool:
        """Whether no further token is wanted; the last one's text may still have to be told."""
        return self.is_ended or self._over is not None

    def note(self, sampled: Sampled) -> None:
        """Take the next token without making text of it: all that the next step has to wait for."""
        self.sequence.is_sound = sampled.is_finite  # also where its end was told while this was computed
        if self.is_over:
            return
        if not sampled.is_finite:
            self._over = "error", "not_finite"
        elif sampled.token_id in self._prompts.end_ids:
            self._over = "stop", ""
        elif self._shaping is not None and not self._shaping.accept(sampled.token_id):
            self._over = "error", "grammar_failed"
        else:
            self.made += 1
            self.sequence.tokens.append(sampled.token_id)
            self._noted = sampled
            if self.made == self.ticket.max_tokens:
                self._over = "length", ""

    def tell(self) -> None:
        """Make text of the token that was noted, and end where it, or what it completes, is the last."""
        text = ""
        if self._noted is not None:
            sampled, self._noted = self._noted, None
            self._unsent.append(self._token(sampled))
            text = self._text.push(self._pieces.push(sampled.token_id))
        if self.is_ended:
            return
        if self._text.is_stopped or self._text.is_unsafe:
            self._finish("stop", text)
        elif self._over is not None:
            reason, error = self._over
            self._finish(reason, text + self._rest(), error)
        elif text:
            self._emit(text)

    def end(self, reason: FinishReason, *, error: str = "") -> None:
        """End it here: text that was held back comes out, then the last chunk."""
        self.tell()
        if not self.is_ended:
            self._finish(reason, self._rest(), error)

    def _rest(self) -> str:
        return self._text.push(self._pieces.finish(), is_last=True)

    def _finish(self, reason: FinishReason, text: str, error: str = "") -> None:
        self.is_ended = True
        content, calls = self._calls.push(text, is_last=True) if self._calls else (None, ())
        self.ticket.emit(
            Chunk(
                index=self.index,
                version=self.sequence.version,
                text=text,
                content=content,
                tool_calls=calls,
                tokens=self._take_tokens(),
                finish_reason=reason,
                prompt_tokens=self.sequence.prompt_tokens,
                cached_tokens=self.sequence.cached_tokens,
                completion_tokens=self.made,
                is_unsafe=self._text.is_unsafe,
                is_clipped=self._text.is_stopped,
                error=error,
            )
        )

    def _emit(self, text: str) -> None:
        content, calls = self._calls.push(text) if self._calls else (None, ())
        self.ticket.emit(
            Chunk(
                index=self.index,
                version=self.sequence.version,
                text=text,
                content=content,
                tool_calls=calls,
                tokens=self._take_tokens(),
            )
        )

    def _take_tokens(self) -> tuple[TokenLogprob, ...]:
        tokens, self._unsent = tuple(self._unsent), []
        return tokens

    def _token(self, sampled: Sampled) -> TokenLogprob:
        name = self._prompts.token_text
        top = tuple(TopLogprob(name(token_id), logprob) for token_id, logprob in sampled.top)
        return TokenLogprob(name(sampled.token_id), sampled.token_id, sampled.logprob, top)
