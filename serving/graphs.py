"""Decoding steps of fixed shapes, replayed: on a CUDA device as captured graphs, elsewhere by calling them again.

A step of N tokens takes the next larger batch bucket and the length bucket of its longest row. Lanes without a
sequence write into a scratch row that nobody reads. Inputs go over in one copy; adapters are read by slot, where they
lie, so that a version that is loaded into an idle slot needs no new graph. Prompts are not read here.

Dimensions: N rows of a bucket, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from serving.fused import Decoder, Step
from serving.sampling import summarise
from serving.scheduler import Plan

SHORTEST = 512  # the first length bucket; each further one is four times as long


class Made(NamedTuple):
    """What a step says: logits [N, V], and ``sampling.summarise`` of them."""

    logits: Tensor
    summary: Tensor | None  # None: nobody made one


class Replay:
    """``function``, which reads and writes static tensors only, ready to be run again and again by one thread."""

    def __init__(self, function: Callable[[], Made], device: str, pool: object | None) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if torch.device(device).type == "cuda":
            self._graph, self._made = _captured(function, pool)

    def __call__(self) -> Made:
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._made


def _captured(function: Callable[[], Made], pool: object | None) -> tuple[torch.cuda.CUDAGraph, Made]:
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles kernels, and lets libraries set themselves up
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # of this thread's calls only: others may be loading adapters
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
        made = function()
    return graph, made


class DecodeGraphs:
    """All replays of a model under one memory pool. Each is made when it is first needed, or by ``prepare``.

    ``scratch``: the place that lanes without a sequence write to.
    """

    def __init__(self, decoder: Decoder, *, max_batch: int, max_context: int, scratch: int, device: str) -> None:
        self._decoder, self._device, self._context = decoder, device, max_context
        self._is_cuda = torch.device(device).type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._is_cuda else None
        self._batches = [*(1 << i for i in range((max_batch - 1).bit_length())), max_batch]
        lengths = [SHORTEST]
        while lengths[-1] < max_context:
            lengths.append(4 * lengths[-1])
        self._lengths = [min(length, max_context) for length in lengths]
        self._empty = torch.tensor([[0], [0], [scratch], [1], [0]])  # token, position, place, length, slot
        self._hosts: dict[int, Tensor] = {}
        self._inputs: dict[int, Tensor] = {}
        self._replays: dict[tuple[int, int, bool], Replay] = {}
        for batch in self._batches:
            empty = self._empty.repeat(1, batch)
            self._hosts[batch] = empty.pin_memory() if self._is_cuda else empty
            self._inputs[batch] = empty.to(device, copy=True)

    def prepare(self) -> None:
        """Make those of short rows, the largest first: the others fit into their memory."""
        for batch in reversed(self._batches):
            for has_deltas in (True, False):
                self._replay(batch, self._lengths[0], has_deltas)

    def run(self, plan: Plan) -> Made:
        """The step of ``plan``, all of which decodes. The last one's result must have been read, or waited for."""
        work = plan.work
        count = len(work)
        batch = next(batch for batch in self._batches if batch >= count)
        longest = max(w.stop for w in work)
        length = next(length for length in self._lengths if length >= longest)
        replay = self._replay(batch, length, any(w.sequence.slot for w in work))
        host = self._hosts[batch]
        host[:, :count] = torch.tensor(
            [
                [w.sequence.tokens[w.start] for w in work],
                [w.start for w in work],
                [w.sequence.row * self._context + w.start for w in work],
                [w.stop for w in work],
                [w.sequence.slot for w in work],
            ]
        )
        host[:, count:] = self._empty
        self._inputs[batch].copy_(host, non_blocking=True)
        made = replay()
        return Made(made.logits[:count], None if made.summary is None else made.summary[:, :count])

    def _replay(self, batch: int, length: int, has_deltas: bool) -> Replay:
        key = batch, length, has_deltas
        if key not in self._replays:
            inputs = self._inputs[batch]
            inputs.copy_(self._empty.to(self._device).expand_as(inputs))  # making it runs it
            tokens, positions, places, lengths, slots = inputs.unbind()
            step = Step(tokens, positions, places, lengths, slots if has_deltas else None, length)
            self._replays[key] = Replay(lambda: self._made(step), self._device, self._pool)
        return self._replays[key]

    def _made(self, step: Step) -> Made:
        logits = self._decoder(step)
        return Made(logits, summarise(logits))
