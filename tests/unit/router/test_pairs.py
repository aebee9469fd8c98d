"""Pair tokens, derived ids, and the pairs that are remembered here."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.errors import InvalidToken
from router.gathered import Argument, Gathered
from router.pairs import (
    PAIR_KEY,
    PairMemory,
    RememberedPair,
    Ticket,
    derived_id,
    preference_id,
    pseudonym,
    read_ticket,
    sign_ticket,
)  # fmt: skip
from telemetry.events import Completion, PairShown

KEY = b"k" * 32
TICKET = Ticket("pair-1", "0123456789abcdef", 1_800_000_000.5)


def test_a_token_tells_what_was_signed() -> None:
    assert read_ticket(KEY, sign_ticket(KEY, TICKET), "pair-1") == TICKET


def test_a_token_of_another_deployments_key_is_refused() -> None:
    with pytest.raises(InvalidToken):
        read_ticket(KEY, sign_ticket(b"other" * 8, TICKET), "pair-1")


def test_a_token_is_good_for_its_own_pair_only() -> None:
    with pytest.raises(InvalidToken):
        read_ticket(KEY, sign_ticket(KEY, TICKET), "pair-2")


def test_any_changed_character_makes_a_token_invalid() -> None:
    token = sign_ticket(KEY, TICKET)
    for place, character in enumerate(token):
        forged = token[:place] + ("A" if character != "A" else "B") + token[place + 1 :]
        with pytest.raises(InvalidToken):
            read_ticket(KEY, forged, "pair-1")


@pytest.mark.parametrize("token", ["", ".", "a.b", "é.ü", "." * 100, "bm90IGpzb24.00"])
def test_rubbish_is_an_invalid_token(token: str) -> None:
    with pytest.raises(InvalidToken):
        read_ticket(KEY, token, "pair-1")


def test_a_pair_has_one_preference_id_and_every_pair_another() -> None:
    assert preference_id("pair-1") == preference_id("pair-1")
    assert preference_id("pair-1") != preference_id("pair-2")
    assert derived_id("retracted", "x") != derived_id("feedback", "x")


def test_a_pseudonym_depends_on_key_and_user_and_hides_both() -> None:
    assert pseudonym(KEY, "ann") == pseudonym(KEY, "ann") != pseudonym(KEY, "bob")
    assert pseudonym(KEY, "ann") != pseudonym(b"x" * 32, "ann")
    assert len(pseudonym(KEY, "ann")) == 16 and "ann" not in pseudonym(KEY, "ann")
    assert pseudonym(KEY, "") == ""


async def test_the_last_pairs_shown_here_are_known_without_asking_redis() -> None:
    kept: list[str] = []

    class Writes(Gathered):
        def ask(self, *command: Argument) -> asyncio.Future[Any]:
            kept.append(str(command[1]))
            done = asyncio.get_running_loop().create_future()
            done.set_result(b"OK")
            return done

    redis: Any = None  # nothing is read
    memory = PairMemory(redis, Writes(redis), 60, recent=2)
    side = Completion("c", "text", "main", "v", "stable", "stop", 1, 1, 0.1, 0.1, 1.0, 1.0)
    for name in ("one", "two", "three"):
        shown = PairShown(
            pair_id=name, request_id="r", policy="chat", user="u", prompt=(), a=side, b=side, propensity=1.0
        )
        await memory.remember(RememberedPair(shown, "caller"))
    assert memory.recent("one") is None, "the oldest made room"
    assert [memory.recent(name) is not None for name in ("two", "three")] == [True, True]
    assert await memory.recall("three") is memory.recent("three")
    assert kept == [PAIR_KEY + name for name in ("one", "two", "three")], "Redis knows them all"
