"""How likely the base finds answers that were given: read chunk by chunk, each only when nothing else is to be done.

A learner holds its policy to the base and needs the base's log-probs of every answer it learns from. A replica has the
weights at hand and idle moments between questions. One row of keys and values is kept for it; answers to one prompt
share what was read of it, and a question that comes meanwhile waits for one chunk at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import torch
from torch import Tensor

from serving.errors import EngineClosed, Overloaded
from serving.scheduler import Plan, Sequence, Work

Logps = tuple[tuple[float, ...], ...]


class Job:
    """Answers to one prompt, as token ids; ``done`` gets the log-probs of each answer's tokens. Cancel it to end it."""

    def __init__(self, prompt: list[int], answers: list[list[int]]) -> None:
        self.prompt, self.answers = prompt, answers
        self.done: Future[Logps] = Future()


class IdleScorer:
    """Jobs in the order in which they came. ``add`` is any thread's, the rest the engine's."""

    def __init__(self, run: Callable[..., Tensor], *, row: int, chunk_tokens: int, most: int) -> None:
        """``run`` is the runner's; ``row`` nobody else's; at most ``most`` jobs wait."""
        self._run, self._row, self._chunk, self._most = run, row, chunk_tokens, most
        self._jobs: deque[Job] = deque()
        self._reading: tuple[Job, Iterator[None]] | None = None

    def __bool__(self) -> bool:
        return self._reading is not None or bool(self._jobs)

    def add(self, job: Job) -> bool:
        """Queue ``job``; False when too many wait."""
        if len(self._jobs) >= self._most:
            return False
        self._jobs.append(job)
        return True

    def step(self) -> None:
        """Read one chunk."""
        if self._reading is not None and self._reading[0].done.cancelled():
            self._reading = None
        while self._reading is None and self._jobs:
            job = self._jobs.popleft()
            if not job.done.cancelled():
                self._reading = job, self._read(job)
        if self._reading is None:
            return
        try:
            is_over = next(self._reading[1], self) is self
        except RuntimeError as error:  # of torch: out of memory, say; answers need less, and go on
            job, is_over = self._reading[0], True
            if job.done.set_running_or_notify_cancel():
                job.done.set_exception(Overloaded(f"scores could not be computed: {error}"))
        if is_over:
            self._reading = None

    def close(self) -> None:
        """Nothing will be read any more: who waits hears EngineClosed."""
        left = [*([self._reading[0]] if self._reading else []), *self._jobs]
        self._reading = None
        self._jobs.clear()
        for job in left:
            if job.done.set_running_or_notify_cancel():
                job.done.set_exception(EngineClosed())

    def _read(self, job: Job) -> Iterator[None]:
        """Yields after each chunk; what stands in the row is the prompt and the last answer's tokens."""
        first, shared, found = len(job.prompt) - 1, 0, []
        for answer in job.answers:
            tokens = job.prompt + answer
            sequence = Sequence("", 0, tokens, len(tokens), row=self._row)
            logps: list[float] = []
            at, end = shared, len(tokens) - 1  # nothing follows the last token
            while at < end:
                stop = min(at + self._chunk, end)
                keep = stop - max(at, first)
                logits = self._run(Plan([], [Work(sequence, at, stop, keep > 0)], 0), keep=max(keep, 1))
                if keep > 0:
                    logps += _logps(logits, tokens[stop - keep + 1 : stop + 1])
                at = stop
                yield
            found.append(tuple(logps))
            shared = first  # the prompt's last token is read again: its logits tell the next answer's first token
        if job.done.set_running_or_notify_cancel():
            job.done.set_result(tuple(found))


@torch.inference_mode()
def _logps(logits_TV: Tensor, tokens: list[int]) -> list[float]:
    target_T = torch.tensor(tokens, device=logits_TV.device)
    found: list[float] = (-torch.nn.functional.cross_entropy(logits_TV.float(), target_T, reduction="none")).tolist()
    return found
