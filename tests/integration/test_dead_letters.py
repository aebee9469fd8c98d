"""``tiebreak dlq`` on both logs, with a real recorder: what could not be read is kept, shown, and comes back once."""

from __future__ import annotations

import pytest

from deploy.dlq import judged, replay_some, show_one
from telemetry.config import TelemetryConfig
from telemetry.dead_letters import LetterUnknown, letters
from telemetry.event_log import EventLog
from telemetry.events import PAIRS, PREFERENCES, encode
from telemetry.store import counts
from tests import examples
from tests.integration.recording import RecorderProcess, append, stored_ids, wait_for


def states(config: TelemetryConfig) -> dict[bytes, str]:
    """payload → what can be done about it."""
    return {each.letter.payload: each.state for each in judged(config.store_root, letters(config.store_root))}


def test_what_can_be_read_now_comes_back_once_and_the_rest_stays(
    config: TelemetryConfig, log: EventLog, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    garbage, misplaced = b'{"type":"FromTheFuture"}', examples.pair(1)
    for payload in (garbage, encode(misplaced)):
        log.append(PREFERENCES, "k", payload).result(timeout=30)
    with RecorderProcess(config):
        wait_for(lambda: len(letters(config.store_root)) == 2, "both are dead letters")
        assert states(config) == {garbage: "unreadable", encode(misplaced): "replayable"}

        assert replay_some(config, []) == 0
        wait_for(lambda: stored_ids(config)[misplaced.event_id] == 1, "the pair is stored")
        assert states(config)[encode(misplaced)] == "in the store"

        ids = {dead.payload: dead.id for dead in letters(config.store_root)}
        assert replay_some(config, [ids[encode(misplaced)]]) == 0
        assert replay_some(config, [ids[garbage]]) == 1
        after = examples.pair(2)
        append(log, after)
        wait_for(lambda: stored_ids(config)[after.event_id] == 1, "all before it is stored")
        assert stored_ids(config)[misplaced.event_id] == 1

    said = capfdbinary.readouterr().out
    assert b"is in the store already" in said and b"cannot read it either: not a known event" in said
    assert show_one(config, ids[garbage][:13]) == 0
    assert garbage in capfdbinary.readouterr().out


def test_a_verdict_that_was_taken_back_is_not_replayed(config: TelemetryConfig, log: EventLog) -> None:
    verdict = examples.preference(1)
    log.append(PAIRS, "k", encode(verdict)).result(timeout=30)  # misplaced
    retraction = examples.retraction(verdict)
    append(log, retraction)
    with RecorderProcess(config):
        wait_for(lambda: states(config) == {encode(verdict): "retracted"}, "a dead letter, taken back")
        wait_for(lambda: stored_ids(config)[retraction.event_id] == 1, "the retraction is stored")
        assert replay_some(config, [letters(config.store_root)[0].id]) == 0
        append(log, examples.pair(2))
        wait_for(lambda: counts(config.store_root)["pairs"] == 1, "all before it is stored")
    assert stored_ids(config)[verdict.event_id] == 0


def test_a_name_that_is_no_letters_is_refused(config: TelemetryConfig) -> None:
    with pytest.raises(LetterUnknown, match="tiebreak dlq list"):
        replay_some(config, ["0199"])
