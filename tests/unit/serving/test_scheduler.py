"""Rows, queue and prefix cache under random traffic, checked against a model of the memory."""

from __future__ import annotations

import random

from serving.scheduler import Copy, Plan, Scheduler, Sequence

CLEARED = ("", 0)
BROKEN = "v3"  # what it computes are no numbers


class Memory:
    """What each row would hold: (version, token) per place, copied and written as the plan says."""

    def __init__(self) -> None:
        self.rows: dict[int, list[tuple[str, int]]] = {}

    def copy(self, copies: list[Copy]) -> None:
        for source, target, length, clears in copies:
            if source != target:
                self.rows[target] = self.rows[source][:length] + self.rows.get(target, [])[length:]
            if clears:
                self.rows[source][:length] = [CLEARED] * length

    def compute(self, plan: Plan) -> None:
        for sequence, start, stop, _ in plan.work:
            row = self.rows.setdefault(sequence.row, [])
            row[start:stop] = [(sequence.version, token) for token in sequence.tokens[start:stop]]
            assert [token for _, token in row[:stop]] == sequence.tokens[:stop]
            assert {version for version, _ in row[:stop]} == {sequence.version}


def scheduler(max_batch: int = 4, cache_rows: int = 2) -> Scheduler:
    return Scheduler(max_batch=max_batch, cache_rows=cache_rows, chunk_tokens=7, idle_chunk_tokens=20)


def sequence(tokens: list[int], version: str = "v1", forks: int = 0) -> Sequence:
    others = [Sequence(version, 1, list(tokens), len(tokens), is_forked=True) for _ in range(forks)]
    return Sequence(version, 1, list(tokens), len(tokens), forks=others)


def step(plans: Scheduler, memory: Memory) -> Plan:
    plan = plans.plan()
    memory.copy(plan.copies)
    memory.compute(plan)
    sampled = [s for work in plan.work if work.is_last for s in (work.sequence, *work.sequence.forks)]
    memory.copy(plans.advance(plan))
    for place, one in enumerate(sampled):
        one.is_sound = one.version != BROKEN
        one.tokens.append(1000 + 10 * len(one.tokens) + place)
    return plan


def test_random_traffic_never_shows_a_sequence_another_ones_memory() -> None:
    dice = random.Random(1)
    plans, memory = scheduler(), Memory()
    alive: list[Sequence] = []
    for _ in range(2_000):
        if dice.random() < 0.2 and len(plans.waiting) < 5:
            shared = [dice.randrange(2)] * dice.choice((0, 18, 30))
            prompt = shared + [dice.randrange(5) for _ in range(dice.randint(1, 25))]
            new = sequence(prompt, dice.choice(("v1", "v2", BROKEN)), forks=dice.choice((0, 0, 1, 2)))
            alive += [new, *new.forks]
            plans.add(new)
        plan = step(plans, memory)
        decoders = [work.sequence for work in plan.work[: plan.decoding]]
        assert [s.row for s in decoders] == list(range(len(decoders)))
        assert len(plans.rows) <= 4
        begun = [s for s in plans.rows if s.is_decoding]
        ended = {s for s in begun if len(s.tokens) > s.prompt_tokens and (s.version == BROKEN or dice.random() < 0.15)}
        ended |= {s for s in plans.rows if not s.is_decoding and s.computed and not s.forks and dice.random() < 0.1}
        plans.drop(ended)
        memory.copy(plans.retire(ended))
        for row in range(4):  # beside a longer sequence, all of a row is looked at
            held = memory.rows.get(row, [])
            own = {s.version for s in plans.rows if s.row == row}
            assert BROKEN not in {version for version, _ in held} or own == {BROKEN}
        assert BROKEN not in {cached.version for cached in plans._cached}
        assert [s.row for s in plans.rows] == list(range(len(plans.rows)))
        alive = [s for s in alive if s not in ended]


def test_a_prompt_is_read_in_chunks_that_leave_room_for_decoders() -> None:
    plans, memory = scheduler(), Memory()
    plans.add(sequence([1] * 5))
    step(plans, memory)
    plans.add(sequence(list(range(30))))
    plan = step(plans, memory)
    assert [(work.start, work.stop) for work in plan.work] == [(5, 6), (0, 7)]
    assert plan.decoding == 1


def test_a_shared_prefix_of_one_version_is_copied_but_for_the_last_token() -> None:
    plans, memory = scheduler(), Memory()
    prompt = list(range(20))
    plans.add(sequence(prompt))
    step(plans, memory)
    again = sequence(prompt)
    plans.add(again)
    assert plans.plan().copies == [Copy(0, 1, 19)]
    assert again.cached_tokens == 19


def test_a_prefix_of_another_version_is_not_used() -> None:
    plans, memory = scheduler(), Memory()
    first = sequence(list(range(20)), "v1")
    plans.add(first)
    step(plans, memory)
    memory.copy(plans.retire({first}))
    plans.add(sequence(list(range(20)), "v2"))
    assert plans.plan().copies == []


def test_a_forgotten_version_leaves_the_prefix_cache() -> None:
    plans, memory = scheduler(), Memory()
    first = sequence(list(range(20)), "v1")
    plans.add(first)
    step(plans, memory)
    memory.copy(plans.retire({first}))
    plans.forget("v1")
    plans.add(sequence(list(range(20)), "v1"))
    assert plans.plan().copies == []


def test_a_family_that_does_not_fit_waits_without_being_split() -> None:
    plans, memory = scheduler(max_batch=3), Memory()
    plans.add(sequence([1, 2, 3], forks=1))
    plans.add(sequence([4, 5, 6], forks=1))
    step(plans, memory)
    assert len(plans.rows) == 2
    plans.retire(set(plans.rows))
    step(plans, memory)
    assert len(plans.rows) == 2
    assert not plans.waiting
