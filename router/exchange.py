"""One chat request being answered: its answers as they grow, and how they look to an OpenAI client.

No I/O. ``Answer`` takes a replica's chunks for one choice; ``Exchange`` holds the one or more answers of a
request and says what kind of result they make: a pair, or a normal answer when a side of it was lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from router.answers import (
    AssistantMessage,
    CachedTokens,
    ChatChunk,
    ChatCompletion,
    ChoiceLogprobs,
    ChoiceOut,
    ChunkChoice,
    Delta,
    FunctionCallOut,
    LogprobOut,
    PairOffer,
    StreamedPair,
    ToolCallDelta,
    ToolCallOut,
    TopLogprobOut,
    Usage,
)
from router.arms import Arm
from router.errors import DeadlineExceeded, RouterError, Unavailable, UpstreamFailed
from router.schema import ChatRequest
from serving.wire import Chunk, Sampling, TokenLogprob
from telemetry.events import Completion, CompletionServed, Message
from telemetry.randomness import random_bytes
from telemetry.text import repetition_ratio

SECOND_SIDE_WAIT_S: Final = 0.5  # how long a stream's first side waits for the second


def new_completion_id() -> str:
    """An id that tells nothing."""
    return f"chatcmpl-{random_bytes(16).hex()}"


class Answer:
    """One completion as it grows. Times are of one monotonic clock."""

    def __init__(self, completion_id: str, arm: Arm, sampling: Sampling, started_s: float) -> None:
        self.completion_id = completion_id
        self.arm = arm
        self.sampling = sampling
        self.started_s = started_s
        self.first_s = 0.0
        self.ended_s = 0.0
        self.pieces: list[str] = []
        self.readable: list[str] = []  # of the text, what is no call
        self.calls: list[ToolCallOut] = []
        self.tokens: list[TokenLogprob] = []
        self.finish_reason = ""  # as the replica said; "error" or "cancelled" when it was cut short
        self.failure: RouterError | None = None
        self.last = Chunk(0, arm.version)  # carries the counts

    @property
    def has_started(self) -> bool:
        return self.first_s > 0.0

    @property
    def is_over(self) -> bool:
        return bool(self.finish_reason)

    @property
    def is_whole(self) -> bool:
        return self.is_over and self.failure is None and self.finish_reason != "cancelled"

    @property
    def text(self) -> str:
        """What the model wrote, calls included."""
        return "".join(self.pieces)

    def message(self) -> AssistantMessage:
        """What the client reads and is to call."""
        content = "".join(self.readable)
        if not self.calls:
            return AssistantMessage(content)
        return AssistantMessage(content or None, tool_calls=tuple(self.calls))

    def take(self, chunk: Chunk, now_s: float) -> None:
        """Grow by one chunk."""
        if not self.has_started:
            self.first_s = now_s
        if chunk.text:
            self.pieces.append(chunk.text)
        if content := readable_of(chunk):
            self.readable.append(content)
        for call in chunk.tool_calls:
            self.calls.append(ToolCallOut(id=_new_call_id(), function=FunctionCallOut(call.name, call.arguments)))
        self.tokens.extend(chunk.tokens)
        if chunk.finish_reason is None:
            return
        self.last = chunk
        if chunk.finish_reason == "cancelled":
            self.fail(_shutting_down() if chunk.error == "shutting_down" else DeadlineExceeded(), now_s)
        elif chunk.finish_reason == "error":
            self.fail(UpstreamFailed("The model failed while it answered.", code=chunk.error or "engine_error"), now_s)
        else:
            self.finish_reason, self.ended_s = chunk.finish_reason, now_s

    def fail(self, error: RouterError, now_s: float) -> None:
        """End with an error, unless it is over already."""
        if not self.is_over:
            self.finish_reason, self.failure, self.ended_s = "error", error, now_s

    def cancel(self, now_s: float) -> None:
        """End because nobody listens any more, unless it is over already."""
        if not self.is_over:
            self.finish_reason, self.ended_s = "cancelled", now_s

    def client_finish_reason(self) -> str:
        """The finish reason in OpenAI's words."""
        if self.finish_reason == "stop" and self.calls and not self.last.is_unsafe:
            return "tool_calls"
        return self._event_finish_reason()

    def _event_finish_reason(self) -> str:
        """What a learner must know; it reads of calls in the text."""
        return "content_filter" if self.last.is_unsafe else self.finish_reason

    def completion(self) -> Completion:
        """The answer as events carry it."""
        return Completion(
            completion_id=self.completion_id,
            text=self.text,
            variant=self.arm.variant,
            version=self.arm.version,
            channel=self.arm.channel,
            finish_reason=self._event_finish_reason(),
            prompt_tokens=self.last.prompt_tokens,
            completion_tokens=self.last.completion_tokens,
            ttft_s=max(0.0, self.first_s - self.started_s) if self.has_started else 0.0,
            duration_s=self.ended_s - self.started_s,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=self.sampling.seed,
            token_ids=tuple(token.token_id for token in self.tokens),
            logps=tuple(token.logprob for token in self.tokens),
            is_clipped=self.last.is_clipped,
        )

    def served(self, exchange: Exchange) -> CompletionServed:
        """The numbers of the answer, without its text."""
        logps = [token.logprob for token in self.tokens]
        return CompletionServed(
            trace_id=exchange.trace_id,
            span_id=exchange.span_id,
            completion_id=self.completion_id,
            request_id=exchange.request_id,
            policy=exchange.policy,
            variant=self.arm.variant,
            version=self.arm.version,
            channel=self.arm.channel,
            pair_id=exchange.pair_id if exchange.is_pair else "",
            finish_reason=self.finish_reason,
            error=self.failure.code if self.failure else "",
            prompt_tokens=self.last.prompt_tokens,
            completion_tokens=self.last.completion_tokens,
            ttft_s=max(0.0, self.first_s - self.started_s) if self.has_started else 0.0,
            duration_s=self.ended_s - self.started_s,
            repetition_ratio=repetition_ratio(self.text),
            mean_logp=sum(logps) / len(logps) if logps else 0.0,
            is_unsafe=self.last.is_unsafe,
        )


@dataclass(kw_only=True, slots=True)
class Exchange:
    """One request and its answers, in choice order. For a pair the order is the shown position: a, b."""

    request: ChatRequest
    request_id: str
    id: str
    created: int
    policy: str
    user: str  # pseudonym
    caller: str
    prompt: tuple[Message, ...]
    propensity: float
    key_id: str = ""  # of the user's key when the request came; nothing of it is written under another
    trace_id: str = ""
    span_id: str = ""
    offer: PairOffer | None = None  # None: a normal answer
    answers: list[Answer] = field(default_factory=list)
    shown: list[Answer] = field(default_factory=list)  # what the client gets: fewer once a side was lost

    @property
    def is_pair(self) -> bool:
        return self.offer is not None

    @property
    def pair_id(self) -> str:
        return self.offer.pair_id if self.offer else ""

    def is_decided(self, now_s: float) -> bool:
        """Whether the kind of this answer is settled, so that its headers can leave.

        A pair waits until each side has begun or is lost, but not for ever for a slow second side.
        """
        begun_s = [answer.first_s for answer in self.shown if answer.has_started]
        if all(answer.has_started or answer.is_over for answer in self.shown):
            return True
        return bool(begun_s) and (not self.is_pair or now_s - min(begun_s) > SECOND_SIDE_WAIT_S)

    def failed(self) -> list[Answer]:
        """Those of the shown answers that failed."""
        return [answer for answer in self.shown if answer.failure]

    def drop_lost_sides(self) -> None:
        """Make a pair with a failed side a normal answer of the other.

        Raises the failure when no answer is left, or when a normal answer failed.
        """
        lost = self.failed()
        if lost and (not self.is_pair or len(lost) == len(self.shown)):
            assert lost[0].failure is not None
            raise lost[0].failure
        if lost:
            self.keep_only(next(answer for answer in self.shown if not answer.failure))

    def keep_only(self, answer: Answer) -> None:
        """This is no pair (any more): ``answer`` alone is shown, as a normal answer."""
        self.shown, self.offer = [answer], None
        answer.completion_id = self.id

    def headers(self) -> dict[str, str]:
        """What a client learns from the headers: the pair, or the version, never both."""
        if self.offer:
            return {"x-tiebreak-pair-id": self.offer.pair_id, "x-tiebreak-pair-token": self.offer.token}
        arm = self.shown[0].arm
        return {"x-tiebreak-variant": arm.variant, "x-tiebreak-version": arm.version}

    def usage(self) -> Usage:
        """Tokens of everything that was shown; the prompt counts once."""
        prompt = max((answer.last.prompt_tokens for answer in self.shown), default=0)
        completion = sum(answer.last.completion_tokens for answer in self.shown)
        cached = max((answer.last.cached_tokens for answer in self.shown), default=0)
        return Usage(prompt, completion, prompt + completion, CachedTokens(cached))

    def completion(self) -> ChatCompletion:
        """The whole answer."""
        choices = tuple(
            ChoiceOut(index, answer.message(), answer.client_finish_reason(), self._logprobs(answer.tokens))
            for index, answer in enumerate(self.shown)
        )
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.policy,
            choices=choices,
            usage=self.usage(),
            system_fingerprint=self._fingerprint(),
            preference=self.offer or UNSET,
        )

    def chunk(self, choices: tuple[ChunkChoice, ...], preference: StreamedPair | UnsetType = UNSET) -> ChatChunk:
        """One piece of the stream."""
        return ChatChunk(
            id=self.id,
            created=self.created,
            model=self.policy,
            choices=choices,
            system_fingerprint=self._fingerprint(),
            usage=None if self.request.includes_usage else UNSET,
            preference=preference,
        )

    def usage_chunk(self) -> ChatChunk:
        """The last piece when the client asked for usage."""
        return msgspec.structs.replace(self.chunk(()), usage=self.usage())

    def pieces(self, answer: Answer, chunk: Chunk, *, is_first: bool) -> Iterator[ChunkChoice]:
        """A replica's chunk as stream choices: text, then calls, the finish reason in a piece of its own."""
        index, content = self.shown.index(answer), readable_of(chunk)
        is_plain = chunk.content is None
        if is_first or content or (chunk.tokens and (is_plain or self.request.logprobs)):
            delta = Delta(role="assistant" if is_first else UNSET, content=content if content or is_plain else None)
            yield ChunkChoice(index, delta, None, self._logprobs(chunk.tokens))
        for called in chunk.tool_calls:
            call = answer.calls[called.index]
            named = FunctionCallOut(called.name)
            begun = ToolCallDelta(index=called.index, id=call.id, type="function", function=named)
            yield ChunkChoice(index, Delta(tool_calls=(begun,)))
            rest = ToolCallDelta(index=called.index, function=FunctionCallOut(arguments=called.arguments))
            yield ChunkChoice(index, Delta(tool_calls=(rest,)))
        if chunk.finish_reason and answer.is_whole:
            yield ChunkChoice(index, Delta(), answer.client_finish_reason())

    def failed_pieces(self) -> tuple[ChunkChoice, ...]:
        """The end of sides that failed; ``error`` is no reason of OpenAI's, and cannot be taken for one."""
        return tuple(ChunkChoice(index, Delta(), "error") for index, answer in enumerate(self.shown) if answer.failure)

    def _fingerprint(self) -> str | None:
        return None if self.is_pair else self.shown[0].arm.version

    def _logprobs(self, tokens: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> ChoiceLogprobs | None:
        if not self.request.logprobs:
            return None
        return ChoiceLogprobs(tuple(_logprob(token) for token in tokens))


def readable_of(chunk: Chunk) -> str:
    """What of the chunk is for reading."""
    return chunk.text if chunk.content is None else chunk.content


def _new_call_id() -> str:
    return f"call_{random_bytes(12).hex()}"


def _shutting_down() -> RouterError:
    return Unavailable("The replica is shutting down.", code="shutting_down", retry_after_s=1.0)


def _logprob(token: TokenLogprob) -> LogprobOut:
    top = tuple(TopLogprobOut(t.token, t.logprob, tuple(t.token.encode())) for t in token.top)
    return LogprobOut(token.token, token.logprob, tuple(token.token.encode()), top)
