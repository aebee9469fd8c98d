"""Answers over HTTP from real replicas: one version each, retried before the first token only, lost sides, leaving."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import aiohttp
import msgspec
import pytest
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from router.backends import ReplicaPool
from router.errors import Unavailable
from router.pressure import ConcurrencyLimit
from router.tables import Tables
from serving.echo_engine import EchoEngine
from serving.wire import Chunk, GenerateRequest, Sampling
from telemetry.config import TelemetryConfig
from telemetry.events import CompletionServed, Message, PairShown
from telemetry.routing import RoutingTable
from tests.router_stack import (
    CANARY,
    STABLE,
    FaultyEngine,
    Stack,
    fast,
    load,
    replica,
    replica_app,
    routes,
    running_stack,
    serving_on_loopback,
)


@pytest.fixture
async def stack(telemetry_config: TelemetryConfig) -> AsyncIterator[Stack]:
    async with running_stack(telemetry_config) as running:
        yield running


ALWAYS: dict[str, Any] = {"user": "ann", "preference": {"pair": "always"}}
ONLY_CANARY_PAIRS = fast(canary_pair_ratio=1.0)


async def lines(response: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    """The data of each server-sent event; the last must be [DONE]."""
    data = [line.decode().removeprefix("data: ").strip() async for line in response.content if line.startswith(b"data")]
    assert data.pop() == "[DONE]"
    return [json.loads(entry) for entry in data]


async def test_every_pinned_model_is_answered_by_that_version_alone(stack: Stack) -> None:
    await stack.publish(routing=routes(stack.engine, canary=CANARY))
    base = stack.engine.base_version
    expected = {"chat@stable": STABLE, "chat@canary": CANARY, "chat@base": base, f"chat@{CANARY}": CANARY}
    for model, version in expected.items():
        status, answer, headers = await stack.ask(model=model)
        assert (status, headers["x-tiebreak-version"], answer["model"]) == (200, version, "chat")
        assert answer["choices"][0]["message"]["content"].startswith(version)


async def test_the_version_in_the_header_is_the_one_that_spoke_during_a_thousand_swaps(stack: Stack) -> None:
    """Stable flips between two loaded versions while requests run: each answer is of one version, none fails."""

    is_over = asyncio.Event()

    async def flip() -> None:
        for turn in itertools.count():
            if is_over.is_set():
                return
            table = routes(stack.engine, stable=(STABLE, CANARY)[turn % 2])
            await stack.publish(routing=replace(table, revision=turn))

    flipping = asyncio.create_task(flip())
    seen = set()
    for _ in range(25):
        answers = await asyncio.gather(*(stack.ask() for _ in range(40)))
        for status, answer, headers in answers:
            assert status == 200
            assert answer["choices"][0]["message"]["content"] == f"{headers['x-tiebreak-version']} says: Say something"
            seen.add(headers["x-tiebreak-version"])
    is_over.set()  # not cancelled: redis-py leaves a connection open that is cancelled within a call
    await flipping
    assert seen == {STABLE, CANARY}


async def test_both_positions_of_a_pair_are_equally_likely_for_each_version(telemetry_config: TelemetryConfig) -> None:
    async with running_stack(telemetry_config, config=ONLY_CANARY_PAIRS) as stack:
        await stack.publish(routing=routes(stack.engine, canary=CANARY))
        await stack.consent("ann")
        answers = [await stack.ask(**ALWAYS) for _ in range(100)]
        first = [answer["choices"][0]["message"]["content"].startswith(CANARY) for _, answer, _ in answers]
        second = [answer["choices"][1]["message"]["content"].startswith(CANARY) for _, answer, _ in answers]
    assert 25 < sum(first) < 75
    assert [not flag for flag in first] == second


async def test_a_streamed_pair_can_be_judged_as_soon_as_it_is_complete(stack: Stack) -> None:
    await stack.consent("ann")
    body = {"model": "chat", "messages": [{"role": "user", "content": "one"}], "stream": True} | ALWAYS
    async with stack.http.post("/v1/chat/completions", json=body) as response:
        assert "x-tiebreak-version" not in response.headers
        data = await lines(response)
    assert response.headers["x-tiebreak-pair-id"] == data[0]["preference"]["pair_id"]
    assert (await stack.click(data[0], "b"))[0] == 201
    [shown] = await stack.events(PairShown, expected=1)
    texts = [
        "".join(c["delta"].get("content", "") for d in data for c in d["choices"] if c["index"] == index)
        for index in (0, 1)
    ]
    assert [shown.a.text, shown.b.text] == texts


async def test_a_pair_that_loses_a_side_before_it_speaks_is_a_normal_answer(telemetry_config: TelemetryConfig) -> None:
    engine = FaultyEngine(CANARY, good_chunks=0)
    async with running_stack(telemetry_config, engine=engine, config=ONLY_CANARY_PAIRS) as stack:
        await stack.publish(routing=routes(engine, canary=CANARY))
        before = await stack.metric("tiebreak_pair_sides_lost_total", version=CANARY)
        await stack.consent("ann")
        status, answer, headers = await stack.ask(**ALWAYS)
        assert (status, headers["x-tiebreak-version"]) == (200, STABLE)
        assert "preference" not in answer and "x-tiebreak-pair-id" not in headers
        assert [choice["message"]["content"] for choice in answer["choices"]] == [f"{STABLE} says: Say something"]
        body = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "stream": True} | ALWAYS
        async with stack.http.post("/v1/chat/completions", json=body) as response:
            data = await lines(response)
        assert response.headers["x-tiebreak-version"] == STABLE
        assert {choice["index"] for entry in data for choice in entry["choices"]} == {0}
        assert await stack.metric("tiebreak_pair_sides_lost_total", version=CANARY) == before + 2
        served = await stack.events(CompletionServed, expected=4)
        assert sorted((event.version, event.error) for event in served) == sorted(
            [(STABLE, ""), (CANARY, "engine_failed")] * 2
        )
        assert await stack.events(PairShown) == []
        async with stack.http.post("/v1/feedback", json={"completion_id": answer["id"], "rating": 1}) as response:
            assert response.status == 201, "it is a single answer, so it takes a thumb"


async def test_a_pair_that_loses_a_side_while_it_speaks_says_so_and_takes_no_verdict(
    telemetry_config: TelemetryConfig,
) -> None:
    engine = FaultyEngine(CANARY, good_chunks=2, token_s=0.01)
    async with running_stack(telemetry_config, engine=engine, config=ONLY_CANARY_PAIRS) as stack:
        await stack.publish(routing=routes(engine, canary=CANARY))
        await stack.consent("ann")
        body = {"model": "chat", "messages": [{"role": "user", "content": "a b c"}], "stream": True} | ALWAYS
        async with stack.http.post("/v1/chat/completions", json=body) as response:
            data = await lines(response)
        notice = next(entry["preference"] for entry in data if entry.get("preference", {}).get("is_void"))
        assert (notice["version"], notice["pair_id"]) == (STABLE, data[0]["preference"]["pair_id"])
        finishes = [c["finish_reason"] for entry in data for c in entry["choices"] if c["finish_reason"]]
        assert sorted(finishes) == ["error", "stop"]
        status, refusal = await stack.click(data[0])
        assert (status, refusal["error"]["code"]) == (404, "pair_not_found")
        assert await stack.events(PairShown) == []


async def test_a_single_answer_that_fails_is_an_error_whole_and_streamed(telemetry_config: TelemetryConfig) -> None:
    engine = FaultyEngine(STABLE, good_chunks=2, token_s=0.01)
    async with running_stack(telemetry_config, engine=engine) as stack:
        status, body, headers = await stack.ask()
        assert (status, body["error"]["code"]) == (502, "engine_failed")
        assert "x-tiebreak-version" not in headers
        request = {"model": "chat", "messages": [{"role": "user", "content": "a b c"}], "stream": True}
        async with stack.http.post("/v1/chat/completions", json=request) as response:
            data = await lines(response)
        assert data[-1]["error"]["code"] == "engine_failed"
        assert engine.submitted == 2, "an answer that has begun is never retried"


async def test_a_choice_that_fails_beside_others_says_so(telemetry_config: TelemetryConfig) -> None:
    engine = FaultyEngine(STABLE, good_chunks=7, token_s=0.01)  # in the middle of the second choice
    async with running_stack(telemetry_config, engine=engine) as stack:
        request = {"model": "chat", "messages": [{"role": "user", "content": "a b c"}], "stream": True, "n": 2}
        async with stack.http.post("/v1/chat/completions", json=request) as response:
            choices = [choice for piece in await lines(response) for choice in piece["choices"]]
        assert {c["index"]: c["finish_reason"] for c in choices if c["finish_reason"]} == {0: "stop", 1: "error"}


async def test_an_answer_that_names_another_version_is_an_error_not_an_answer(
    telemetry_config: TelemetryConfig,
) -> None:
    engine = FaultyEngine(STABLE, good_chunks=0, says=CANARY)
    async with running_stack(telemetry_config, engine=engine) as stack:
        status, body, _ = await stack.ask()
        assert (status, body["error"]["code"]) == (502, "version_mismatch")
        assert CANARY not in json.dumps(body)
        assert await stack.metric("tiebreak_response_errors_total", error="version_mismatch") >= 1


async def test_a_replica_that_is_gone_is_passed_over(stack: Stack) -> None:
    gone = replica("http://127.0.0.1:1", stack.engine.base_version, STABLE, name="gone")
    await stack.publish(replicas=[gone, *stack.replicas])
    answers = await asyncio.gather(*(stack.ask() for _ in range(40)))
    assert {status for status, _, _ in answers} == {200}


async def test_a_fleet_that_refuses_gets_no_second_wave(stack: Stack) -> None:
    asked = 0

    async def refuse(_: Request) -> Response:
        nonlocal asked
        asked += 1
        return Response("full", 503)

    async with serving_on_loopback(Starlette(routes=[Route("/v1/generate", refuse, methods=["POST"])])) as url:
        await stack.publish(replicas=[replica(url, stack.engine.base_version, STABLE, name=f"r{i}") for i in range(2)])
        answers = [await stack.ask() for _ in range(100)]
    assert {(status, body["error"]["code"]) for status, body, _ in answers} == {(503, "overloaded")}
    assert 170 <= asked <= 175, "a tenth, and a reserve of 64"


async def test_a_replica_without_the_version_is_passed_over(stack: Stack, telemetry_config: TelemetryConfig) -> None:
    bare = EchoEngine()
    async with serving_on_loopback(replica_app(bare, telemetry_config.state_path)) as url:
        liar = replica(url, bare.base_version, STABLE, name="liar")
        await stack.publish(replicas=[liar, *stack.replicas])
        answers = await asyncio.gather(*(stack.ask() for _ in range(40)))
        assert {status for status, _, _ in answers} == {200}


async def test_a_request_waits_for_a_version_that_is_being_loaded(telemetry_config: TelemetryConfig) -> None:
    async with running_stack(telemetry_config, config=fast(ready_wait_s=5.0)) as stack:
        [ready] = stack.replicas
        await stack.publish(replicas=[replace(ready, versions=(stack.engine.base_version,))])
        asked = asyncio.create_task(stack.ask())
        await asyncio.sleep(0.2)
        assert not asked.done()
        await stack.publish(replicas=[ready])
        assert (await asked)[0] == 200


async def test_without_a_replica_a_request_is_refused_for_now_and_the_log_says_what_is_known(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    await stack.publish(replicas=[])
    status, body, headers = await stack.ask()
    assert f"holds {STABLE}: known {{}}" in caplog.text
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "no_replica", "2")
    async with stack.http.get("/health/ready") as response:
        assert response.status == 503
        assert (await response.json())["missing"] == ["replica that holds chat@stable"]
    async with stack.http.get("/health/live") as response:
        assert response.status == 200


async def test_two_replicas_share_the_load(stack: Stack, telemetry_config: TelemetryConfig) -> None:
    second = FaultyEngine("", 0)
    await load(second, STABLE)
    async with serving_on_loopback(replica_app(second, telemetry_config.state_path)) as url:
        await stack.publish(replicas=[*stack.replicas, replica(url, second.base_version, STABLE, name="r1")])
        await asyncio.gather(*(stack.ask(f"question {i}") for i in range(60)))  # no prefix in common
        assert 15 <= second.submitted <= 45


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_leaves_cancels_the_generation(telemetry_config: TelemetryConfig, is_stream: bool) -> None:
    engine = EchoEngine(token_s=0.05)
    async with running_stack(telemetry_config, engine=engine) as stack:
        words = "word " * 200
        body = {"model": "chat", "messages": [{"role": "user", "content": words}], "stream": is_stream}
        async with aiohttp.ClientSession(stack.url) as leaving:
            asking = asyncio.create_task(leaving.post("/v1/chat/completions", json=body))
            while not engine.status().running:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            asking.cancel() if not asking.done() else (await asking).close()
        for _ in range(100):
            if not engine.status().running:
                break
            await asyncio.sleep(0.02)
        assert engine.status().running == 0
        [served] = await stack.events(CompletionServed, expected=1)
        assert (served.finish_reason, served.error) == ("cancelled", "")
        assert await stack.metric("tiebreak_requests_in_flight") == 0


async def test_an_answer_past_its_deadline_is_given_up(telemetry_config: TelemetryConfig) -> None:
    engine = EchoEngine(token_s=0.2)
    async with running_stack(telemetry_config, engine=engine, config=fast(deadline_s=0.5)) as stack:
        status, body, _ = await stack.ask("one two three four five six")
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


async def test_a_prompt_that_is_too_long_is_the_clients_error(telemetry_config: TelemetryConfig) -> None:
    async with running_stack(telemetry_config, engine=EchoEngine(max_context=16)) as stack:
        status, body, _ = await stack.ask("word " * 30)
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


async def test_numbers_about_every_answer_reach_the_log_without_its_text(stack: Stack) -> None:
    _, answer, headers = await stack.ask("la la la la la la la la")
    [served] = await stack.events(CompletionServed, expected=1)
    assert (served.variant, served.version, served.channel) == ("chat-main", STABLE, "stable")
    assert served.completion_tokens == answer["usage"]["completion_tokens"]
    assert served.mean_logp == -0.5 and served.repetition_ratio > 0.3
    assert served.duration_s >= served.ttft_s > 0
    assert served.request_id == headers["X-Request-ID"]
    assert "la la" not in msgspec.json.encode(served).decode()


async def test_consent_decides_who_is_shown_pairs(stack: Stack) -> None:
    """`auto` at pair_ratio 1.0: nobody without consent, everybody with it, nobody who took it back."""

    async def is_pair(**body: Any) -> bool:
        _, answer, _ = await stack.ask(**body)
        return "preference" in answer

    assert not await is_pair(user="ann")
    assert not await is_pair()
    await stack.consent("ann")
    assert await is_pair(user="ann")
    assert not await is_pair(user="bob")
    assert not await is_pair(user="ann", preference={"pair": "never"})
    assert not await is_pair(user="ann", n=2)
    assert not await is_pair(user="ann", model="chat@stable")
    assert not await is_pair(user="ann", temperature=0)
    async with stack.http.put("/v1/users/ann/consent", json={"pairing": False}) as response:
        assert (await response.json())["pairing"] is False
    assert not await is_pair(user="ann")
    status, body, _ = await stack.ask(**ALWAYS)
    assert (status, body["error"]["code"]) == (403, "consent_required")


async def test_the_frequency_cap_holds_for_auto(telemetry_config: TelemetryConfig) -> None:
    async with running_stack(telemetry_config, config=fast(pairs_per_minute=3)) as stack:
        await stack.consent("ann")
        answers = [(await stack.ask(user="ann"))[1] for _ in range(5)]
        shown = sum("preference" in answer for answer in answers)
        assert shown in (3, 4, 5), "a minute may turn meanwhile"
        keys = [key async for key in stack.redis.scan_iter("tiebreak:pair-cap:*")]
        assert shown == 3 or len(keys) == 2


async def test_the_last_known_tables_serve_while_they_cannot_be_read(stack: Stack) -> None:
    await stack.redis.set("tiebreak:routing", b"not json")
    await asyncio.sleep(0.2)
    assert (await stack.ask())[0] == 200


async def test_a_table_with_no_policy_answers_nobody(stack: Stack) -> None:
    await stack.publish(routing=RoutingTable(2, {}))
    assert (await stack.ask())[0] == 404


async def test_a_base_that_is_full_refuses_at_once_until_a_stream_is_over(stack: Stack) -> None:
    tables = Tables(stack.redis)
    await tables.refresh()
    pool = ReplicaPool(tables, ready_wait_s=1.0, min_in_flight=1, max_in_flight=1, patience_s=0.5)
    route = stack.routing.policies["chat"][0]

    def ask() -> AsyncGenerator[list[Chunk]]:
        messages = (Message("user", "Say something"),)
        return pool.generate(route.base, GenerateRequest("r", STABLE, messages, Sampling(max_tokens=4), deadline_s=5.0))

    async with aclosing(ask()) as first, aclosing(ask()) as second:
        await anext(first)
        with pytest.raises(Unavailable) as refused:
            await anext(second)
        assert refused.value.code == "overloaded"
    async with aclosing(ask()) as third:
        assert (await anext(third))[0].version == STABLE
    pool.close()


async def test_a_full_base_refuses_before_any_work(
    telemetry_config: TelemetryConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No event of an answer that never was, no turn of the user's pairs taken, and the place is given back."""
    monkeypatch.setattr("router.backends.ConcurrencyLimit", lambda *_, **more: ConcurrencyLimit(1.0, 1.0, **more))
    async with running_stack(telemetry_config, engine=EchoEngine(token_s=0.05), config=fast(pair_ratio=1.0)) as stack:
        await stack.consent("ann")
        refused = await stack.metric("tiebreak_requests_total", code="503")
        served = asyncio.create_task(stack.ask("one two three four five six seven eight nine ten"))
        while not await stack.metric("tiebreak_requests_in_flight"):
            await asyncio.sleep(0.01)
        status, body, headers = await stack.ask(user="ann")
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "overloaded", "1")
        assert [key async for key in stack.redis.scan_iter("tiebreak:pair-cap:*")] == []
        status, body, _ = await stack.ask(model="chat@stable")
        assert (status, body["error"]["code"]) == (503, "overloaded")
        async with stack.http.post("/v1/chat/completions", data=b"no JSON") as unread:
            assert unread.status == 503, "what is asked is not even read"
        assert (await served)[0] == 200
        [event] = await stack.events(CompletionServed, expected=1)
        assert event.error == ""
        assert await stack.metric("tiebreak_requests_total", code="503") == refused + 3
        assert await stack.metric("tiebreak_requests_in_flight") == 0
