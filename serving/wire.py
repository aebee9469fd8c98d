"""Wire records between router and replica: one request, a stream of newline-delimited JSON chunks.

``POST {replica}/v1/generate`` with a GenerateRequest; the answer is ``application/x-ndjson``, one Chunk a
line. Closing the connection cancels the generation. Torch-free: the router imports this.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from telemetry.events import Message

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to decode. Part of a variant's identity, so always explicit on this wire."""

    max_tokens: int
    temperature: float = 0.7  # 0 = greedy
    top_p: float = 0.95
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_logprobs: int = 0  # alternatives per token, 0–20
    frequency_penalty: float = 0.0  # off the logit of a token for each time that this answer said it
    presence_penalty: float = 0.0  # the same, once
    logit_bias: dict[int, float] = {}  # token id → added to its logit
    json_schema: str = ""  # the answer is JSON text of this schema, unless max_tokens cuts it; "": free

    @property
    def is_shaped(self) -> bool:
        """Whether anything but the model's own distribution decides what may come next."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias or self.json_schema)


class ToolUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the tools that the prompt's first message names may be used."""

    names: tuple[str, ...]  # these functions
    is_required: bool = False  # the answer is one or more calls, nothing else
    is_parallel: bool = True  # it may be more than one


GATHER_HEADER = "x-tiebreak-gather"  # set: nobody reads along, so that chunks after the first may leave together


class GenerateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Ask one version for ``n`` completions to one prompt. Defaults are not sent: older replicas can read it."""

    request_id: str
    version: str  # exactly one version answers; unknown or unready → 409 version_not_ready
    messages: tuple[Message, ...]
    sampling: Sampling
    n: int = 1
    deadline_s: float = 120.0  # seconds from receipt; past it the request is cancelled
    traceparent: str = ""
    tool_use: ToolUse | None = None  # None: what looks like a call is text


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True):
    """One sampled token with its natural-log probability under the serving version (before temperature)."""

    token: str
    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()


class CalledTool(msgspec.Struct, frozen=True):
    """A whole call. ``index`` counts the calls of its completion."""

    index: int
    name: str
    arguments: str  # JSON text of an object, as the model wrote it


class Chunk(msgspec.Struct, frozen=True):
    """A piece of completion ``index``. The last chunk of an index carries ``finish_reason`` and the counts.

    ``text`` is what the model wrote, calls included, and what events keep. Only where tools may be used, ``content``
    and ``tool_calls`` say what of it is for reading and what was called; both can come later than their text.
    """

    index: int
    version: str
    text: str = ""
    content: str | None = None  # None: all of the text is for reading
    tool_calls: tuple[CalledTool, ...] = ()
    tokens: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    is_unsafe: bool = False  # the output filter stopped this completion
    is_clipped: bool = False  # a stop string of the request ended it: the model itself had not
    error: str = ""


class AnswerTokens(msgspec.Struct, frozen=True):
    """An answer as it was sampled; ``is_ended`` when the model then ended it itself."""

    token_ids: tuple[int, ...]
    is_ended: bool


class ScoreRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST {replica}/v1/score``: how likely the base finds answers to one prompt, when it has nothing else to do."""

    messages: tuple[Message, ...]
    answers: tuple[AnswerTokens, ...]
    deadline_s: float = 60.0  # seconds from receipt; an engine that was never idle says 503


class Scores(msgspec.Struct, frozen=True):
    """For each answer the natural-log probabilities of its tokens under ``version``, the base, and of its end."""

    version: str
    logps: tuple[tuple[float, ...], ...]


class ReplicaStatus(msgspec.Struct, frozen=True):
    """``GET {replica}/v1/status``: what the control loop asks every replica."""

    replica_id: str
    base: str
    versions: tuple[str, ...]  # ready, the base version first
    loading: tuple[str, ...]
    draining: tuple[str, ...]
    failed: dict[str, str]  # version → reason its load was refused
    in_flight: dict[str, int]  # version → running requests
    free_slots: int
    queued: int
    takes_tools: bool = False  # the chat template renders tools and their calls, in the form that is read here
    scores_answers: bool = False  # takes POST /v1/score
