"""Which tokens the next step computes, and in which row each sequence keeps its keys and values. Pure.

Running sequences fill rows 0…n-1 without gaps: first those that decode, then at most one prompt that is
still being read, so that a step's attention over decoders is one dense block. Rows from ``max_batch`` on
hold finished sequences as a prefix cache, matched by (version, tokens): keys and values of one version are
never seen by another. Every move of rows is a Copy that the runner carries out in order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

MIN_REUSE_TOKENS = 16  # a shorter shared prefix is computed again: copying it would not pay


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion being made: prompt and generated tokens, of which ``computed`` have keys and values."""

    version: str
    slot: int
    tokens: list[int]
    prompt_tokens: int
    forks: list[Sequence] = field(default_factory=list)  # other completions of the same prompt, not yet begun
    computed: int = 0
    cached_tokens: int = 0
    row: int = -1
    is_forked: bool = False  # waits for its leader's prompt
    is_sound: bool = False  # its last logits were numbers; what they were computed from is taken to be, too

    @property
    def is_decoding(self) -> bool:
        return not self.is_forked and self.computed >= self.prompt_tokens


class Copy(NamedTuple):
    """Copy the first ``length`` keys and values of a row into another.

    ``clears``: afterwards the source is zeroed; where it is the target, too, that is all. What it held may be no
    numbers, and no mask hides those from a shorter sequence that comes there.
    """

    source: int
    target: int
    length: int
    clears: bool = False


class Work(NamedTuple):
    """Compute tokens[start:stop] of a sequence; ``is_last`` when the logits after them are needed."""

    sequence: Sequence
    start: int
    stop: int
    is_last: bool


class Plan(NamedTuple):
    """One step: first the copies, then the work; decoders come first among ``work``, in row order."""

    copies: list[Copy]
    work: list[Work]
    decoding: int


@dataclass(slots=True)
class Cached:
    """A finished sequence kept for its prefix."""

    version: str
    tokens: list[int]
    row: int


class Scheduler:
    """Rows, queue and prefix cache. Used by the engine's thread only."""

    def __init__(self, *, max_batch: int, cache_rows: int, chunk_tokens: int, idle_chunk_tokens: int) -> None:
        self.max_batch = max_batch
        self.waiting: deque[Sequence] = deque()
        self.rows: list[Sequence] = []
        self._cached: deque[Cached] = deque()  # least recently used first
        self._free_cache = list(range(max_batch, max_batch + cache_rows))
        self._chunk, self._idle_chunk = chunk_tokens, idle_chunk_tokens

    def add(self, leader: Sequence) -> None:
        """Queue a sequence with its forks."""
        self.waiting.append(leader)

    def plan(self) -> Plan:
        """The next step; empty work when there is nothing to do."""
        copies: list[Copy] = []
        work = [Work(s, s.computed, s.computed + 1, True) for s in self.rows if s.is_decoding]
        decoding = len(work)
        budget = self._chunk if decoding else self._idle_chunk
        leader = next((s for s in self.rows if not s.is_decoding), None)
        while budget > 0:
            if leader is None and (leader := self._admit(copies)) is None:
                break
            stop = min(leader.prompt_tokens, leader.computed + budget)
            budget -= stop - leader.computed
            work.append(Work(leader, leader.computed, stop, stop == leader.prompt_tokens))
            leader = None if stop == leader.prompt_tokens else leader
            if leader is not None:
                break
        return Plan(copies, work, decoding)

    def _admit(self, copies: list[Copy]) -> Sequence | None:
        """Give the next queued sequence and its forks rows, with the longest known prefix copied in."""
        if not self.waiting or len(self.rows) + 1 + len(self.waiting[0].forks) > self.max_batch:
            return None
        leader = self.waiting.popleft()
        row, length = self._longest_prefix(leader)
        for sequence in (leader, *leader.forks):
            sequence.row = len(self.rows)
            self.rows.append(sequence)
        if length >= MIN_REUSE_TOKENS:
            copies.append(Copy(row, leader.row, length))
            leader.computed = leader.cached_tokens = length
        return leader

    def _longest_prefix(self, wanted: Sequence) -> tuple[int, int]:
        """Row and length of the longest prefix computed under the same version, one token short of all."""
        best = (-1, 0)
        limit = wanted.prompt_tokens - 1
        for running in self.rows:
            if running.version == wanted.version and not running.is_forked:
                length = _shared(running.tokens[: running.computed], wanted.tokens, limit)
                best = max(best, (running.row, length), key=lambda found: found[1])
        used = None
        for cached in self._cached:
            if cached.version == wanted.version:
                length = _shared(cached.tokens, wanted.tokens, limit)
                if length > best[1]:
                    best, used = (cached.row, length), cached
        if used is not None:
            self._cached.remove(used)
            self._cached.append(used)
        return best

    def advance(self, plan: Plan) -> list[Copy]:
        """Note what a step computed; prompts that became whole give their forks a copy."""
        copies = []
        for sequence, _, stop, _ in plan.work:
            sequence.computed = stop
            if sequence.forks and sequence.is_decoding:
                for fork in sequence.forks:
                    copies.append(Copy(sequence.row, fork.row, stop))
                    fork.computed, fork.cached_tokens, fork.is_forked = stop, stop, False
                sequence.forks = []
        return copies

    def retire(self, finished: set[Sequence]) -> list[Copy]:
        """Take finished sequences out of their rows into the prefix cache, and close the gaps."""
        copies = [copy for s in self.rows if s in finished and (copy := self._keep(s)) is not None]
        copies += [Copy(s.row, s.row, s.computed, clears=True) for s in self.rows if s in finished and not s.is_sound]
        left = [s for s in self.rows if s not in finished]
        decoders = [s for s in left if s.is_decoding]
        holes = iter(sorted(set(range(len(decoders))) - {s.row for s in decoders}))
        for sequence in decoders:
            if sequence.row >= len(decoders):
                copies.append(_move(sequence, next(holes)))
        reading = [s for s in left if not s.is_decoding]
        for row, sequence in enumerate(reading, start=len(decoders)):
            if sequence.row != row:
                copies.append(_move(sequence, row))
        self.rows = sorted(left, key=lambda s: s.row)
        return [copy for copy in copies if copy.length]

    def drop(self, ended: set[Sequence]) -> None:
        """Take sequences that ended before they had a row out of the queue, and ended forks from their leaders.

        A queued family ends as a whole or not at all: its completions share their request.
        """
        self.waiting = deque(sequence for sequence in self.waiting if sequence not in ended)
        for sequence in self.rows:
            sequence.forks = [fork for fork in sequence.forks if fork not in ended]

    def _keep(self, sequence: Sequence) -> Copy | None:
        """Where a finished sequence's keys and values go, or None: not worth a row, or perhaps no numbers."""
        tokens = sequence.tokens[: sequence.computed]
        if len(tokens) < MIN_REUSE_TOKENS or sequence.is_forked or not sequence.is_sound:
            return None
        for cached in self._cached:
            if cached.version == sequence.version and _shared(cached.tokens, tokens, len(tokens)) == len(tokens):
                return None  # a longer one is there
        row = self._cache_row(sequence.version, tokens)
        if row is None:
            return None
        self._cached.append(Cached(sequence.version, tokens, row))
        return Copy(sequence.row, row, len(tokens))

    def _cache_row(self, version: str, tokens: list[int]) -> int | None:
        """A row for ``tokens``: that of a prefix of them, a free one, or the least recently used."""
        for cached in self._cached:
            if cached.version == version and cached.tokens == tokens[: len(cached.tokens)]:
                self._cached.remove(cached)
                return cached.row
        if self._free_cache:
            return self._free_cache.pop()
        return self._cached.popleft().row if self._cached else None

    def forget(self, version: str) -> None:
        """Drop the cached prefixes of a version that was unloaded."""
        for cached in [cached for cached in self._cached if cached.version == version]:
            self._cached.remove(cached)
            self._free_cache.append(cached.row)


def _move(sequence: Sequence, row: int) -> Copy:
    copy = Copy(sequence.row, row, sequence.computed, clears=not sequence.is_sound)
    sequence.row = row
    return copy


def _shared(a: list[int], b: list[int], limit: int) -> int:
    """Length of the common prefix of ``a`` and ``b``, at most ``limit``."""
    limit = min(limit, len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
