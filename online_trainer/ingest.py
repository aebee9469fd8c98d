"""From log entries to the verdicts that a step may use, and a reason for every one that it may not.

``Intake`` is a pure function of the log: what it holds after an entry depends on the entries alone. All of it
goes into the checkpoint, offsets included, so a restarted trainer goes on exactly where its weights stand.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Literal

import msgspec

from online_trainer.bias import Traits, traits
from telemetry.conversation import prompt_cluster
from telemetry.event_log import Entry, Offsets
from telemetry.events import (
    Completion,
    FeedbackRecorded,
    Message,
    PersonErased,
    PreferenceRecorded,
    PreferenceRetracted,
    Sealed,
)
from telemetry.people import Forgotten
from telemetry.sealing import Sealer, Shape, bare

Reason = Literal[
    "no_preference", "identical", "empty", "unsafe", "held_out", "retracted", "refused", "erased", "stale", "unusable"
]
TEXTS = Shape(("chosen", "rejected"))  # of a verdict
NO_ANSWER = Completion("", "", "", "", "stable", "", 0, 0, 0.0, 0.0, 0.0, 0.0)
MAX_TRIES = 2  # a verdict that was in two refused lineages may be what is wrong with them
EFFECTS_WINDOW = 512  # verdicts that the effects of position and length are measured on
MOST_BALANCE = 4.0  # that a cohort's weight is raised by
SEEN_IDS = 100_000  # deduplication reaches back this far, as the recorder's does (telemetry/store.py)
MARK_BYTES = 8  # of a preference id among these: one in 10^14 new ones is taken for another


class Verdict(msgspec.Struct, frozen=True):
    """What training needs of a PreferenceRecorded."""

    preference_id: str
    pair_id: str
    user: str  # whose pair it was
    occurred_at: datetime
    prompt: tuple[Message, ...]
    chosen: Completion
    rejected: Completion
    trace: tuple[str, str] = ("", "")  # (trace_id, span_id)
    tries: int = 0  # steps that were taken on it as a new verdict; more than one only where weights were refused
    passes: int = 0  # steps that it took part in since
    labeler: str = ""  # who gave it, if that was not the user
    is_tie: bool = False  # both sides were found equal
    position: Literal["a", "b", ""] = ""  # where chosen was shown; "" of a tie
    cohort: str = "default"  # as the application grouped its users
    thumb: int = 0  # 1 or -1: no verdict on a pair, but a thumb on ``chosen`` alone; ``rejected`` is NO_ANSWER then
    key_id: str = ""  # that the log has it sealed with; empty: in the clear
    sealed: Sealed | None = None  # as it lies in a checkpoint: prompt and the sides' words, which then are empty

    @property
    def by(self) -> str:
        """Whose judgement it is."""
        return f"labeler {self.labeler}" if self.labeler else self.user


class IntakeState(msgspec.Struct, frozen=True):
    """All that an Intake knows, as it lies in a checkpoint."""

    offsets: Offsets = {}
    pending: tuple[Verdict, ...] = ()  # to be trained on, in the log's order
    replay: tuple[Verdict, ...] = ()  # trained on, oldest first, bounded
    heldout: tuple[Verdict, ...] = ()  # never trained on, oldest first, bounded
    aged: tuple[Verdict, ...] = ()  # too old to be trained on: they only judge, oldest first, bounded
    regression: tuple[Verdict, ...] = ()  # trained on, and got right by a version, bounded
    effects: tuple[Traits, ...] = ()  # of the verdicts that came last
    dropped: tuple[tuple[str, str], ...] = ()  # (preference_id, reason), not yet told
    marks: bytes = b""  # of preference ids that were seen, MARK_BYTES each, oldest first, bounded


def sealed(state: IntakeState, sealer: Sealer) -> IntakeState:
    """``state`` as it may lie on disk; of those whose key is gone nothing but the bare verdict is left."""

    def each(verdict: Verdict) -> Verdict:
        if not verdict.key_id:
            return verdict
        try:
            found: Verdict = sealer.seal_record(verdict, TEXTS, name=verdict.preference_id, key_id=verdict.key_id)
        except Forgotten:
            found = bare(verdict, TEXTS)
        return found

    return msgspec.structs.replace(
        state,
        pending=tuple(map(each, state.pending)),
        replay=tuple(map(each, state.replay)),
        heldout=tuple(map(each, state.heldout)),
        aged=tuple(map(each, state.aged)),
        regression=tuple(map(each, state.regression)),
    )


def opened(state: IntakeState, sealer: Sealer) -> IntakeState:
    """The inverse of ``sealed``, without the verdicts of people who are forgotten; those that waited are dropped."""
    dropped = list(state.dropped)

    def readable(verdicts: Iterable[Verdict], *, waiting: bool = False) -> Iterator[Verdict]:
        for verdict in verdicts:
            try:
                yield sealer.open_record(verdict, TEXTS, name=verdict.preference_id)
            except Forgotten:
                if waiting:
                    dropped.append((verdict.preference_id, "erased"))

    pending = tuple(readable(state.pending, waiting=True))
    return msgspec.structs.replace(
        state,
        pending=pending,
        replay=tuple(readable(state.replay)),
        heldout=tuple(readable(state.heldout)),
        aged=tuple(readable(state.aged)),
        regression=tuple(readable(state.regression)),
        dropped=tuple(dropped),
    )


def is_held_out(prompt: Sequence[Message], ratio: float) -> bool:
    """Whether this prompt's cluster is of the share that is never trained on: the same answer everywhere, for ever."""
    digest = hashlib.sha256(prompt_cluster(prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") < ratio * 2**64


def reason_to_drop(event: PreferenceRecorded, heldout_ratio: float, *, learns_ties: bool = False) -> Reason | None:
    """Why no step may use this verdict; None when one may."""
    if event.outcome != "chosen_rejected" and not (learns_ties and event.outcome == "tie"):
        return "no_preference"
    if event.chosen.text == event.rejected.text:
        return "identical"
    if not event.chosen.text.strip() or not event.rejected.text.strip():
        return "empty"
    if event.chosen.finish_reason == "content_filter":  # nobody is taught to say what the filter stopped
        return "unsafe"
    return "held_out" if is_held_out(event.prompt, heldout_ratio) else None


def reason_to_drop_thumb(event: FeedbackRecorded, heldout_ratio: float) -> Reason | None:
    """Why no step may use this thumb; None when one may."""
    if not event.completion.text.strip():
        return "empty"
    if event.rating > 0 and event.completion.finish_reason == "content_filter":
        return "unsafe"
    return "held_out" if is_held_out(event.prompt, heldout_ratio) else None


class Caps(msgspec.Struct, frozen=True):
    """How many verdicts one step takes at most, and how many of them of one person or cluster of prompts (0: any)."""

    size: int
    per_user: int = 0
    per_cluster: int = 0

    def of(self, verdicts: Iterable[Verdict]) -> list[Verdict]:
        """The first of ``verdicts`` that fit."""
        taken: list[Verdict] = []
        people, clusters = Counter[str](), Counter[str]()
        for verdict in verdicts:
            if len(taken) == self.size:
                break
            cluster = prompt_cluster(verdict.prompt)
            if _has_room(people[verdict.by], self.per_user) and _has_room(clusters[cluster], self.per_cluster):
                people[verdict.by] += 1
                clusters[cluster] += 1
                taken.append(verdict)
        return taken


def _has_room(count: int, most: int) -> bool:
    return not most or count < most


class Intake:
    """Takes preference events in the log's order and hands out batches."""

    def __init__(
        self,
        state: IntakeState,
        *,
        policy: str,
        heldout_ratio: float,
        heldout_window: int,
        replay_window: int,
        learns_ties: bool = False,
    ) -> None:
        self._policy, self._heldout_ratio, self._learns_ties = policy, heldout_ratio, learns_ties
        self._heldout_window, self._replay_window = heldout_window, replay_window
        self.offsets: Offsets = {topic: dict(partitions) for topic, partitions in state.offsets.items()}
        self.pending, self.replay = list(state.pending), list(state.replay)
        self.heldout, self.dropped = list(state.heldout), list(state.dropped)
        self.aged, self.regression, self.effects = list(state.aged), list(state.regression), list(state.effects)
        marks = range(0, len(state.marks), MARK_BYTES)
        self._seen = dict.fromkeys(state.marks[at : at + MARK_BYTES] for at in marks)

    def state(self) -> IntakeState:
        """A snapshot for the checkpoint."""
        return IntakeState(
            offsets={topic: dict(partitions) for topic, partitions in self.offsets.items()},
            pending=tuple(self.pending),
            replay=tuple(self.replay),
            heldout=tuple(self.heldout),
            aged=tuple(self.aged),
            regression=tuple(self.regression),
            effects=tuple(self.effects),
            dropped=tuple(self.dropped),
            marks=b"".join(self._seen),
        )

    def passed(self, entry: Entry) -> None:
        """``entry`` has been dealt with: reading goes on behind it."""
        position = entry.position
        self.offsets.setdefault(position.topic, {})[position.partition] = position.offset + 1

    def record(self, event: PreferenceRecorded, *, key_id: str = "") -> None:
        """A verdict: to be trained on, held out, or dropped with a reason. One seen before changes nothing.

        ``key_id``: what it was sealed with.
        """
        if (self._policy and event.policy != self._policy) or not self._see(event.event_id):
            return
        reason = reason_to_drop(event, self._heldout_ratio, learns_ties=self._learns_ties)
        if reason in (None, "held_out") and event.outcome == "chosen_rejected":
            shown = traits(event.chosen_position, event.chosen.text, event.rejected.text)
            self.effects = [*self.effects, shown][-EFFECTS_WINDOW:]
        if reason is None:
            self.pending.append(_verdict(event, key_id=key_id))
            return
        self.dropped.append((event.event_id, reason))
        if reason == "held_out":
            self.heldout = [*self.heldout, _verdict(event, key_id=key_id)][-self._heldout_window :]

    def record_thumb(self, event: FeedbackRecorded, *, key_id: str = "") -> None:
        """A thumb on a single answer: to be learned from, or dropped with a reason.

        In either case it takes the place of an earlier one of the same person on the same answer.
        """
        if (self._policy and event.policy != self._policy) or not self._see(event.event_id):
            return
        self._replace_thumb(event)
        if reason := reason_to_drop_thumb(event, self._heldout_ratio):
            self.dropped.append((event.event_id, reason))
            return
        self.pending.append(_thumb(event, key_id=key_id))

    def _replace_thumb(self, later: FeedbackRecorded) -> None:
        def is_replaced(verdict: Verdict) -> bool:
            is_same = (verdict.pair_id, verdict.user) == (later.completion_id, later.user)
            return is_same and verdict.thumb != 0

        self.dropped += [(verdict.preference_id, "retracted") for verdict in self.pending if is_replaced(verdict)]
        for verdicts in self._every_list():
            verdicts[:] = [verdict for verdict in verdicts if not is_replaced(verdict)]

    def unreadable(self, event: PreferenceRecorded | FeedbackRecorded) -> None:
        """A verdict of a person who is forgotten: dropped. One seen before changes nothing."""
        if (not self._policy or event.policy == self._policy) and self._see(event.event_id):
            self.dropped.append((event.event_id, "erased"))

    def erase(self, event: PersonErased) -> None:
        """A person is forgotten: nothing that they had given by then is used any more."""

        def is_theirs(verdict: Verdict) -> bool:
            return verdict.user == event.user and verdict.occurred_at <= event.occurred_at

        self.dropped += [(verdict.preference_id, "erased") for verdict in self.pending if is_theirs(verdict)]
        for verdicts in self._every_list():
            verdicts[:] = [verdict for verdict in verdicts if not is_theirs(verdict)]

    def retract(self, event: PreferenceRetracted) -> None:
        """Take a verdict back: never trained on if it still waits or is yet to come, and never again if it was.

        It may come before its verdict: that can lie in one router's outbox while another appends directly.
        """
        self._see(event.preference_id)
        waiting = [verdict for verdict in self.pending if verdict.preference_id == event.preference_id]
        self.dropped += [(verdict.preference_id, "retracted") for verdict in waiting]
        for verdicts in self._every_list():
            verdicts[:] = [v for v in verdicts if v.preference_id != event.preference_id]

    def _every_list(self) -> tuple[list[Verdict], ...]:
        return self.pending, self.replay, self.heldout, self.aged, self.regression

    def age(self, is_stale: Callable[[Verdict], bool]) -> None:
        """Waiting verdicts on answers that are too old only judge from now on."""
        stale = [verdict for verdict in self.pending if is_stale(verdict)]
        if stale:
            self.pending = [verdict for verdict in self.pending if not is_stale(verdict)]
            self.dropped += [(verdict.preference_id, "stale") for verdict in stale]
            self.aged = [*self.aged, *stale][-self._heldout_window :]

    def quarantine(self, preference_ids: Collection[str]) -> None:
        """No step can be taken on these: they are dropped, with a reason, and the others go on."""
        self.dropped += [(v.preference_id, "unusable") for v in self.pending if v.preference_id in preference_ids]
        for verdicts in self._every_list():
            verdicts[:] = [verdict for verdict in verdicts if verdict.preference_id not in preference_ids]

    def got_right(self, verdicts: Iterable[Verdict]) -> None:
        """A version got these right: later ones are asked again. Of what is too much a random part stays."""
        known = {verdict.preference_id: verdict for verdict in (*self.regression, *verdicts)}
        kept = sorted(known.values(), key=lambda verdict: hashlib.sha256(verdict.preference_id.encode()).digest())
        self.regression = kept[: self._heldout_window]

    def _see(self, preference_id: str) -> bool:
        """Whether it is seen for the first time."""
        mark = hashlib.blake2b(preference_id.encode(), digest_size=MARK_BYTES).digest()
        if mark in self._seen:
            return False
        self._seen[mark] = None
        if len(self._seen) > SEEN_IDS:
            del self._seen[next(iter(self._seen))]
        return True

    def next_batch(self, caps: Caps) -> list[Verdict]:
        """Waiting verdicts in the log's order, as many as fit. They stay waiting."""
        return caps.of(self.pending)

    def replayable(self, max_passes: int) -> list[Verdict]:
        """Verdicts trained on that may take part in a further step, oldest first."""
        return [verdict for verdict in self.replay if verdict.passes < max_passes]

    def waits_since(self) -> datetime | None:
        """When the verdict that has waited longest was given."""
        return min((verdict.occurred_at for verdict in self.pending), default=None)

    def cohort_weights(self) -> dict[str, float]:
        """By what a verdict of each cohort counts so that all count the same; the mean over what was seen lately is 1.

        No factor is above MOST_BALANCE or below its inverse: where hardly anybody is, one voice is not made a crowd.
        """
        counts = Counter(verdict.cohort for verdict in (*self.replay, *self.pending))
        even = counts.total() / max(1, len(counts))
        return {name: min(MOST_BALANCE, max(1 / MOST_BALANCE, even / count)) for name, count in counts.items()}

    def usable_ids(self) -> set[str]:
        """The verdicts that a later step or evaluation may still use."""
        return {verdict.preference_id for verdicts in self._every_list() for verdict in verdicts}

    def trained(self, batch: Iterable[Verdict], replayed: Iterable[Verdict] = ()) -> None:
        """A step was taken on new verdicts, which wait no longer and may be replayed, and on earlier ones."""
        again = {verdict.preference_id for verdict in replayed}
        self.replay = [_passed(verdict) if verdict.preference_id in again else verdict for verdict in self.replay]
        ids = {verdict.preference_id for verdict in batch}
        done = [verdict for verdict in self.pending if verdict.preference_id in ids]
        self.replay += [_passed(msgspec.structs.replace(verdict, tries=verdict.tries + 1)) for verdict in done]
        del self.replay[: max(0, len(self.replay) - self._replay_window)]
        self.pending = [verdict for verdict in self.pending if verdict.preference_id not in ids]

    def unlearned(self, preference_ids: Iterable[str]) -> None:
        """The weights that had learned these are gone: they wait again, or are dropped after two chances."""
        lost = dict.fromkeys(preference_ids)
        lost_ones = [verdict for verdict in self.replay if verdict.preference_id in lost]
        again = [msgspec.structs.replace(verdict, passes=0) for verdict in lost_ones if verdict.tries < MAX_TRIES]
        self.pending = [*again, *self.pending]
        waiting = {verdict.preference_id for verdict in self.pending}
        self.replay = [verdict for verdict in self.replay if verdict.preference_id not in lost]
        self.dropped += [(name, "refused") for name in lost if name not in waiting]


def _passed(verdict: Verdict) -> Verdict:
    return msgspec.structs.replace(verdict, passes=verdict.passes + 1)


def _verdict(event: PreferenceRecorded, *, key_id: str) -> Verdict:
    return Verdict(
        preference_id=event.event_id,
        pair_id=event.pair_id,
        user=event.user,
        occurred_at=event.occurred_at,
        prompt=event.prompt,
        chosen=event.chosen,
        rejected=event.rejected,
        trace=(event.trace_id, event.span_id),
        labeler=event.labeler,
        is_tie=event.outcome == "tie",
        position=event.chosen_position,
        cohort=event.cohort,
        key_id=key_id,
    )


def _thumb(event: FeedbackRecorded, *, key_id: str) -> Verdict:
    return Verdict(
        preference_id=event.event_id,
        pair_id=event.completion_id,
        user=event.user,
        occurred_at=event.occurred_at,
        prompt=event.prompt,
        chosen=event.completion,
        rejected=NO_ANSWER,
        trace=(event.trace_id, event.span_id),
        thumb=event.rating,
        key_id=key_id,
    )
