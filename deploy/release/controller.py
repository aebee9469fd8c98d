"""The release controller's loop: log, replicas, probes and commands in; routing table and ReleaseChanged out.

All decisions are ``machine``'s. Every round is saved together with the places in the log, so that a controller
that dies repeats what it had not saved and nothing else; what it announces is kept until the log has it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import redis
from msgspec.structs import replace

from deploy.release import report
from deploy.release.config import ReleaseConfig
from deploy.release.intake import (
    InvalidCommand,
    addressee,
    asked_of,
    inputs_of,
    is_answering,
    parse_command,
    ready_versions,
)
from deploy.release.machine import advance, configured, due_probe, initial
from deploy.release.probes import Prober, Question
from deploy.release.state import Change, Commanded, Input, Tick, VariantState, World
from deploy.release.store import HistoryEntry, LeaseLost, ReleaseStore, Saved, history_entry
from telemetry.event_log import Entry, EventLog, LogUnavailable, Offsets, PositionLost, Reader
from telemetry.events import (
    COMPLETIONS,
    PREFERENCES,
    VERSIONS,
    AnyEvent,
    InvalidEvent,
    ReleaseChanged,
    decode_from,
    encode,
    key_of,
)
from telemetry.routing import ReplicaTable, RoutingTable

log = logging.getLogger(__name__)

TOPICS = (COMPLETIONS, PREFERENCES, VERSIONS)
EVIDENCE_TOPICS = (COMPLETIONS, PREFERENCES)
ANNOUNCE_S = 10.0
MAX_ENTRIES = 500  # read in one round
SEEN_EVENTS = 8192  # remembered while this process leads: a repeated append comes soon after the first
SAVE_EVERY_S = 1.0  # evidence alone is saved no more often: it can be read again
AWAY = (redis.RedisError, LogUnavailable, LeaseLost, TimeoutError)


class Controller:
    """Leads while it holds the lease, stands by otherwise."""

    def __init__(
        self,
        config: ReleaseConfig,
        base_versions: Mapping[str, str],
        event_log: EventLog,
        store: ReleaseStore,
        prober: Prober,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._base_versions = base_versions
        self._log = event_log
        self._store = store
        self._prober = prober
        self._clock = clock
        self._saved: Saved | None = None
        self._written: Saved | None = None  # as it lies in Redis
        self._written_at_s = 0.0
        self._reader: Reader | None = None
        self._seen: dict[str, None] = {}  # ids of the latest events, oldest first
        self._asked_s: dict[str, float] = {}  # by variant: when a user's answer was last heard of
        self._caught_up_s = math.inf  # since when the log has been read to its end
        self._revision = 0  # the highest that this process has published

    def run(self, stop: threading.Event, on_ready: Callable[[], None]) -> None:
        """Until ``stop``. ``on_ready`` is called once, when there is a routing table, be it another leader's."""
        is_announced = False
        while not stop.is_set():
            try:
                leads = self.tick()
                if not is_announced and (leads or self._store.routing_revision() >= 0):
                    on_ready()
                    is_announced = True
            except AWAY as error:
                self._forget()
                log.warning("starting over: %s", error, extra={"action": "release_interrupted"})
            stop.wait(self._config.tick_s)
        self.close()

    def tick(self) -> bool:
        """One round; False while another controller leads."""
        if not self._store.hold_lease():
            self._forget()
            return False
        saved, reader = self._resume()
        entries = reader.poll(max_entries=MAX_ENTRIES, timeout_s=0.0)
        self._caught_up_s = min(self._caught_up_s, self._clock()) if len(entries) < MAX_ENTRIES else math.inf
        commands = self._store.commands()
        told = [event for entry in entries if (event := _read(entry)) and self._is_new(event.event_id)]
        for event in told:
            report.count(event)
            if variant := asked_of(event):
                self._asked_s[variant] = self._clock()
        inputs = [item for event in told if (item := inputs_of(event))]
        inputs += self._prober.results()
        inputs += [(addressee(saved.variants, item.version), item) for item in _parse(commands)]
        worlds = self._worlds(saved.variants, self._store.replicas())
        variants, changes = self._advance(saved.variants, inputs, worlds)
        saved = replace(saved, variants=variants, offsets=_after(saved.offsets, entries))
        self._commit(saved, changes, commands_taken=len(commands))
        self._ask(variants, worlds)
        return True

    def _is_new(self, event_id: str) -> bool:
        """False for an event that was read before: whoever was not sure that an append arrived has appended again."""
        if event_id in self._seen:
            return False
        self._seen[event_id] = None
        if len(self._seen) > SEEN_EVENTS:
            del self._seen[next(iter(self._seen))]
        return True

    def close(self) -> None:
        """Hand the lease over and free the reader."""
        self._prober.close()
        self._forget()
        try:
            self._store.release_lease()
        except redis.RedisError as error:
            log.warning("the lease will expire by itself: %s", error, extra={"action": "lease_not_released"})

    def _resume(self) -> tuple[Saved, Reader]:
        """What is known, from Redis at the start and after every interruption."""
        if self._saved is not None and self._reader is not None:
            return self._saved, self._reader
        loaded = self._store.load() or Saved()
        self._revision = max(self._revision, loaded.revision, self._store.routing_revision())
        saved = replace(loaded, variants=reconcile(loaded.variants, self._config, self._base_versions))
        self._reader, saved = self._open_reader(saved)
        saved = self._save(saved)
        report.start(saved.variants)
        report.show_channels(saved.variants)
        return self._announce(saved), self._reader

    def _open_reader(self, saved: Saved) -> tuple[Reader, Saved]:
        """A reader where the last one stopped. Evidence that retention took is gone; a lost version log halts."""
        reader = self._log.reader(TOPICS, saved.offsets)
        try:
            reader.poll(max_entries=1, timeout_s=0.0)
        except PositionLost as error:
            log.warning("old evidence is gone: %s", error, extra={"action": "evidence_lost"})
            kept = {name: found for name, found in saved.offsets.items() if name not in EVIDENCE_TOPICS}
            saved = replace(saved, offsets=kept)
        reader.close()
        return self._log.reader(TOPICS, saved.offsets), saved

    def _advance(
        self,
        variants: dict[str, VariantState],
        inputs: list[tuple[str, Input]],
        worlds: Mapping[str, World],
    ) -> tuple[dict[str, VariantState], list[tuple[str, Change]]]:
        variants, changes = dict(variants), list[tuple[str, Change]]()
        for name, event in [*inputs, *((name, Tick()) for name in variants)]:
            if name in variants:
                variants[name], made = advance(variants[name], event, worlds[name], self._config)
                changes += [(name, change) for change in made]
        return variants, changes

    def _worlds(self, variants: Mapping[str, VariantState], table: ReplicaTable | None) -> dict[str, World]:
        now_s, stale_s = self._clock(), self._config.fleet_stale_s
        for name, state in variants.items():
            if is_answering(table, state.route, now_s, stale_s):
                self._asked_s[name] = now_s
        return {
            name: World(
                now_s,
                ready_versions(table, state.route.base, now_s, stale_s),
                asked_s=max(self._caught_up_s, self._asked_s.get(name, 0.0)),
            )
            for name, state in variants.items()
        }

    def _commit(self, saved: Saved, changes: list[tuple[str, Change]], *, commands_taken: int) -> None:
        """Save, then tell; evidence alone is saved now and then."""
        is_due = saved != self._written and self._clock() - self._written_at_s >= SAVE_EVERY_S
        if not (changes or commands_taken or is_due):
            self._saved = saved
            return
        history = [history_entry(name, change) for name, change in changes]
        announced = tuple(_event(name, change) for name, change in changes if change.state != "refused")
        saved = replace(saved, outbox=(*saved.outbox, *announced))
        saved = self._save(saved, commands_taken=commands_taken, history=history)
        for name, change in changes:
            report.report(name, change, self._clock())
        report.show_channels(saved.variants)
        self._announce(saved)

    def _save(self, saved: Saved, *, commands_taken: int = 0, history: Sequence[HistoryEntry] = ()) -> Saved:
        """State, routing table and history in one transaction; the revision grows when a route changes."""
        if self._written is None or _routes(self._written) != _routes(saved):
            self._revision += 1
        saved = replace(saved, revision=self._revision)
        table = routing_table(saved, self._config)
        self._store.save(saved, table, commands_taken=commands_taken, history=history)
        self._saved = self._written = saved
        self._written_at_s = self._clock()
        return saved

    def _announce(self, saved: Saved) -> Saved:
        """The outbox into the log. It is saved until then; what is told twice has the same event_id."""
        futures = [self._log.append(VERSIONS, key_of(event), encode(event)) for event in saved.outbox]
        for future in futures:
            future.result(timeout=ANNOUNCE_S)
        self._saved = replace(saved, outbox=())
        return self._saved

    def _ask(self, variants: Mapping[str, VariantState], worlds: Mapping[str, World]) -> None:
        for policy, members in self._config.policies.items():
            for member in members:
                version = due_probe(variants[member.variant], worlds[member.variant], self._config)
                if version:
                    self._prober.ask(
                        Question(
                            policy=policy,
                            variant=member.variant,
                            version=version,
                            temperature=member.temperature,
                            top_p=member.top_p,
                        )
                    )

    def _forget(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._saved, self._written, self._reader = None, None, None
        self._asked_s, self._caught_up_s = {}, math.inf
        self._seen.clear()  # what was read since the last save is read again


def reconcile(
    variants: Mapping[str, VariantState], config: ReleaseConfig, base_versions: Mapping[str, str]
) -> dict[str, VariantState]:
    """Saved variants as the configuration has them now; a variant whose base changed starts anew."""
    result = {}
    for member in (member for members in config.policies.values() for member in members):
        fresh = initial(member, base_versions[member.base])
        state = variants.get(member.variant, fresh)
        if state.route.base_version != fresh.route.base_version:
            state = fresh
        route = configured(state.route, member)
        # a trial that an older program saved in another form is not known here: its version leaves the route
        route = route if state.shadow else replace(route, shadow="")
        route = route if state.canary else replace(route, canary="", canary_ratio=0.0)
        result[member.variant] = replace(state, route=route)
    return result


def routing_table(saved: Saved, config: ReleaseConfig) -> RoutingTable:
    """What router and serving read."""
    policies = {
        policy: tuple(saved.variants[member.variant].route for member in members)
        for policy, members in config.policies.items()
    }
    return RoutingTable(saved.revision, policies)


def _routes(saved: Saved) -> list[object]:
    return [state.route for state in saved.variants.values()]


def _read(entry: Entry) -> AnyEvent | None:
    try:
        return decode_from(entry.position.topic, entry.payload)
    except InvalidEvent as error:  # the recorder keeps it as a dead letter
        log.warning("skipped an entry: %s", error, extra={"action": "entry_skipped"})
        return None


def _parse(payloads: list[bytes]) -> list[Commanded]:
    commands = []
    for payload in payloads:
        try:
            commands.append(parse_command(payload))
        except InvalidCommand as error:
            log.error("%s", error, extra={"action": "command_invalid"})
    return commands


def _after(offsets: Offsets, entries: list[Entry]) -> Offsets:
    """Where to read on after ``entries``."""
    after = {topic: dict(partitions) for topic, partitions in offsets.items()}
    for entry in entries:
        position = entry.position
        after.setdefault(position.topic, {})[position.partition] = position.offset + 1
    return after


def _event(variant: str, change: Change) -> ReleaseChanged:
    assert change.state != "refused", "a refusal moves no version"
    return ReleaseChanged(
        variant=variant,
        version=change.version,
        state=change.state,
        stable=change.stable,
        reason=change.reason,
        actor=change.actor,
        evidence=change.evidence,
    )
