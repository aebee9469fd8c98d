"""The loop: read the log, step when there are enough verdicts, checkpoint, tell, publish. Reads top to bottom.

Nothing is told before the checkpoint that holds it is on disk, and what a checkpoint holds untold is told
again after a restart, under the same event ids. So after ``kill -9`` at any point every verdict is in the
surviving weights once, and consumers that deduplicate see each event once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from torch import Tensor

from online_trainer import checkpoint, evaluate
from online_trainer.annotators import Annotators
from online_trainer.bias import measured, traits
from online_trainer.checkpoint import TrainerState
from online_trainer.config import TrainerConfig
from online_trainer.errors import IncompatibleAdapter, InvalidCheckpoint, UnusableExamples
from online_trainer.exam import Exam
from online_trainer.examples import Examples
from online_trainer.ingest import Caps, Intake, IntakeState, Verdict, opened, sealed
from online_trainer.learner import NOBODY, Example, Helpers, Learner
from online_trainer.lineage import Lineage
from online_trainer.objective import KNOW_TIES
from online_trainer.policy import Policy
from online_trainer.publish import Draft, VersionStore, derived_id
from online_trainer.safety import load_scorer
from online_trainer.tracking import Nobody, Tracker
from telemetry import metrics, tracing
from telemetry.crashpoints import reach
from telemetry.event_log import Entry, EventLog, LogUnavailable, Reader
from telemetry.events import (
    FEEDBACK,
    PREFERENCES,
    TOPIC_OF,
    VERSIONS,
    AnyEvent,
    BatchTrained,
    FeedbackRecorded,
    InvalidEvent,
    PersonErased,
    PreferenceRecorded,
    PreferenceRetracted,
    ReleaseChanged,
    decode,
    decode_from,
    encode,
    key_of,
    utc_now,
)
from telemetry.manifest import UntrustedVersion, base_version
from telemetry.people import Forgotten, KeysAway
from telemetry.sealing import Sealer

log = logging.getLogger("online_trainer")

POLL_ENTRIES = 256
POLL_S = 0.5
RETRY_S = 1.0
BEHIND_WAITS = 3.0  # publish_interval_s that a version waits for, at most, while verdicts wait for a step
MAX_RETREATS = 2  # to versions that users did not confirm, in a row
AHEAD_STEPS = 32  # full ones that wait in memory: from there on no more is read than is learned
MOST_NAMED = 20_000  # verdicts that a version names: an entry of the log holds a million bytes, an id takes 39
MOST_DROPS = 10_000  # that one event tells, with their reasons
RESETTING = frozenset({"rejected", "rolled_back"})
MEETING = frozenset({"canary", "stable"})  # a version that is forced is never canary


class Trainer:
    """One variant's learner between the log and the version store."""

    def __init__(
        self,
        config: TrainerConfig,
        policy: Policy,
        event_log: EventLog,
        store: VersionStore,
        *,
        folder: Path,
        base_digest: str,
        sealer: Sealer,
        tracker: Tracker | None = None,
        helpers: Helpers = NOBODY,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._config, self._policy, self._log, self._store = config, policy, event_log, store
        self._folder = folder / config.learning_digest if store.dataset else folder  # with other settings, another run
        self._base_digest, self._sealer, self._now = base_digest, sealer, now
        self._tracker = tracker or Nobody()
        scorer = load_scorer(config.safety_scorer, config.variant)
        self._examples = Examples(policy, config, base_version(base_digest), scorer)
        self._exam = Exam(policy, config, self._examples, scorer)
        self._learner = Learner(policy, config, self._exam.drift.kl_per_token, helpers)
        metrics.WENT_ASTRAY.labels(config.variant)  # from 0 on: an increase from nothing is none
        self._published_at: datetime | None = None  # the last version, or the last try at one
        self._learned_at = now()  # the last step on new verdicts
        self._oldest_drop_at: datetime | None = None
        self._unsaved: list[str] = []  # encoded events that no checkpoint has: they must not be told yet
        self._is_unsaved = False  # something that the next checkpoint must not wait for a step with
        self._has_erased = False  # since the last checkpoint: older ones know whom

        found = checkpoint.load_newest(self._folder)
        self._number, state, tensors = found or (0, self._fresh(), {})
        self._intake = _intake(config, opened(state.intake, sealer))
        self._annotators = Annotators(state.annotators)
        if state.flips is not None and config.estimates:
            self._learner.flips = state.flips
        self._lineage, self._untold, self._learner.step = state.lineage, list(state.untold), state.step
        if found:
            self._resume(state, tensors)

    @property
    def topics(self) -> tuple[str, ...]:
        """What is read of the log."""
        return (PREFERENCES, VERSIONS, *((FEEDBACK,) if self._config.thumb_weight else ()))

    # ---- life -------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event, on_ready: Callable[[], None]) -> None:
        """Learn until ``stop``; waits for a log or keys that are away; raises PositionLost or KeyUnusable."""
        while not stop.is_set():
            try:
                self._session(stop, on_ready)
            except (LogUnavailable, KeysAway) as error:
                log.warning("%s: trying again", error, extra={"action": "trainer_waits"})
                stop.wait(RETRY_S)

    def _session(self, stop: threading.Event, on_ready: Callable[[], None]) -> None:
        self.tell()
        reader = self._log.reader(self.topics, self._intake.state().offsets)
        try:
            on_ready()
            while not stop.is_set():
                self.turn(reader)
        finally:
            reader.close()

    def turn(self, reader: Reader, timeout_s: float = POLL_S) -> None:
        """One round: read what is there, then at most one step and at most one publication."""
        with self._quarantining():
            if self._published_at is None and self._has_news():  # after a restart: first what was about to be published
                self._read(reader, timeout_s)  # what refuses its parent may be there by now
                self._publish_news()
            self._step(reader, timeout_s)
            self._publish_news()

    def finish(self) -> str:
        """Learn a log that ends, each verdict as often as the settings say, and publish: the last version, or "".

        It is the only one, unless there are more verdicts than a version can name.
        """
        self.tell()
        reader, has_more = self._log.reader(self.topics, self._intake.state().offsets), True
        while has_more:
            with self._quarantining():
                has_more = self._step(reader, 0.0)
                if self._is_full() and not self._publish():
                    return ""  # nobody can judge them now
        is_judged = True
        while self._lineage.steps and is_judged:
            with self._quarantining():
                is_judged = self._publish()
        parent = self._lineage.parent
        return parent if is_judged and self._lineage.descends_from(parent) else ""

    @contextmanager
    def _quarantining(self) -> Iterator[None]:
        """What cannot be learned from is dropped, and the loop goes on."""
        try:
            yield
        except UnusableExamples as error:
            log.warning("%s", error, extra={"action": "examples_quarantined"})
            self._intake.quarantine(error.preference_ids)
            self._report_drops()

    def _step(self, reader: Reader, timeout_s: float) -> bool:
        """Read what is there, and take at most one step; False where there was nothing to do."""
        count, is_caught_up = self._read(reader, timeout_s)
        if batch := self._due_batch(is_caught_up=is_caught_up):
            self._train(batch, self._beside(batch))
        elif self._is_unsaved:
            self._commit([])
        elif self._is_due(self._oldest_drop_at, self._config.flush_s):
            self._report_drops()
        elif rehearsal := self._rehearsal(is_caught_up=is_caught_up):
            self._train([], rehearsal)
        else:
            return bool(count)
        return True

    def _read(self, reader: Reader, timeout_s: float) -> tuple[int, bool]:
        """Take what is there: how many entries, and whether those are all."""
        is_ahead = len(self._intake.pending) > AHEAD_STEPS * self._config.batch_pairs
        most = self._config.batch_pairs if is_ahead else POLL_ENTRIES  # never none: refusals, erasures get through
        entries = reader.poll(max_entries=most, timeout_s=timeout_s)
        for entry in entries:
            self._take(entry)
        metrics.TRAINER_LAG.set(reader.lag())
        return len(entries), len(entries) < most

    # ---- what comes in ----------------------------------------------------------------------------------------

    def _take(self, entry: Entry) -> None:
        try:
            event = decode_from(entry.position.topic, entry.payload)
        except InvalidEvent:  # the recorder keeps it in the dead-letter topic
            log.warning("entry skipped", extra={"action": "invalid_entry", "position": str(entry.position)})
        else:
            self._handle(event)
        self._intake.passed(entry)
        self._drops_wait()

    def _drops_wait(self) -> None:
        """Since when there is something to tell."""
        if self._intake.dropped and self._oldest_drop_at is None:
            self._oldest_drop_at = self._now()

    def _handle(self, event: AnyEvent) -> None:
        match event:
            case PreferenceRecorded() | FeedbackRecorded():
                self._record(event)
            case PersonErased():
                self._intake.erase(event)
                self._annotators.forget(event.user)
                self._examples.keep(self._intake.usable_ids())
                self._is_unsaved = self._has_erased = True
            case PreferenceRetracted():
                self._intake.retract(event)
            case ReleaseChanged() if event.variant == self._config.variant and event.state in RESETTING:
                if self._lineage.descends_from(event.version):
                    sound = self._sound(event)
                    self._fall_back(sound)
                    if sound == event.stable:  # users have it: what it leads to is counted anew
                        self._lineage = self._lineage.started_anew()
            case ReleaseChanged() if event.variant == self._config.variant and event.state in MEETING:
                if self._lineage.descends_from(event.version):
                    self._lineage = self._lineage.accepted(event.version)
                if event.state == "stable":
                    self._anchor_at(event.version)

    def _record(self, event: PreferenceRecorded | FeedbackRecorded) -> None:
        key_id = event.sealed.key_id if event.sealed else ""
        try:
            opened = self._sealer.open(event)
        except Forgotten:
            self._intake.unreadable(event)
            return
        if isinstance(opened, FeedbackRecorded):
            self._intake.record_thumb(opened, key_id=key_id)
        else:
            self._intake.record(opened, key_id=key_id)

    def _sound(self, refused: ReleaseChanged) -> str:
        """The version to go back to.

        One that nobody met takes only itself away, unless its forebears have led astray again and again; one that
        users met takes all away that was learned since stable.
        """
        is_alone = refused.state == "rejected" and self._lineage.retreats < MAX_RETREATS
        return (is_alone and self._lineage.before(refused.version)) or refused.stable

    def _due_batch(self, *, is_caught_up: bool) -> list[Verdict]:
        """The next step's new verdicts: a full batch, or what there is once the oldest has waited long enough."""
        self._intake.age(lambda verdict: self._distance(verdict) > self._config.stale_versions)
        self._drops_wait()
        if self._is_full():
            return []
        batch = self._intake.next_batch(self._caps(self._config.batch_pairs))
        is_full = len(batch) == self._config.batch_pairs
        has_waited = is_caught_up and self._is_due(self._intake.waits_since(), self._config.flush_s)
        return batch if is_full or (batch and has_waited) else []

    def _beside(self, batch: list[Verdict]) -> list[Verdict]:
        """Earlier verdicts for the same step. Where more new ones wait there are none: those first."""
        is_behind = len(self._intake.pending) > len(batch)
        return [] if is_behind else self._earlier(self._config.replay_pairs)

    def _rehearsal(self, *, is_caught_up: bool) -> list[Verdict]:
        """Earlier verdicts for a step of their own, where nothing new has come for a while."""
        is_idle = is_caught_up and not self._intake.pending
        if not (is_idle and self._is_due(self._learned_at, self._config.rehearse_s)) or self._is_rehearsed():
            return []
        return self._earlier(self._config.batch_pairs)

    def _is_rehearsed(self) -> bool:
        """Whether going over earlier verdicts once more teaches nothing: all were, or the budget is used up."""
        return not self._intake.replayable(self._config.max_passes) or self._learner.is_at_the_edge()

    def _earlier(self, count: int) -> list[Verdict]:
        """Those first that have been seen least; of one user no more than in any step."""
        config = self._config
        shuffled = self._learner.shuffled(self._intake.replayable(config.max_passes))
        return self._caps(count).of(sorted(shuffled, key=lambda verdict: verdict.passes))

    def _caps(self, size: int) -> Caps:
        return Caps(size, self._config.max_pairs_per_user, self._config.max_pairs_per_cluster)

    def _distance(self, verdict: Verdict) -> int:
        """How many versions the weights are ahead of the newer of its two answers."""
        sides = [side.version for side in (verdict.chosen, verdict.rejected) if side.variant == self._config.variant]
        return self._lineage.distance(sides) if sides else 0

    def _is_due(self, since: datetime | None, after_s: float) -> bool:
        """Whether ``after_s`` have passed; also where a clock was set back, or is behind another, by more."""
        return since is not None and abs(self._now() - since) >= timedelta(seconds=after_s)

    # ---- a step -----------------------------------------------------------------------------------------------

    def _train(self, batch: list[Verdict], replayed: list[Verdict]) -> None:
        """One step on the new verdicts ``batch`` and earlier ones. Raises UnusableExamples, and then none was taken."""
        with tracing.span("train step", linked=[verdict.trace for verdict in batch]) as span:
            trace_id, span_id = tracing.ids(span)
            values, agreement = self._learner.learn(self._counting([*batch, *replayed]), is_rehearsal=not batch)
        reach("trainer.stepped")
        for verdict in batch:
            if verdict.preference_id in agreement and not verdict.tries:  # of a second chance its giver knew nothing
                self._annotators.saw(verdict.by, agreement[verdict.preference_id])
        for verdict in batch:
            if verdict.trace[0]:  # a mark in the verdict's own trace, so that one trace leads from click to version
                tracing.record("trained", within=tracing.parent(*verdict.trace), linked=[(trace_id, span_id)])
        self._intake.trained(batch, replayed)
        self._learned_at = self._now() if batch else self._learned_at
        self._examples.keep(self._intake.usable_ids())
        self._lineage = self._lineage.learned(batch)
        event = BatchTrained(
            event_id=derived_id(f"trained/{self._batch_id}/{'/'.join(v.preference_id for v in [*batch, *replayed])}"),
            trace_id=trace_id,
            span_id=span_id,
            batch_id=self._batch_id,
            variant=self._config.variant,
            step=self._learner.step,
            preference_ids=tuple(verdict.preference_id for verdict in batch),
            replayed_ids=tuple(verdict.preference_id for verdict in replayed),
            traces=tuple(verdict.trace for verdict in batch if verdict.trace[0]),
            dropped=self._drops(),
            metrics=values,
        )
        self._commit([event])
        self._count(batch, values)

    def _counting(self, verdicts: Sequence[Verdict]) -> list[Example]:
        """The examples of ``verdicts``, with what is known of their givers, positions and age by now."""
        config, effects = self._config, measured(self._intake.effects)
        cohorts = self._intake.cohort_weights() if config.balances_cohorts else {}
        examples: list[Example] = []
        for verdict, example in zip(verdicts, self._examples.of(verdicts), strict=True):
            shown = traits(verdict.position, verdict.chosen.text, verdict.rejected.text)
            explained = 0.0 if verdict.is_tie or verdict.thumb else effects.of(shown, config.debias)
            weight = self._annotators.weight(verdict.by) if config.weighs_people else 1.0
            weight *= config.thumb_weight if verdict.thumb else 1.0
            weight *= cohorts.get(verdict.cohort, 1.0)
            is_stale = self._distance(verdict) > config.fresh_versions
            offset = config.safety_weight * example.safety_gap - explained
            examples.append(example._replace(weight=weight, offset=offset, is_stale=is_stale))
        return examples

    def _report_drops(self) -> None:
        dropped = self._drops()
        event = BatchTrained(
            event_id=derived_id(f"dropped/{self._config.variant}/{'/'.join(name for name, _ in dropped)}"),
            batch_id=self._batch_id,
            variant=self._config.variant,
            step=self._learner.step,
            preference_ids=(),
            dropped=dropped,
        )
        self._commit([event])

    def _drops(self) -> tuple[tuple[str, str], ...]:
        """Verdicts that no step will use and that nobody was told of yet; they count as told now."""
        dropped, self._intake.dropped = tuple(self._intake.dropped[:MOST_DROPS]), self._intake.dropped[MOST_DROPS:]
        self._oldest_drop_at = self._oldest_drop_at if self._intake.dropped else None
        for _, reason in dropped:
            metrics.PAIRS_DROPPED.labels(self._config.variant, reason).inc()
        return dropped

    @property
    def _batch_id(self) -> str:
        return f"{self._config.variant}/{self._learner.step:06d}"

    def _count(self, batch: list[Verdict], values: dict[str, float]) -> None:
        variant = self._config.variant
        metrics.STEPS.labels(variant).inc()
        metrics.PAIRS_TRAINED.labels(variant).inc(len(batch))
        if batch:
            ages = sorted((self._now() - verdict.occurred_at).total_seconds() for verdict in batch)
            metrics.LABEL_AGE.labels(variant).set(ages[len(ages) // 2])
        for name, value in values.items():
            metrics.TRAIN_VALUE.labels(variant, name).set(value)
        self._tracker.stepped(self._learner.step, values)
        ids = {"action": "step_taken", "step": self._learner.step, "pairs": len(batch), "kl": round(values["kl"], 4)}
        log.info("trained", extra=ids | {"margin": round(values["rewards/margins"], 4)})

    # ---- a version --------------------------------------------------------------------------------------------

    def _publish(self) -> bool:
        """Evaluate, write into the store, record in a checkpoint, tell: in this order. Or go back, as a guard says.

        False where a guard can say nothing: then the weights stay, unpublished, until the next try.
        """
        values = self._exam.values(self._learner, self._intake)
        if why := evaluate.astray(values, self._config):
            log.warning("not published: %s", why, extra={"action": "went_astray", "step": self._learner.step})
            metrics.WENT_ASTRAY.labels(self._config.variant).inc()
            self._retreat()
            self._commit([])
            return True
        if why := evaluate.unjudged(values, self._config):
            log.warning(
                "not published yet: %s; mend it", why, extra={"action": "not_judged", "step": self._learner.step}
            )
            self._published_at, self._is_unsaved = self._now(), True  # it may have been shrunk for the exam
            return False
        draft = Draft(
            parent=self._lineage.parent,
            base_digest=self._base_digest,
            step=self._learner.step,
            preference_ids=self._lineage.preference_ids,
            metrics=values,
            created_at=self._now(),
        )
        version, manifest = self._store.write(draft, self._policy.tensors())
        reach("publisher.written")
        event = self._store.announcement(version, manifest, self._lineage.oldest_verdict_at)
        self._lineage, self._published_at = self._lineage.published(version), self._now()
        self._commit([event])
        self._tracker.published(version, manifest, self._store.folder(version))
        if "heldout_win_rate" in draft.metrics:
            win_rate = draft.metrics["heldout_win_rate"]
            metrics.HELDOUT_WIN_RATE.labels(self._config.variant, version).set(win_rate)
        log.info("published", extra={"action": "version_published", "version": version, **draft.metrics})
        return True

    def _publish_news(self) -> None:
        if self._has_news() and self._may_publish():
            self._publish()

    def _retreat(self) -> None:
        """Weights went astray: back to their parent.

        It may lead astray itself: after MAX_RETREATS, to the last version before it that users met, or to the base.
        """
        parent = self._lineage.parent
        if self._lineage.retreats < MAX_RETREATS:
            self._fall_back(parent)
        else:
            self._fall_back(self._lineage.met_before(parent) or base_version(self._base_digest))
            self._lineage = self._lineage.started_anew()

    def _has_news(self) -> bool:
        """Whether the weights know a verdict that no version knows, or have gone over the earlier ones to the end."""
        return bool(self._lineage.preference_ids) or (self._lineage.steps > 0 and self._is_rehearsed())

    def _is_full(self) -> bool:
        """Whether the weights know as many verdicts beyond their parent as a version can name."""
        return len(self._lineage.preference_ids) + self._config.batch_pairs > MOST_NAMED

    def _may_publish(self) -> bool:
        """Whether the last version is old enough; while a full step waits, new verdicts come first for a while."""
        if self._published_at is None:
            return True
        size = self._config.batch_pairs
        is_behind = not self._is_full() and len(self._intake.next_batch(self._caps(size))) == size
        return self._is_due(self._published_at, self._config.publish_interval_s * (BEHIND_WAITS if is_behind else 1.0))

    def _anchor_at(self, version: str) -> None:
        """Users' stable version changed: where preferences are measured against that, take it over."""
        if self._config.reference != "promoted":
            return
        try:
            self._policy.anchor_at(self._store.read(version))
        except (FileNotFoundError, UntrustedVersion):  # the base, or not ours
            self._policy.anchor_at(None)
        except IncompatibleAdapter as error:
            log.warning(
                "stable is %s now, and preferences are still measured against the reference from before: %s; give "
                "[trainer] its rank, layers and targets, or wait until a version of this trainer is stable",
                version, error, extra={"action": "reference_unusable", "version": version},
            )  # fmt: skip

    def _fall_back(self, sound: str) -> None:
        """A version that the weights descend from was refused: go back to a sound one, or to the base."""
        sound = self._replace_weights(sound)
        self._lineage, lost = self._lineage.fallen_back(sound)
        self._intake.unlearned(lost)
        self._drops_wait()
        self._learner.weights_replaced()
        log.info("fell back", extra={"action": "weights_reset", "version": sound})

    def _replace_weights(self, sound: str) -> str:
        """Load ``sound``, or the newest of its ancestors that can be loaded, or the base: which it was."""
        base = base_version(self._base_digest)
        while sound != base:
            try:
                tensors = self._store.read(sound)
                self._policy.load(tensors)
            except (FileNotFoundError, UntrustedVersion, IncompatibleAdapter) as error:
                sound, unusable = self._lineage.before(sound) or base, sound
                ids = {"action": "sound_version_unusable", "version": unusable}
                log.warning("%s cannot be gone back to (%s); to %s instead", unusable, error, sound, extra=ids)
            else:
                self._follow(tensors)
                return sound
        self._policy.reset()
        self._follow(None)
        return base

    def _follow(self, tensors: Mapping[str, Tensor] | None) -> None:
        """The weights were replaced: a reference that followed the old ones begins anew from the new ones."""
        if self._config.reference == "ema":
            self._policy.anchor_at(tensors)

    # ---- what must survive ------------------------------------------------------------------------------------

    def _commit(self, events: Sequence[AnyEvent]) -> None:
        """Make the present state durable, with ``events`` in it, and then tell them."""
        self._unsaved += [encode(event).decode() for event in events]
        self._is_unsaved = True  # keys may be away: then the next turn tries again
        self._number += 1
        tensors = self._policy.tensors() | checkpoint.optimizer_tensors(self._learner.optimizer)
        tensors |= checkpoint.anchor_tensors(self._policy.anchor)
        kept = 1 if self._has_erased else self._config.keep_checkpoints
        checkpoint.save(self._folder, self._number, self._state(), tensors, kept)
        self._untold, self._unsaved = [*self._untold, *self._unsaved], []
        self._is_unsaved = self._has_erased = False
        reach("trainer.checkpointed")
        self.tell()
        reach("trainer.told")

    def tell(self) -> None:
        """Append what was not told yet, and wait until it is durable; raises LogUnavailable."""
        events = [decode(text.encode()) for text in self._untold]
        futures = [self._log.append(TOPIC_OF[type(e)], key_of(e), encode(e)) for e in events]
        for future in futures:
            future.result()
        self._untold = []

    def _state(self) -> TrainerState:
        return TrainerState(
            base_digest=self._base_digest,
            step=self._learner.step,
            lineage=self._lineage,
            intake=sealed(self._intake.state(), self._sealer),
            annotators=self._annotators.records(),
            flips=self._learner.flips if self._config.estimates else None,
            untold=(*self._untold, *self._unsaved),
        )

    def _fresh(self) -> TrainerState:
        lineage = Lineage(base_version(self._base_digest))
        return TrainerState(base_digest=self._base_digest, lineage=lineage)

    def _resume(self, state: TrainerState, tensors: dict[str, Tensor]) -> None:
        """Go on from a checkpoint; raises InvalidCheckpoint where it is of another base or other settings."""
        if state.base_digest != self._base_digest:
            raise InvalidCheckpoint(f"{self._folder} was trained on another base model; move it away to start anew")
        try:
            self._policy.load({k: v for k, v in tensors.items() if not k.startswith(("optimizer.", "anchor."))})
        except IncompatibleAdapter as error:
            raise InvalidCheckpoint(f"{self._folder}: {error}; restore the settings or move it away") from error
        checkpoint.load_optimizer(self._learner.optimizer, tensors)
        try:
            self._policy.anchor_at(checkpoint.load_anchor(tensors))
        except IncompatibleAdapter as error:
            log.warning("%s; preferences are measured against the base", error, extra={"action": "reference_unusable"})
        self._drops_wait()
        self._announce_unannounced()

    def _announce_unannounced(self) -> None:
        """A version was written, and then the trainer died before its checkpoint: it is announced now."""
        lineage = self._lineage
        if not lineage.steps:
            return
        found = self._store.unannounced(lineage.parent, self._learner.step, lineage.preference_ids)
        if found is None:
            return
        version, manifest = found
        event = self._store.announcement(version, manifest, lineage.oldest_verdict_at)
        self._policy.load(self._store.read(version))  # it may have been shrunk after the checkpoint
        if self._config.estimates:
            self._learner.flips = manifest.metrics.get("flip_rate", self._learner.flips)
        self._lineage = lineage.published(version)
        self._untold.append(encode(event).decode())
        self._tracker.published(version, manifest, self._store.folder(version))
        self._is_unsaved = True


def _intake(config: TrainerConfig, state: IntakeState) -> Intake:
    return Intake(
        state,
        policy=config.policy,
        heldout_ratio=config.heldout_ratio,
        heldout_window=config.heldout_window,
        replay_window=config.replay_window,
        learns_ties=config.objective in KNOW_TIES,
    )
