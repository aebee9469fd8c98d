"""The closed loop's bars, by HTTP only, on the real model: ``make bench-loop``.

Stages on one running stack: a persona's verdicts, while versions are trained and swapped; stable against base on
prompts never asked, ``ANSWERS`` answers to each, right after the last verdict's version (a detail) and again when the
trainer has gone over all verdicts in the quiet that follows; then, with the first persona, further verdicts with a
thousand other chat requests beside them. The personas are those that nobody tuned on. Perplexity is the base model's,
over each answer given its prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.api import Api
from deploy.personas import EVALUATION_PROMPTS, HELD_OUT, PERSONAS, TRAINING_PROMPTS, choose
from deploy.simulate import MAX_TOKENS, Clicks, give_clicks, session
from deploy.status import fetch, numbers, read_ready
from telemetry.text import repetition_ratio, words
from tests.bench import record
from tests.bench.client import running_stack

VERDICTS, VERDICTS_BESIDE = 160, 80
USERS = 6
BACKGROUND_REQUESTS, BACKGROUND_USERS = 1000, 4
LIVE_LIMIT_S, REST_LIMIT_S = 240.0, 120.0
IDLE_S, REHEARSAL_LIMIT_S = 30.0, 900.0
ANSWERS = 3  # to each prompt: of one answer each, chance alone moves the ratio of repetitions by half (DECISIONS.md)
ASKED = EVALUATION_PROMPTS * ANSWERS


@dataclass
class Background:
    """Ordinary chat traffic during training and swaps; every second request streams."""

    served: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)

    async def ask_until_done(self, http: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
        while self.served + self.errors.total() < BACKGROUND_REQUESTS:
            body = {
                "model": "chat",
                "messages": [{"role": "user", "content": rng.choice(TRAINING_PROMPTS)}],
                "max_tokens": 8,
                "stream": rng.random() < 0.5,
            }
            try:
                async with http.post(f"{url}/v1/chat/completions", json=body) as response:
                    payload = await response.text()
            except (aiohttp.ClientError, TimeoutError) as error:
                self.errors[type(error).__name__] += 1
                continue
            if response.status != 200 or '"error"' in payload or (body["stream"] and "[DONE]" not in payload):
                self.errors[f"{response.status} {payload[:120]}"] += 1
                continue
            self.served += 1
            self.versions[response.headers["x-tiebreak-version"]] += 1


@dataclass(frozen=True)
class Journeys:
    """What became of verdicts: seconds from one stage to a later one, and how they ended."""

    times: list[dict[str, datetime]]  # of those that could become live; a refused one never did
    ends: Counter[str]

    def between(self, earlier: str, later: str) -> list[float]:
        """Infinite where the later stage was not reached."""
        return [(t[later] - t[earlier]).total_seconds() if later in t else float("inf") for t in self.times]


async def click_to_live(api: Api, ids: list[str]) -> Journeys:
    """Follow verdicts until each is live or dropped, or patience ends."""
    deadline = time.monotonic() + LIVE_LIMIT_S
    while True:
        receipts = [await api.receipt(preference_id) for preference_id in ids]
        ends = Counter(_end(receipt) for receipt in receipts)
        if not ends["waiting"] or time.monotonic() > deadline:
            break
        await asyncio.sleep(2.0)
    kept = [receipt for receipt in receipts if _end(receipt) in ("live", "waiting", "refused")]
    return Journeys([_stages(receipt) for receipt in kept], ends)


async def stable_version(api: Api) -> str:
    return str((await api.releases())["routing"]["policies"]["chat"][0]["stable"])


async def releases_at_rest(api: Api) -> None:
    """Until the last version is stable or gone: the controller waits for quiet before it decides."""
    deadline = time.monotonic() + REST_LIMIT_S
    while time.monotonic() < deadline:
        route = (await api.releases())["routing"]["policies"]["chat"][0]
        if not route.get("canary") and not route.get("shadow"):
            return
        await asyncio.sleep(1.0)


async def trainer_at_rest(state: Path) -> float:
    """Until the trainer has taken no step for IDLE_S: everything was gone over. The seconds it went on."""
    url, begun_s = str((read_ready(state / "run" / "trainer.ready") or {})["metrics_url"]), time.monotonic()
    steps, last_s = -1.0, begun_s
    while time.monotonic() - last_s < IDLE_S and time.monotonic() - begun_s < REHEARSAL_LIMIT_S:
        page = await asyncio.to_thread(fetch, url)
        now = numbers({"trainer": page.decode()})["train_steps"] if page else steps
        steps, last_s = now, time.monotonic() if now != steps else last_s
        await asyncio.sleep(1.0)
    return last_s - begun_s


def _end(receipt: dict[str, Any]) -> str:
    """live, waiting, or why it was dropped: a tie or a held-out verdict never can be live, a refused one could."""
    reasons = [stage.get("reason", "") for stage in receipt["stages"] if stage["stage"] == "dropped"]
    return "live" if "live" in _stages(receipt) else reasons[0] if reasons else "waiting"


def _stages(receipt: dict[str, Any]) -> dict[str, datetime]:
    return {stage["stage"]: datetime.fromisoformat(stage["at"]) for stage in receipt["stages"]}


async def answers(api: Api, model: str) -> list[str]:
    """``ANSWERS`` answers to each evaluation prompt; the same seeds for every model."""
    gate = asyncio.Semaphore(USERS)

    async def one(index: int, prompt: str) -> str:
        async with gate:
            answer = await api.ask(prompt, model=model, max_tokens=MAX_TOKENS, temperature=0.7, top_p=0.95, seed=index)
        return answer.texts[0]

    return await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(ASKED)))


def win_rates(persona: str, stable: list[str], base: list[str]) -> list[float]:
    """Of each round of answers to the prompts: the share in which the persona prefers stable; a tie counts half."""
    points = []
    for prompt, ours, theirs in zip(ASKED, stable, base, strict=True):
        verdict = choose(PERSONAS[persona], prompt, ours, theirs, random.Random(0))
        points.append({"a": 1.0, "b": 0.0}.get(verdict, 0.5))
    return _of_each_round(points)


def _of_each_round(values: list[float]) -> list[float]:
    size = len(EVALUATION_PROMPTS)
    return [statistics.mean(values[first : first + size]) for first in range(0, len(values), size)]


def perplexity(texts: list[str], folder: str) -> float:
    """exp of the mean negative log-prob per token under the base model, over all answers given their prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for prompt, text in zip(ASKED, texts, strict=True):
        chat = [{"role": "user", "content": prompt}]
        head = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        tail = tokenizer(text, add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        total -= logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum().item()
        count += len(tail)
    return float(torch.tensor(total / count).exp())


def language_ratios(stable: list[str], base: list[str], folder: str) -> dict[str, float]:
    """Stable's repetition, length (either way) and perplexity as multiples of base's own.

    Repetition is compared from a floor of 0.02: base's short answers hardly repeat anything.
    """

    def mean_of(texts: list[str]) -> tuple[float, float]:
        repetition = statistics.mean(repetition_ratio(text) for text in texts)
        return max(repetition, 0.02), statistics.mean(len(words(text)) for text in texts)

    (repetition, length), (base_repetition, base_length) = mean_of(stable), mean_of(base)
    return {
        "repetition": repetition / base_repetition,
        "length": max(length / base_length, base_length / length),
        "perplexity": perplexity(stable, folder) / perplexity(base, folder),
    }


def base_folder(state: Path) -> str:
    """The base model's folder, from the configuration that the stack runs with."""
    run = tomllib.loads((state / "run" / "config.toml").read_text())
    return str(next(iter(run["serving"]["bases"].values()))["model"])


async def run(persona: str, seed: int, *, with_traffic: bool) -> dict[str, Any]:
    """All stages on one stack."""
    async with running_stack() as (api, state, url), session() as http:
        clicks = await give_clicks(api, persona, Clicks(VERDICTS), users=USERS, seed=seed)
        journeys = await click_to_live(api, clicks.preference_ids)
        await releases_at_rest(api)
        met = [await stable_version(api)]
        early, base = await answers(api, "chat@stable"), await answers(api, "chat@base")
        rehearsed_s = await trainer_at_rest(state)
        await releases_at_rest(api)
        met.append(await stable_version(api))
        stable = await answers(api, "chat@stable")
        folder = base_folder(state)
        beside = await beside_traffic(api, http, url, persona, seed + 1) if with_traffic else {}
    return {
        "journeys": journeys,
        "choices": dict(clicks.choices),
        "win_rates": win_rates(persona, stable, base),
        "win_rates_before_rehearsal": win_rates(persona, early, base),
        "rehearsed_s": rehearsed_s,
        "language": language_ratios(stable, base, folder),
        "repetitions": {
            whose: _of_each_round([repetition_ratio(text) for text in texts])
            for whose, texts in (("stable", stable), ("base", base))
        },
        "stable_versions": met,
        "sample": stable[:3],
        **beside,
    }


async def beside_traffic(api: Api, http: aiohttp.ClientSession, url: str, persona: str, seed: int) -> dict[str, Any]:
    """Verdicts with other chat requests beside them, until both are through."""
    traffic = Background()
    asking = [asyncio.create_task(traffic.ask_until_done(http, url, random.Random(i))) for i in range(BACKGROUND_USERS)]
    clicks = await give_clicks(api, persona, Clicks(VERDICTS_BESIDE), users=USERS, seed=seed)
    journeys = await click_to_live(api, clicks.preference_ids)
    await asyncio.gather(*asking)
    return {"traffic": traffic, "journeys_beside": journeys}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--personas", nargs="+", default=list(HELD_OUT), choices=list(PERSONAS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--further", action="store_true", help="add personas to what was measured: without other traffic"
    )
    arguments = parser.parse_args()
    rows = record.rows("loop") if arguments.further else []
    for number, persona in enumerate(arguments.personas):
        with_traffic = number == 0 and not arguments.further
        result = await run(persona, arguments.seed, with_traffic=with_traffic)
        rows += rows_of(persona, result)
        if with_traffic:
            rows += traffic_rows(result)
        record.save("loop", "make bench-loop", rows)


def rows_of(persona: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    worst = max(result["language"].values())
    return [
        record.row(
            f"win rate against base on {len(EVALUATION_PROMPTS)} new prompts after {VERDICTS} verdicts, {persona}",
            statistics.mean(result["win_rates"]),
            "",
            bar=0.7,
            better="higher",
            choices=result["choices"],
            ends=dict(result["journeys"].ends),
            of_each_round=result["win_rates"],
            before_rehearsal=statistics.mean(result["win_rates_before_rehearsal"]),
            rehearsed_s=result["rehearsed_s"],
            stable_versions=result["stable_versions"],
            sample=result["sample"],
        ),
        record.row(
            f"worst of repetition, length, perplexity against base, {persona}",
            worst,
            "×",
            bar=1.5,
            better="lower",
            **result["language"],
            repetition_of_each_round=result["repetitions"],
        ),
        live_row(persona, result["journeys"]),
    ]


def live_row(whose: str, journeys: Journeys) -> dict[str, Any]:
    live, trained = journeys.between("accepted", "live"), journeys.between("accepted", "trained")
    return record.row(
        f"click → version live, median, {whose}",
        statistics.median(live) if live else float("inf"),
        "s",
        bar=60.0,
        better="lower",
        p90=record.quantile(live, 0.9) if live else None,
        until_trained=statistics.median(trained) if trained else None,
        clicks=len(live),
    )


def traffic_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    traffic: Background = result["traffic"]
    return [
        live_row(f"beside {BACKGROUND_REQUESTS} other requests", result["journeys_beside"]),
        record.row(
            f"failed of {BACKGROUND_REQUESTS} chat requests during training and swaps",
            traffic.errors.total(),
            "",
            bar=0,
            better="lower",
            served=traffic.served,
            errors=dict(traffic.errors),
            versions=len(traffic.versions),
        ),
    ]


if __name__ == "__main__":
    asyncio.run(main())
