"""A person is forgotten: no text of theirs can be read in log, store, outbox, Redis or checkpoints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from deploy.audit import entries, record, verify
from online_trainer import checkpoint
from router.pairs import pseudonym
from router.private import Private
from telemetry.config import TelemetryConfig, open_sealer
from telemetry.events import AUDIT, AuditRecorded, FeedbackRecorded, PairShown, PersonErased, PreferenceRecorded
from telemetry.outbox import read_segment
from telemetry.people import Forgotten
from telemetry.process import signing_key
from telemetry.redaction import Redactor
from telemetry.store import verdicts
from tests import examples
from tests.integration.recording import RecorderProcess, stored_ids, wait_for
from tests.router_stack import Stack, running_stack
from tests.trainer_bench import Bench
from tests.unit.serving.conftest import tiny_model as tiny_model

SECRET, OTHERS = "heliotrope", "marigold"
LIMIT_S = 5.0


@pytest.fixture
async def stack(telemetry_config: TelemetryConfig) -> AsyncIterator[Stack]:
    async with running_stack(telemetry_config) as running:
        yield running


async def spoken(stack: Stack, user: str, word: str) -> dict[str, object]:
    """A judged pair, an unjudged one and a thumb, all about ``word``; the unjudged pair."""
    pair = await stack.pair(user=user, messages=[{"role": "user", "content": f"I like {word}"}])
    status, _ = await stack.click(pair, "a", comment=f"{word}!")
    assert status == 201
    status, single, _ = await stack.ask(f"More {word}", user=user, preference={"pair": "never"})
    async with stack.http.post("/v1/feedback", json={"completion_id": single["id"], "rating": 1}) as response:
        assert response.status == 201
    return await stack.pair(user=user, messages=[{"role": "user", "content": f"Again {word}"}])


async def in_redis(stack: Stack) -> bytes:
    """Everything that Redis holds, as it holds it."""
    found = b""
    async for key in stack.redis.scan_iter(count=1000):
        match await stack.redis.type(key):
            case b"string":
                found += await stack.redis.get(key)
            case b"stream":
                found += b"".join(b"".join(fields.values()) for _, fields in await stack.redis.xrange(key))
            case b"hash":
                found += b"".join((await stack.redis.hgetall(key)).values())
    return found


def readable(telemetry: TelemetryConfig) -> list[PreferenceRecorded]:
    return list(verdicts(telemetry.store_root, open_sealer(telemetry)))


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def test_texts_lie_nowhere_in_the_clear(stack: Stack) -> None:
    await spoken(stack, "ann", SECRET)
    with RecorderProcess(stack.telemetry):
        expected = len(await stack.events(PreferenceRecorded, FeedbackRecorded, expected=2))
        await asyncio.to_thread(wait_for, lambda: sum(stored_ids(stack.telemetry).values()) > expected, "stored")
        assert SECRET.encode() not in await in_redis(stack)
        assert SECRET.encode() not in on_disk(stack.telemetry.state_path)
    assert b"ann" not in on_disk(stack.telemetry.state_path / "keys")


async def test_whoever_is_erased_cannot_be_read_any_more_and_others_can(stack: Stack, tmp_path: Path) -> None:
    telemetry = stack.telemetry
    unjudged = await spoken(stack, "ann", SECRET)
    await spoken(stack, "bob", OTHERS)
    person = pseudonym(signing_key(telemetry.state_path), "ann")
    with RecorderProcess(telemetry):
        await asyncio.to_thread(
            wait_for, lambda: len(list(verdicts(telemetry.store_root, open_sealer(telemetry)))) == 2, "stored"
        )
        begun = time.monotonic()
        async with stack.http.delete("/v1/users/ann") as response:
            assert response.status == 200
            erasure = await response.json()
        assert (erasure["user"], erasure["had_data"], erasure["versions"]) == (person, True, [])

        left = readable(telemetry)
        assert [OTHERS in event.prompt[0].content for event in left] == [True]
        status, said = await stack.click(unjudged, "a")
        assert (status, said["error"]["code"]) == (410, "erased")
        in_log = await stack.events(PreferenceRecorded, expected=2)
        assert [event.sealed is None for event in in_log] == [False, True], "ann's stays sealed, bob's opens"
        assert time.monotonic() - begun < LIMIT_S

        (told,) = await stack.events(PersonErased, expected=1)
        assert told.user == person
        status, _, _ = await stack.ask("Do I get a pair?", user="ann", preference={"pair": "always"})
        assert status == 403, "consent is forgotten, too"
        async with stack.http.delete("/v1/users/ann") as response:
            assert (response.status, (await response.json())["had_data"]) == (200, False)

        audited = await stack.events(AuditRecorded)
        assert [(event.action, event.subject) for event in audited if event.action == "erased"] == [
            ("erased", person)
        ] * 2
        assert not any("ann" in str(event.details) for event in audited)


@pytest.mark.parametrize(("path", "status"), [("/v1/users/", 404), ("/v1/users/ann/consent", 405)])
async def test_only_a_user_can_be_erased(path: str, status: int, stack: Stack) -> None:
    await spoken(stack, "ann", SECRET)
    async with stack.http.delete(path) as response:
        assert response.status == status
    assert not await stack.events(PersonErased)


async def test_what_is_under_way_when_a_person_is_erased_is_not_written_under_their_next_key(stack: Stack) -> None:
    private = Private(open_sealer(stack.telemetry), Redactor(()))
    person = pseudonym(signing_key(stack.telemetry.state_path), "ann")
    await stack.pair(user="ann")
    before = private.key_now(person)
    assert before
    async with stack.http.delete("/v1/users/ann") as response:
        assert response.status == 200
    await stack.pair(user="ann", messages=[{"role": "user", "content": "I am back"}])
    shown = msgspec.structs.replace(examples.pair(1), user=person)
    with pytest.raises(Forgotten):
        await private.sealed(shown, before)


async def test_what_is_written_is_redacted_and_what_is_read_is_not(telemetry_config: TelemetryConfig) -> None:
    """In the clear too: pair, verdict, thumb, and what Redis remembers for it."""
    plain = msgspec.structs.replace(telemetry_config, encryption=False)
    async with running_stack(plain) as stack:
        mail = "ann@example.org"
        pair = await stack.pair(user="ann", messages=[{"role": "user", "content": f"I am {mail}"}])
        assert all(mail in choice["message"]["content"] for choice in pair["choices"])
        assert (await stack.click(pair, "a", comment=mail, edited=mail))[0] == 201
        _, single, _ = await stack.ask(f"I am {mail}", user="ann", preference={"pair": "never"})
        thumb = {"completion_id": single["id"], "rating": 1, "comment": mail}
        async with stack.http.post("/v1/feedback", json=thumb) as response:
            assert response.status == 201
        await asyncio.sleep(0.2)
        written = await in_redis(stack)
        assert mail.encode() not in written
        kinds = (PairShown, PreferenceRecorded, FeedbackRecorded)
        found = await stack.events(*kinds, expected=3)
        assert all("[email]" in event.prompt[0].content for event in found)
        verdict = next(event for event in found if isinstance(event, PreferenceRecorded))
        assert (verdict.comment, verdict.edited) == ("[email]", "[email]")


async def test_consent_and_orders_are_in_the_trail(stack: Stack) -> None:
    await stack.consent("ann")
    async with stack.http.post("/admin/releases/v000007-aaaaaaaa/promote", json={"reason": "a try"}) as response:
        assert response.status == 202
    found = await stack.events(AuditRecorded, expected=2)
    assert [(event.action, event.actor) for event in found] == [
        ("consent_changed", "operator"), ("promote_ordered", "operator"),
    ]  # fmt: skip
    assert (found[1].subject, found[1].details["reason"]) == ("v000007-aaaaaaaa", "a try")


async def test_who_comes_back_starts_anew(stack: Stack) -> None:
    unjudged = await spoken(stack, "ann", SECRET)
    async with stack.http.delete("/v1/users/ann") as response:
        assert response.status == 200
    again = await stack.pair(user="ann", messages=[{"role": "user", "content": "I am back"}])
    status, _ = await stack.click(again, "b")
    assert status == 201
    status, said = await stack.click(unjudged, "b")
    assert (status, said["error"]["code"]) == (410, "erased")
    texts = [event.prompt for event in await stack.events(PreferenceRecorded, expected=2)]
    assert [bool(prompt) for prompt in texts] == [False, True]


async def test_nobody_is_erased_where_nothing_is_encrypted(telemetry_config: TelemetryConfig) -> None:
    plain = msgspec.structs.replace(telemetry_config, encryption=False)
    async with running_stack(plain) as stack:
        await stack.pair(user="ann", messages=[{"role": "user", "content": f"I like {SECRET}"}])
        assert SECRET.encode() in await in_redis(stack)
        async with stack.http.delete("/v1/users/ann") as response:
            assert (response.status, (await response.json())["error"]["code"]) == (409, "erasure_not_configured")


async def test_a_trainer_forgets_whoever_is_erased(stack: Stack, tiny_model: Path) -> None:
    """Checkpoints cannot be read, and a trainer that starts from one goes on with the others alone."""
    for user, word in (("ann", SECRET), ("bob", OTHERS)):
        for n in range(2):
            pair = await stack.pair(user=user, messages=[{"role": "user", "content": f"{n} {word}"}])
            assert (await stack.click(pair, "a"))[0] == 201
    given = await stack.events(PreferenceRecorded, expected=4)
    anns = {event.event_id for event in given[:2]}
    bench = await asyncio.to_thread(Bench, stack.telemetry, tiny_model)
    await asyncio.to_thread(bench.turn)
    folder = stack.telemetry.state_path / "trainer"
    assert checkpoint.load_newest(folder) is not None
    for word in (SECRET, OTHERS):
        assert word.encode() not in on_disk(folder)
    assert len(bench.trainer._intake.usable_ids()) == 4

    async with stack.http.delete("/v1/users/ann") as response:
        assert response.status == 200
    await asyncio.to_thread(bench.start)  # a crash: from the checkpoint, without the event
    assert anns.isdisjoint(bench.trainer._intake.usable_ids())
    await asyncio.to_thread(bench.turn)
    assert len(bench.trainer._intake.usable_ids()) == 2


def test_the_trail_is_kept_and_proven(telemetry_config: TelemetryConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with RecorderProcess(telemetry_config):
        record(telemetry_config, "exported", "preferences", out="-")
        wait_for(lambda: len(entries(telemetry_config)) == 1, "stored")
    assert verify(telemetry_config) == 0
    assert "1 entries, each linked" in capsys.readouterr().out
    (entry,) = entries(telemetry_config)
    assert (entry["action"], entry["subject"], entry["details"]) == ("exported", "preferences", '{"out":"-"}')
    assert not list((telemetry_config.state_path / "outbox").iterdir()), "nothing is left of the command"


def test_a_command_is_audited_also_while_the_log_is_away(telemetry_config: TelemetryConfig) -> None:
    away = msgspec.structs.replace(telemetry_config, redis_url="redis://127.0.0.1:1/0", append_timeout_s=0.2)
    record(away, "exported", "preferences")
    (folder,) = (telemetry_config.state_path / "outbox").iterdir()
    (segment,) = folder.glob("*.segment")
    (spooled,) = read_segment(segment)
    assert spooled.topic == AUDIT
