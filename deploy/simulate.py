"""Simulated users: a persona asks, gets two answers, and clicks what it prefers. By HTTP only, as real users do.

Afterwards, or in between, the persona compares a version with ``chat@base`` on prompts that nobody trained on: stable,
or the canary that learned from the clicks, which may take its place later.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import aiohttp
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.api import Answer, Api, ApiError
from deploy.personas import EVALUATION_PROMPTS, PERSONAS, TRAINING_PROMPTS, choose
from deploy.view import console
from telemetry.manifest import is_base

MAX_TOKENS = 48
ANSWER_TIMEOUT_S = 120.0
RETRY_S = 1.0
LAST_CLICKS = 8  # that are asked about until they are live
NOT_FOUND = 404  # a version that is not loaded any more
LONGEST_OUTAGE_S = 120.0
LIVE_WAIT_S = 90.0  # for the last clicks to be in a version that users meet
Result = TypeVar("Result")


@dataclass
class Clicks:
    """What simulated users did so far."""

    wanted: int
    given: int = 0
    choices: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    preference_ids: list[str] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.given >= self.wanted


@dataclass(frozen=True)
class Comparison:
    """A version against base, as the persona sees it."""

    wins: int
    losses: int
    ties: int
    version: str

    @property
    def win_rate(self) -> float:
        """Share of prompts on which the version is preferred; a tie counts half."""
        total = self.wins + self.losses + self.ties
        return (self.wins + self.ties / 2) / total if total else 0.5


async def give_clicks(
    api: Api,
    persona: str,
    clicks: Clicks,
    *,
    users: int,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    on_click: Callable[[Clicks], None] = lambda _: None,
) -> Clicks:
    """``users`` at once click until ``clicks.wanted`` verdicts are acknowledged; outages are waited out."""
    rng = random.Random(seed)
    prompts = itertools.cycle(rng.sample(TRAINING_PROMPTS, len(TRAINING_PROMPTS)))
    places = iter(range(clicks.wanted))

    async def one_user(user: str) -> None:
        await _patiently(clicks, partial(api.consent, user))
        for _ in places:
            prompt, pair = await _next_pair(api, user, prompts, clicks, max_tokens)
            choice = choose(PERSONAS[persona], prompt, pair.texts[0], pair.texts[1], rng)
            receipt = await _patiently(clicks, partial(api.click, pair, choice))
            clicks.given += 1
            clicks.choices[choice] += 1
            clicks.preference_ids.append(receipt["id"])
            on_click(clicks)

    await asyncio.gather(*(one_user(f"{persona}-{number}") for number in range(users)))
    return clicks


async def _next_pair(
    api: Api, user: str, prompts: Iterator[str], clicks: Clicks, max_tokens: int
) -> tuple[str, Answer]:
    """Ask until two answers came: where one side failed, the other came as a single answer."""
    while True:
        prompt = next(prompts)
        ask = partial(api.ask, prompt, user=user, pair="always", max_tokens=max_tokens)
        answer = await _patiently(clicks, ask)
        if answer.is_pair:
            return prompt, answer
        clicks.failures["single answer"] += 1


async def _patiently(clicks: Clicks, request: Callable[[], Awaitable[Result]]) -> Result:
    """``request`` again while the gateway is away or asks for patience; the same verdict twice counts once."""
    for left in range(int(LONGEST_OUTAGE_S / RETRY_S), -1, -1):
        try:
            return await request()
        except ApiError as error:
            if not (error.status == 0 or error.status == 429 or error.status >= 500) or not left:
                raise
            clicks.failures[error.code or "unreachable"] += 1
            await asyncio.sleep(RETRY_S)
    raise AssertionError("unreachable: the last try returns or raises")


async def compare(
    api: Api,
    persona: str,
    prompts: Sequence[str] = EVALUATION_PROMPTS,
    *,
    users: int,
    policy: str = "chat",
    pin: str = "stable",
    max_tokens: int = MAX_TOKENS,
    base_answers: dict[str, str] | None = None,
) -> Comparison:
    """``pin`` (a channel or a version) and base answer every prompt with the same seed and temperature; one is picked.

    ``base_answers`` (prompt → text) is filled and used again: the base does not change.
    """
    gate = asyncio.Semaphore(users)
    known = {} if base_answers is None else base_answers

    async def answer(channel: str, index: int, prompt: str) -> Answer:
        async with gate:
            return await api.ask(
                prompt, model=f"{policy}@{channel}", max_tokens=max_tokens, temperature=0.7, top_p=0.95, seed=index
            )

    async def judge(index: int, prompt: str) -> tuple[str, str]:
        if prompt not in known:
            known[prompt] = (await answer("base", index, prompt)).texts[0]
        own = await answer(pin, index, prompt)
        verdict = choose(PERSONAS[persona], prompt, own.texts[0], known[prompt], random.Random(index))
        return verdict, own.version

    judged = await asyncio.gather(*(judge(index, prompt) for index, prompt in enumerate(prompts)))
    verdicts = Counter(verdict for verdict, _ in judged)
    versions = Counter(version for _, version in judged)
    wins, losses = verdicts["a"], verdicts["b"]
    return Comparison(wins, losses, len(judged) - wins - losses, versions.most_common(1)[0][0])


async def _live_versions(api: Api, preference_ids: Sequence[str]) -> dict[str, str]:
    """Of each click that is in a version which users meet, that version; the last ones are waited for."""
    ends = {"live", "dropped", "retracted"}

    async def stages(preference_id: str) -> dict[str, str]:
        timeline = (await api.receipt(preference_id))["stages"]
        return {stage["stage"]: stage.get("version", "") for stage in timeline}

    deadline = time.monotonic() + LIVE_WAIT_S
    while time.monotonic() < deadline:
        if all([ends & (await stages(name)).keys() for name in preference_ids[-LAST_CLICKS:]]):
            break
        await asyncio.sleep(RETRY_S)
    found = {name: (await stages(name)).get("live", "") for name in preference_ids}
    return {name: version for name, version in found.items() if version}


async def _compare_newest(api: Api, persona: str, newest: str, *, users: int) -> Comparison:
    """The newest version that knows clicks, while it is loaded; else stable."""
    try:
        return await compare(api, persona, users=users, pin=newest or "stable")
    except ApiError as error:
        if error.status != NOT_FOUND:
            raise
        return await compare(api, persona, users=users)


def session() -> aiohttp.ClientSession:
    """A client session whose requests end."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S))


async def simulate(url: str, persona: str, wanted: int, *, users: int, seed: int = 0, key: str = "") -> int:
    """What ``tiebreak simulate`` does; the exit status. Raises ApiError where the gateway is away from the start."""
    out = console()
    clicks = Clicks(wanted)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with session() as http:
        api = Api(http, url, key=key)
        await api.models()
        with Progress(*columns, console=out) as progress:
            task = progress.add_task(f"{persona} clicks", total=wanted)
            await give_clicks(
                api,
                persona,
                clicks,
                users=users,
                seed=seed,
                on_click=lambda c: progress.update(task, completed=c.given),
            )
        out.print("waiting until the last clicks are in a version that users meet …")
        live = await _live_versions(api, clicks.preference_ids)
        newest = max(live.values(), default="")
        out.print(f"comparing with base on {len(EVALUATION_PROMPTS)} new prompts, for a minute or two …")
        result = await _compare_newest(api, persona, newest, users=users)
    known = sum(version <= result.version for version in live.values())
    out.print(f"clicks: {dict(clicks.choices)}" + (f", retried: {dict(clicks.failures)}" if clicks.failures else ""))
    out.print(
        f"{result.version} against base on {len(EVALUATION_PROMPTS)} new prompts: {result.wins} won, "
        f"{result.losses} lost, {result.ties} tied, win rate {result.win_rate:.2f}"
    )
    out.print(
        f"{known} of these {clicks.given} clicks went live in it or an earlier one (ties teach nothing, a tenth judges)"
    )
    if is_base(result.version):
        out.print(
            "stable is the base itself still: no version has won its place yet (`tiebreak releases list` says why)"
        )
    return 0
