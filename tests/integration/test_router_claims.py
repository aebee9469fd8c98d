"""The one verdict of a pair in a real Redis: claimed, appended or left to the caller, marked, checked."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from router.claims import Claim, Claims
from router.gathered import Gathered
from router.ledger import Ledger
from router.preferences import to_preference
from router.schema import VerdictRequest
from telemetry.config import TelemetryConfig
from telemetry.events import PREFERENCES, PairShown, PreferenceRecorded, utc_now
from tests.router_stack import PLAIN, Stack, running_stack


@pytest.fixture
async def stack(telemetry_config: TelemetryConfig) -> AsyncIterator[Stack]:
    async with running_stack(telemetry_config) as running:
        yield running


def claims_on(stack: Stack, *, embedded_log: bool) -> tuple[Claims, Ledger]:
    redis = stack.redis
    ledger = Ledger(None, redis, Gathered(redis), None, PLAIN, completion_ttl_s=1)  # type: ignore[arg-type]
    return Claims(redis, ledger, ttl_s=60, lease_s=5, embedded_log=embedded_log), ledger


@pytest.mark.parametrize(("embedded_log", "durable", "entries"), [(True, "log", 1), (False, "", 0)])
async def test_a_claim_is_its_own_append_where_the_log_is_the_same_redis(
    stack: Stack, embedded_log: bool, durable: str, entries: int
) -> None:
    pair = (await stack.pair())["preference"]["pair_id"]
    shown = next(event for event in await stack.events(PairShown, expected=1) if event.pair_id == pair)
    event = to_preference(shown, VerdictRequest(pair_id=pair, token="", choice="a"), at=utc_now())
    claims, _ = claims_on(stack, embedded_log=embedded_log)
    made = await claims.make(Claim("a", "", event))
    assert (made.durable_before, made.is_ours, made.durable) == ("", True, durable)
    assert len(await stack.events(PreferenceRecorded, expected=entries)) == entries
    again = await claims.make(Claim("a", "", event))
    assert (again.durable_before, again.is_ours, again.durable) == (durable, False, "")
    assert (await stack.redis.hexists(f"tiebreak:receipt:{event.event_id}", "accepted_at")) == entries


async def test_marks_of_several_verdicts_are_each_their_own(stack: Stack) -> None:
    """One of them is in an outbox, one the recorder has written before."""
    redis = stack.redis
    claims, ledger = claims_on(stack, embedded_log=False)
    pairs = [(await stack.pair())["preference"]["pair_id"] for _ in range(3)]
    shown = {event.pair_id: event for event in await stack.events(PairShown, expected=3)}
    body = VerdictRequest(pair_id="", token="", choice="a")
    events = [to_preference(shown[pair], body, at=utc_now()) for pair in pairs]
    for event in events:
        assert (await claims.make(Claim("a", "", event))).is_ours
    await redis.hset(f"tiebreak:receipt:{events[2].event_id}", "accepted_at", "before")
    for event, durable in zip(events, ("log", "outbox", "log"), strict=True):
        claims.mark(event, durable)
    ledger.is_ending = True
    await ledger.settled()
    for event, durable in zip(events, ("log", "outbox", "log"), strict=True):
        again = await claims.make(Claim("b", "", event))
        assert (again.claim.choice, again.durable_before, again.is_ours) == ("a", durable, False)
        assert not await redis.exists(f"tiebreak:verdict-lock:{event.pair_id}")
        fields = await redis.hgetall(f"tiebreak:receipt:{event.event_id}")
        accepted_at = b"before" if event is events[2] else event.occurred_at.isoformat().encode()
        assert fields == {
            b"pair_id": event.pair_id.encode(), b"user": event.user.encode(), b"accepted_at": accepted_at,
            b"durable": durable.encode(),
        }  # fmt: skip


async def test_a_claim_without_its_event_is_checked_before_anything_is_appended(stack: Stack) -> None:
    """What an append that failed left behind, and a click that disagrees when the pair itself is gone."""
    answer = await stack.pair()
    pair = answer["preference"]["pair_id"]
    [shown] = await stack.events(PairShown, expected=1)
    event = to_preference(shown, VerdictRequest(pair_id=pair, token="", choice="a"), at=utc_now())
    claims, _ = claims_on(stack, embedded_log=False)
    assert (await claims.make(Claim("a", "", event))).is_ours
    await claims.let_go(event)
    keys = stack.telemetry.state_path / "keys" / "people"
    keys.rename(keys.with_name("away"))
    keys.mkdir()
    status, body = await stack.click(answer, "b")
    assert (status, body["error"]["code"]) == (409, "verdict_conflict")
    assert await stack.redis.xlen(PREFERENCES) == 0
    assert (await stack.click(answer, "a"))[0] == 201
    assert await stack.redis.xlen(PREFERENCES) == 1
