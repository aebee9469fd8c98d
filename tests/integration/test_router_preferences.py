"""Verdicts over HTTP on a real Redis: once per pair, durable before acknowledged, whatever comes twice or fails."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from router.pairs import Ticket, preference_id, pseudonym, sign_ticket
from telemetry import tracing
from telemetry.config import TelemetryConfig, open_log
from telemetry.event_log import EventLog, LogUnavailable, Offsets, Position, Reader
from telemetry.events import (
    PREFERENCES,
    FeedbackRecorded,
    PairShown,
    PreferenceRecorded,
    PreferenceRetracted,
)
from telemetry.labeling import labeler_name
from telemetry.process import signing_key
from tests.router_stack import STABLE, Stack, fast, running_stack
from tests.servers import RedisServer


@pytest.fixture(params=["embedded log", "another log"])
async def stack(telemetry_config: TelemetryConfig, request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    """A verdict is claimed and appended in one step, or in two."""
    log = None if request.param == "embedded log" else open_log(telemetry_config)
    async with running_stack(telemetry_config, event_log=log) as running:
        yield running


class BrokenLog:
    """A real log whose preference appends fail with ``error`` until it is mended."""

    def __init__(self, real: EventLog, error: Exception) -> None:
        self._real = real
        self._error = error
        self.is_broken = True

    def append(self, topic: str, key: str, payload: bytes) -> Future[Position]:
        if self.is_broken and topic == PREFERENCES:
            failed: Future[Position] = Future()
            failed.set_exception(self._error)
            return failed
        return self._real.append(topic, key, payload)

    def append_all(self, entries: Iterable[tuple[str, str, bytes]]) -> list[Future[Position]]:
        return [self.append(*entry) for entry in entries]

    def reader(self, topics: Sequence[str], start: Offsets) -> Reader:
        return self._real.reader(topics, start)

    def close(self) -> None:
        self._real.close()


async def test_a_click_is_answered_with_a_receipt_that_reveals_the_versions(stack: Stack) -> None:
    answer = await stack.pair()
    status, receipt = await stack.click(answer, "a")
    assert status == 201
    assert receipt["id"] == preference_id(answer["preference"]["pair_id"])
    assert (receipt["status"], receipt["choice"], receipt["replayed"]) == ("accepted", "a", False)
    assert receipt["durable"] == "log"
    assert receipt["revealed"] == {
        side: {"variant": "chat-main", "version": STABLE, "channel": "stable"} for side in ("a", "b")
    }
    assert receipt["links"]["self"] == f"/v1/preferences/{receipt['id']}"


async def test_the_span_of_a_verdict_names_its_pair_and_its_receipt(stack: Stack) -> None:
    spans = InMemorySpanExporter()
    provider = tracing.configure("tests", exporter=spans)
    try:
        answer = await stack.pair()
        _, receipt = await stack.click(answer, "a")
        provider.force_flush()
    finally:
        tracing.configure("tests")
        provider.shutdown()
    [verdict] = [span.attributes for span in spans.get_finished_spans() if span.name == "verdict"]
    assert verdict == {"preference.pair_id": answer["preference"]["pair_id"], "preference.id": receipt["id"]}


@pytest.mark.parametrize(
    ("choice", "outcome", "position", "chosen"),
    [
        ("a", "chosen_rejected", "a", 0),
        ("b", "chosen_rejected", "b", 1),
        ("tie", "tie", "", 0),
        ("both_bad", "both_bad", "", 0),
        ("skip", "skip", "", 0),
    ],
)
async def test_a_verdict_becomes_an_event_that_is_whole_in_itself(
    stack: Stack, choice: str, outcome: str, position: str, chosen: int
) -> None:
    answer = await stack.pair(logprobs=True)
    details = {"reasons": ["clear"], "comment": "good", "quality": 4, "edited": "better", "source": "simulated"}
    await stack.click(answer, choice, **details)
    [event] = await stack.events(PreferenceRecorded, expected=1)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert (event.outcome, event.chosen_position) == (outcome, position)
    assert (event.chosen.text, event.rejected.text) == (texts[chosen], texts[1 - chosen])
    assert (event.chosen.version, event.propensity) == (STABLE, 1.0)
    assert len(event.chosen.token_ids) == len(event.chosen.logps) == event.chosen.completion_tokens
    assert event.prompt[0].content == "Say something"
    assert (event.reasons, event.comment, event.quality, event.edited) == (("clear",), "good", 4, "better")
    assert event.source == "simulated" and event.decided_s > 0
    assert event.user == pseudonym(signing_key(stack.telemetry.state_path), "ann")


async def test_a_labeler_is_known_by_the_name_that_imports_give(stack: Stack) -> None:
    labeled, plain = await stack.pair(), await stack.pair()
    details = {"source": "labeler", "labeler": "eva@example.org"}
    assert (await stack.click(labeled, "a", **details))[0] == 201
    assert (await stack.click(labeled, "a", **details))[0] == 200, "the same verdict again"
    assert (await stack.click(labeled, "b", **details))[0] == 409
    assert (await stack.click(plain, "a", labeler=""))[0] == 201
    event, nobodys = await stack.events(PreferenceRecorded, expected=2)
    assert event.labeler == labeler_name(signing_key(stack.telemetry.state_path), "eva@example.org")
    assert nobodys.labeler == ""
    kept = await stack.redis.hgetall(f"tiebreak:verdict:{event.pair_id}")  # type: ignore[misc]
    assert kept
    assert "eva" not in f"{kept}{event}"


async def test_a_side_that_a_stop_string_ended_says_so(stack: Stack) -> None:
    await stack.click(await stack.pair(stop=["say"]))
    await stack.click(await stack.pair())
    clipped, whole = await stack.events(PreferenceRecorded, expected=2)
    assert (clipped.chosen.is_clipped, clipped.chosen.finish_reason) == (True, "stop")
    assert (whole.chosen.is_clipped, whole.chosen.finish_reason) == (False, "stop")


async def test_the_pair_stands_in_the_log_before_its_verdict_and_in_one_trace(stack: Stack) -> None:
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    await stack.consent("ann")
    body = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "user": "ann"}
    async with stack.http.post(
        "/v1/chat/completions", json=body | {"preference": {"pair": "always"}}, headers={"traceparent": parent}
    ) as response:
        answer = await response.json()
    await stack.click(answer)
    shown, verdict = await stack.events(PairShown, PreferenceRecorded, expected=2)
    assert isinstance(shown, PairShown) and isinstance(verdict, PreferenceRecorded)
    assert shown.pair_id == verdict.pair_id == answer["preference"]["pair_id"]
    assert shown.trace_id == verdict.trace_id == "ab" * 16
    assert len({shown.span_id, verdict.span_id, "cd" * 8, ""}) == 4
    assert shown.expires_at is not None


async def test_the_same_click_again_gets_the_same_receipt(stack: Stack) -> None:
    answer = await stack.pair()
    _, first = await stack.click(answer, "b")
    status, again = await stack.click(answer, "b", comment="a second thought")
    assert status == 200
    assert again == first | {"replayed": True}
    assert len(await stack.events(PreferenceRecorded, expected=1)) == 1


async def test_another_choice_after_the_first_is_a_conflict(stack: Stack) -> None:
    answer = await stack.pair()
    await stack.click(answer, "a")
    status, body = await stack.click(answer, "b")
    assert (status, body["error"]["code"], body["error"]["param"]) == (409, "verdict_conflict", "choice")
    [event] = await stack.events(PreferenceRecorded, expected=1)
    assert event.chosen_position == "a"


async def test_a_hundred_parallel_clicks_are_one_event(stack: Stack) -> None:
    answer = await stack.pair()
    answers = await asyncio.gather(*(stack.click(answer, "a") for _ in range(100)))
    assert Counter(status for status, _ in answers) == {201: 1, 200: 99}
    assert len({receipt["id"] for _, receipt in answers}) == 1
    assert len(await stack.events(PreferenceRecorded, expected=1)) == 1
    assert await stack.metric("tiebreak_verdicts_total", outcome="win", version=STABLE) >= 1


async def test_parallel_clicks_that_disagree_leave_one_verdict(stack: Stack) -> None:
    answer = await stack.pair()
    answers = await asyncio.gather(*(stack.click(answer, "ab"[i % 2]) for i in range(60)))
    statuses = Counter(status for status, _ in answers)
    assert statuses == {201: 1, 200: 29, 409: 30}
    winners = {body["choice"] for status, body in answers if status < 300}
    [event] = await stack.events(PreferenceRecorded, expected=1)
    assert winners == {event.chosen_position}


async def test_parallel_clicks_on_two_routers_are_one_event(stack: Stack, telemetry_config: TelemetryConfig) -> None:
    """Two workers of one deployment share nothing but Redis and the keys."""
    from msgspec.structs import replace

    other_state = telemetry_config.state_path / "worker-2"
    other_state.mkdir(parents=True)
    (other_state / "keys").symlink_to(telemetry_config.state_path / "keys")
    second = replace(telemetry_config, state=str(other_state))
    async with running_stack(second) as other:
        answer = await stack.pair()
        clicks = [(stack, other)[i % 2].click(answer, "a") for i in range(60)]
        answers = await asyncio.gather(*clicks)
    assert Counter(status for status, _ in answers) == {201: 1, 200: 59}
    assert len(await stack.events(PreferenceRecorded, expected=1)) == 1


async def test_a_forged_token_is_refused(stack: Stack) -> None:
    answer = await stack.pair()
    token = answer["preference"]["token"]
    key = signing_key(stack.telemetry.state_path)
    pair_id = answer["preference"]["pair_id"]
    for forged in (
        token[:-1] + ("0" if token[-1] != "0" else "1"),
        sign_ticket(b"guess" * 7, Ticket(pair_id, pseudonym(key, "ann"), time.time() + 60)),
        (await stack.pair())["preference"]["token"],
        "nonsense",
    ):
        status, body = await stack.click(answer, "a", token=forged)
        assert (status, body["error"]["code"]) == (401, "invalid_token")
        assert forged not in str(body)
    assert await stack.events(PreferenceRecorded) == []


async def test_another_users_verdict_is_refused(stack: Stack) -> None:
    answer = await stack.pair("ann")
    status, body = await stack.click(answer, "a", user="bob")
    assert (status, body["error"]["code"]) == (403, "not_your_pair")
    assert (await stack.click(answer, "a", user="ann"))[0] == 201


async def test_an_expired_token_comes_too_late_but_a_given_verdict_is_still_confirmed(
    telemetry_config: TelemetryConfig,
) -> None:
    async with running_stack(telemetry_config, config=fast(pair_ttl_s=0.4)) as stack:
        late, early = await stack.pair(), await stack.pair()
        assert (await stack.click(early, "a"))[0] == 201
        await asyncio.sleep(0.5)
        status, body = await stack.click(late, "a")
        assert (status, body["error"]["code"]) == (410, "pair_expired")
        assert (await stack.click(early, "a"))[0] == 200
        assert len(await stack.events(PreferenceRecorded, expected=1)) == 1


async def test_a_pair_that_was_never_complete_cannot_be_judged(stack: Stack) -> None:
    key = signing_key(stack.telemetry.state_path)
    token = sign_ticket(key, Ticket("no-such-pair", pseudonym(key, "ann"), time.time() + 60))
    status, body = await stack.click({"preference": {"pair_id": "no-such-pair", "token": token}})
    assert (status, body["error"]["code"]) == (404, "pair_not_found")


async def test_a_crash_between_claim_and_append_is_mended_by_the_same_click(
    telemetry_config: TelemetryConfig,
) -> None:
    log = BrokenLog(open_log(telemetry_config), SystemError("the process dies here: no outbox catches this"))
    async with running_stack(telemetry_config, event_log=log, config=fast(claim_lease_s=5.0)) as stack:
        answer = await stack.pair()
        status, _ = await stack.click(answer, "a")
        assert status == 500
        assert await stack.events(PreferenceRecorded) == []
        async with stack.http.get(f"/v1/preferences/{preference_id(answer['preference']['pair_id'])}") as response:
            assert response.status == 503, "there is a claim: who asks cannot know yet whether it was acknowledged"
        log.is_broken = False
        assert (await stack.click(answer, "b"))[0] == 409, "the first claim fixed the choice"
        started = time.monotonic()
        status, receipt = await stack.click(answer, "a")
        assert time.monotonic() - started < 3.0, "the click that was refused holds nothing"
        assert (status, receipt["replayed"]) == (201, False)
        [event] = await stack.events(PreferenceRecorded, expected=1)
        assert event.event_id == receipt["id"]
        assert (await stack.click(answer, "a"))[0] == 200


async def test_while_the_log_is_down_a_verdict_is_kept_in_the_outbox_and_sent_later(
    telemetry_config: TelemetryConfig,
) -> None:
    log = BrokenLog(open_log(telemetry_config), LogUnavailable("no broker"))
    async with running_stack(telemetry_config, event_log=log) as stack:
        answer = await stack.pair()
        status, receipt = await stack.click(answer, "a")
        assert (status, receipt["durable"]) == (201, "outbox")
        assert await stack.events(PreferenceRecorded) == []
        log.is_broken = False
        [event] = await stack.events(PreferenceRecorded, expected=1)
        assert event.event_id == receipt["id"]
        assert (await stack.click(answer, "a"))[1]["durable"] == "outbox", "the same receipt"


async def test_a_worker_that_died_with_the_lock_in_hand_is_replaced_after_its_lease(
    telemetry_config: TelemetryConfig,
) -> None:
    async with running_stack(telemetry_config, config=fast(claim_lease_s=0.5)) as stack:
        answer = await stack.pair()
        await stack.redis.set(f"tiebreak:verdict-lock:{answer['preference']['pair_id']}", "1", px=300)
        started = time.monotonic()
        assert (await stack.click(answer, "a"))[0] == 201
        assert time.monotonic() - started > 0.2
        assert len(await stack.events(PreferenceRecorded, expected=1)) == 1


async def test_an_append_whose_acknowledgement_was_lost_is_repeated_under_the_same_id(
    telemetry_config: TelemetryConfig, redis_server: RedisServer
) -> None:
    """The event is in the log, the mark is not: the retry appends it again, and consumers see one id."""
    async with running_stack(telemetry_config) as stack:
        answer = await stack.pair()
        _, first = await stack.click(answer, "a")
        async with stack.http.get(first["links"]["self"]) as response:
            assert response.status == 200, "the mark is written"
        await stack.redis.hdel(f"tiebreak:verdict:{answer['preference']['pair_id']}", "durable")  # type: ignore[misc]
        status, second = await stack.click(answer, "a")
        assert status == 201
        assert second == first
        events = await stack.events(PreferenceRecorded, expected=2)
        assert events[0] == events[1]


async def test_when_redis_is_away_nothing_is_acknowledged_and_nothing_is_lost(
    telemetry_config: TelemetryConfig, redis_server: RedisServer
) -> None:
    async with running_stack(telemetry_config) as stack:
        answer = await stack.pair()
        redis_server.kill()
        status, body = await stack.click(answer, "a")
        assert (status, body["error"]["code"]) == (503, "state_unavailable")
        status, _, headers = await stack.ask(user="ann")
        assert status == 200 and headers["x-tiebreak-version"] == STABLE, "single answers go on"
        redis_server.restart()
        assert (await stack.click(answer, "a"))[0] == 201
        assert len(await stack.events(PreferenceRecorded, expected=1)) == 1


async def test_a_receipt_can_be_followed_and_taken_back_once(stack: Stack) -> None:
    answer = await stack.pair()
    _, receipt = await stack.click(answer, "b")
    path = receipt["links"]["self"]
    async with stack.http.get(path) as response:
        timeline = await response.json()
    assert (timeline["status"], timeline["choice"]) == ("accepted", "b")
    assert [stage["stage"] for stage in timeline["stages"]] == ["accepted"]
    assert timeline["revealed"] == receipt["revealed"]
    answers = []
    for _ in range(2):
        async with stack.http.delete(path) as response:
            answers.append((response.status, await response.json()))
    assert answers[0] == answers[1]
    assert answers[0][1]["status"] == "retracted"
    [event] = await stack.events(PreferenceRetracted, expected=1)
    assert (event.preference_id, event.pair_id) == (receipt["id"], receipt["pair_id"])
    status, again = await stack.click(answer, "b")
    assert (status, again["replayed"], again["status"]) == (200, True, "retracted"), "it stays taken back, and says so"


async def test_what_the_recorder_projects_shows_in_the_timeline(stack: Stack) -> None:
    _, receipt = await stack.click(await stack.pair())
    later = {"stored_at": "2999-01-01T00:00:01+00:00", "trained_at": "2999-01-01T00:00:02+00:00", "batch": "m/1"}
    await stack.redis.hset(f"tiebreak:receipt:{receipt['id']}", mapping=later)  # type: ignore[misc]
    async with stack.http.get(f"/v1/preferences/{receipt['id']}") as response:
        timeline = await response.json()
    assert timeline["status"] == "trained"
    assert [stage["stage"] for stage in timeline["stages"]] == ["accepted", "stored", "trained"]
    assert timeline["stages"][2]["batch"] == "m/1"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_an_unknown_receipt_is_not_found(stack: Stack, method: str) -> None:
    async with stack.http.request(method, "/v1/preferences/00000000-0000-0000-0000-000000000000") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "preference_not_found")


async def test_a_thumb_on_a_single_answer_is_recorded_with_the_text_we_served(stack: Stack) -> None:
    _, answer, _ = await stack.ask("one two")
    body = {"completion_id": answer["id"], "rating": -1, "comment": "dull"}
    async with stack.http.post("/v1/feedback", json=body) as response:
        assert response.status == 201
        receipt = await response.json()
    [event] = await stack.events(FeedbackRecorded, expected=1)
    assert event.event_id == receipt["id"]
    assert (event.rating, event.comment, event.completion.text) == (-1, "dull", f"{STABLE} says: one two")


async def test_a_thumb_on_nothing_or_on_a_pair_is_refused(stack: Stack) -> None:
    answer: dict[str, Any] = await stack.pair()
    for completion_id in ("chatcmpl-none", answer["id"]):
        async with stack.http.post("/v1/feedback", json={"completion_id": completion_id, "rating": 1}) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (404, "completion_not_found")


@pytest.mark.parametrize("is_readable", [True, False])
async def test_a_replay_needs_no_key_and_a_first_verdict_does(stack: Stack, is_readable: bool) -> None:
    given, late = await stack.pair(), await stack.pair()
    assert (await stack.click(given, "a"))[0] == 201
    keys = stack.telemetry.state_path / "keys" / "people"
    keys.rename(keys.with_name("away"))
    keys.mkdir() if is_readable else keys.touch()
    try:
        status, receipt = await stack.click(given, "a")
        assert (status, receipt["replayed"]) == (200, True)
        status, body = await stack.click(given, "b")
        assert (status, body["error"]["code"]) == (409, "verdict_conflict")
        status, body = await stack.click(late, "a")
        assert (status, body["error"]["code"]) == (503, "keys_unavailable")
    finally:
        keys.rmdir() if is_readable else keys.unlink()
        keys.with_name("away").rename(keys)
    assert (await stack.click(late, "a"))[0] == 201
