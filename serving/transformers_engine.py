"""Continuous batching over a transformers model: one thread steps, the event loop accepts and delivers.

Each turn drops what was cancelled or is too late, runs the scheduler's plan, samples one token per sequence
and hands the new text over with one wake-up of the event loop. On a GPU the text of a step is made while the
device computes the next one. With nothing to do the thread sleeps. A version's requests pin its slot from
acceptance to their last chunk, so weights never change under an answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from llguidance import LLMatcher
from transformers import AutoTokenizer

from serving.adapters import load_adapter
from serving.completions import Arrivals, Completion, Ticket
from serving.config import BaseConfig
from serving.engine import ChunkStream, EngineStatus, check_request, warm_request
from serving.errors import (
    EngineClosed,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    VersionRefused,
)
from serving.prompts import PromptEncoder
from serving.runner import Runner
from serving.safety import OutputFilter
from serving.sampling import sample
from serving.scheduler import Plan, Scheduler, Sequence
from serving.scoring import IdleScorer, Job
from serving.shaping import Guides
from serving.slots import SlotTable
from serving.wire import Chunk, GenerateRequest, ScoreRequest, Scores
from telemetry.manifest import Manifest, base_version
from telemetry.metrics import TOKENS

log = logging.getLogger(__name__)
SCORES_MOST = 64  # requests for scores that wait
WARM_S = 60.0  # a new version's first token may take this long


class TransformersEngine:
    """Serves the transformers model in ``folder``; see ``serving.engine.Engine`` for the contract."""

    def __init__(self, folder: Path, digest: str, base: str, options: BaseConfig, output_filter: OutputFilter) -> None:
        self.base_version = base_version(digest)
        self._folder, self._base = folder, base
        self._options, self._filter = options, output_filter
        self._slots = SlotTable(options.slots, self.base_version)
        self._scheduler = Scheduler(
            max_batch=options.max_batch,
            cache_rows=options.cache_rows,
            chunk_tokens=options.chunk_tokens,
            idle_chunk_tokens=options.idle_chunk_tokens,
        )
        self._running: dict[Sequence, Completion] = {}
        self._untold: list[Completion] = []  # with a token whose text is not made yet
        self._wake = threading.Condition()
        self._arrived: list[Ticket] = []  # guarded by _wake, as are the two below
        self._forgotten: list[str] = []
        self._is_closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._load_base)
        self._thread = threading.Thread(target=self._serve, name=f"engine-{self._base}", daemon=True)
        self._thread.start()

    def _load_base(self) -> None:
        options = self._options
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(options.threads or os.cpu_count() or 1)
        dtype, many_dtype = _dtypes(options.dtype, device)
        self._runner = Runner(
            self._folder,
            dtype=dtype,
            many_dtype=many_dtype,
            device=device,
            slots=options.slots,
            rank_max=options.rank_max,
            rows=options.max_batch + options.cache_rows + 1,
            max_context=options.max_context,
        )
        if self._runner.is_apart:
            self._runner.replay_decoding(options.max_batch)
        self._scorer = IdleScorer(
            self._runner.run,
            row=options.max_batch + options.cache_rows,
            chunk_tokens=options.chunk_tokens,
            most=SCORES_MOST,
        )
        tokenizer = AutoTokenizer.from_pretrained(self._folder)
        self._prompts = PromptEncoder(tokenizer, self._runner.model.generation_config)
        self._guides = Guides(tokenizer, self._runner.vocabulary)

    async def submit(self, request: GenerateRequest) -> ChunkStream:
        check_request(request)
        guide = None
        if request.sampling.json_schema or request.tool_use:  # a large schema takes up to a second
            guide = await asyncio.to_thread(self._guides.guide, request)
        return self._accept(request, guide)

    def _accept(self, request: GenerateRequest, guide: LLMatcher | None = None, *, is_warming: bool = False) -> _Stream:
        shapings = [self._guides.shaping(request.sampling, guide) for _ in range(request.n)]
        if request.n > self._options.max_batch:
            raise InvalidRequest(f"n: at most {self._options.max_batch}, the batch of this replica")
        tokens = self._prompts.encode(request.messages)
        room = self._runner.max_context - len(tokens)
        if room < 1:
            raise PromptTooLong(f"the prompt has {len(tokens)} tokens; this model's context is {room + len(tokens)}")
        with self._wake:
            if self._failure is not None:
                raise EngineFailed() from self._failure
            if self._is_closed:
                raise EngineClosed()
            if self.queued >= self._options.max_queue:
                raise Overloaded(f"{self.queued} requests wait already; try again in a moment")
            slot = self._slots.pin(request.version, is_warming=is_warming)
            ticket = Ticket(request, slot, tokens, room, shapings)
            self._arrived.append(ticket)
            self._wake.notify()
        return _Stream(self, ticket)

    @property
    def queued(self) -> int:
        """Requests that wait for a place in the batch."""
        return len(self._arrived) + len(self._scheduler.waiting)

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request before the next step; harmless when it is done."""
        with self._wake:
            ticket.is_cancelled = True
            self._wake.notify()

    async def score(self, request: ScoreRequest) -> Scores:
        job = self._score_job(request)
        with self._wake:
            if self._failure is not None or self._is_closed:
                raise EngineClosed()
            if not self._scorer.add(job):
                raise Overloaded(f"{SCORES_MOST} requests for scores wait already")
            self._wake.notify()
        try:
            logps = await asyncio.wait_for(asyncio.wrap_future(job.done), request.deadline_s)
        except TimeoutError as error:
            raise Overloaded("the engine was not idle before the deadline") from error
        return Scores(self.base_version, logps)

    def _score_job(self, request: ScoreRequest) -> Job:
        prompt, end_id = self._prompts.encode(request.messages), self._prompts.end_id
        end = [] if end_id is None else [end_id]
        answers = [[*answer.token_ids, *(end if answer.is_ended else [])] for answer in request.answers]
        vocabulary = self._runner.vocabulary
        if not answers or not all(ids and all(0 <= token < vocabulary for token in ids) for ids in answers):
            raise InvalidRequest(f"answers: at least one, none empty, of token ids below {vocabulary}")
        if (longest := len(prompt) + max(map(len, answers))) > self._runner.max_context:
            raise PromptTooLong(f"{longest} tokens; this model's context is {self._runner.max_context}")
        return Job(prompt, answers)

    async def load(self, version: str, folder: Path, manifest: Manifest) -> None:
        slot = self._slots.reserve(version)
        if slot is None:
            return
        try:
            await asyncio.to_thread(load_adapter, self._runner.lora, slot, folder, manifest)
            await self._warm(version)
        except BaseException as error:
            self._runner.lora.clear(slot)
            self._slots.fail(version, str(error) or type(error).__name__)
            with self._wake:
                self._forgotten.append(version)
            raise
        self._slots.set_ready(version)

    async def _warm(self, version: str) -> None:
        """One token from a version nobody sees yet; raises VersionRefused when it is not a number."""
        stream = self._accept(warm_request(version, WARM_S), is_warming=True)
        chunks = [chunk async for chunk in stream]
        if chunks[-1].finish_reason in ("error", "cancelled"):
            raise VersionRefused(f"{version}: the first token failed: {chunks[-1].error or 'cancelled'}")

    async def unload(self, version: str) -> None:
        await asyncio.wrap_future(self._slots.drain(version))
        with self._wake:
            self._forgotten.append(version)
        if (slot := self._slots.slot_of(version)) is not None:
            await asyncio.to_thread(self._runner.lora.clear, slot)
        self._slots.free(version)

    def status(self) -> EngineStatus:
        slots = self._slots
        return EngineStatus(
            versions=slots.names("ready"),
            loading=slots.names("loading"),
            draining=slots.names("draining"),
            failed=slots.failed(),
            in_flight=slots.in_flight(),
            free_slots=slots.free_slots(),
            queued=self.queued,
            running=len(self._scheduler.rows),
            takes_tools=self._prompts.takes_tools,
            scores_answers=True,
        )

    def is_healthy(self) -> bool:
        return self._failure is None and self._thread is not None and self._thread.is_alive()

    async def close(self) -> None:
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        """The engine's thread: until closed, take what arrived and step, or score; a failure ends every request."""
        torch.set_num_threads(self._options.threads or os.cpu_count() or 1)
        try:
            while self._take():
                self._end_unwanted()
                plan = self._scheduler.plan()
                if plan.work:
                    self._step(plan)
                else:
                    self._tell()
                    self._scorer.step()
        except Exception as error:
            log.exception("the engine failed", extra={"action": "engine_failed", "base": self._base})
            with self._wake:
                self._failure = error
        self._end_all("engine_failed" if self._failure else "shutting_down")

    def _take(self) -> bool:
        """Queue what arrived, sleeping while there is nothing at all to do; False when closed."""
        with self._wake:
            while not (self._arrived or self._running or self._scorer or self._is_closed):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            forgotten, self._forgotten = self._forgotten, []
            is_closed = self._is_closed
            for ticket in arrived:
                completions = ticket.begin(self._prompts, self._filter)
                self._running |= {completion.sequence: completion for completion in completions}
                self._scheduler.add(completions[0].sequence)
        for version in forgotten:
            self._scheduler.forget(version)
        return not is_closed

    def _end_unwanted(self) -> None:
        """End what was cancelled or passed its deadline."""
        now = time.monotonic()
        unwanted = set()
        for completion in self._running.values():
            if completion.ticket.is_cancelled:
                completion.end("cancelled")
                unwanted.add(completion.ticket)
            elif now > completion.ticket.deadline:
                completion.end("cancelled", error="deadline_exceeded")
                unwanted.add(completion.ticket)
        if unwanted:
            self._untold = [completion for completion in self._untold if not completion.is_ended]
            self._retire()
            self._deliver(unwanted)

    def _step(self, plan: Plan) -> None:
        logits, summary = self._runner.step(plan)
        self._tell()  # the last step's, while the device computes this one
        self._runner.kv.copy(self._scheduler.advance(plan))
        sampled_from, completions = [], []
        for row, work in enumerate(w for w in plan.work if w.is_last):
            family = self._family(work.sequence)
            completions += family
            sampled_from += [row] * len(family)
        with torch.inference_mode():
            if len(completions) > logits.shape[0]:
                logits, summary = logits[torch.tensor(sampled_from, device=logits.device)], None
            sampled = sample(logits, [completion.rule for completion in completions], summary)
        for completion, token in zip(completions, sampled, strict=True):
            completion.note(token)
        self._untold = [completion for completion in completions if not completion.is_ended]
        for version, count in Counter(completion.sequence.version for completion in completions).items():
            TOKENS.labels(self._base, version).inc(count)
        if not self._runner.is_apart:
            self._tell()
        self._retire()
        if not self._running:
            self._tell()

    def _tell(self) -> None:
        """Make text of the last step's tokens where that is still to be done, and deliver it."""
        for completion in self._untold:  # kept until all are told: where one fails, _end_all ends the others
            completion.tell()
        untold, self._untold = self._untold, []
        self._deliver({completion.ticket for completion in untold})

    def _family(self, sequence: Sequence) -> list[Completion]:
        """The completions that take their next token from these logits: forks begin with their leader's."""
        completion = self._running[sequence]
        if completion.made or not completion.forks:
            return [completion]
        return [completion, *completion.forks]

    def _retire(self) -> None:
        """Take completions that want no further token out of the batch."""
        over = {sequence for sequence, completion in self._running.items() if completion.is_over}
        if over:
            self._scheduler.drop(over)
            self._runner.kv.copy(self._scheduler.retire(over))
            for sequence in over:
                del self._running[sequence]

    def _deliver(self, tickets: set[Ticket]) -> None:
        """Hand over what is new of these, and let the versions of those that are done go."""
        deliveries = [(ticket, chunks) for ticket in tickets if (chunks := ticket.take())]
        for ticket in tickets:
            if not ticket.unfinished:
                self._slots.unpin(ticket.request.version)
        if deliveries:
            self._loop.call_soon_threadsafe(_deliver, deliveries)

    def _end_all(self, error: str) -> None:
        with self._wake:
            self._is_closed = True
            self._scorer.close()
        self._take()
        left = {*self._untold, *self._running.values()}  # what is untold may have left the batch already
        for completion in left:
            completion.end("error" if self._failure else "cancelled", error=error)
        tickets = {completion.ticket for completion in left}
        self._running.clear()
        for ticket in tickets:
            self._slots.unpin(ticket.request.version)
        deliveries = [(ticket, ticket.take()) for ticket in tickets]
        if deliveries and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, deliveries)


class _Stream(Arrivals):
    """One request's chunks; closing it cancels what is left."""

    def __init__(self, engine: TransformersEngine, ticket: Ticket) -> None:
        super().__init__(ticket)
        self._cancel = partial(engine.cancel, ticket)

    async def aclose(self) -> None:
        if self._left:
            self._cancel()


def _deliver(deliveries: list[tuple[Ticket, list[Chunk]]]) -> None:
    for ticket, chunks in deliveries:
        for chunk in chunks:
            ticket.arrived.put_nowait(chunk)


def _dtypes(name: str, device: str) -> tuple[torch.dtype, torch.dtype | None]:
    """What is computed in, and what products of many tokens are, if in another type (serving/product.py)."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype, None
    if device != "cpu":
        return torch.bfloat16, None
    return torch.float32, torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
