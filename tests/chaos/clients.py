"""People who click over HTTP while everything breaks: a verdict is sent again and again until it is acknowledged."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import aiohttp

from router.pairs import preference_id
from tests.chaos.history import Verdicts

USERS = 4
GIVE_UP_S = 90.0
TIMEOUT = aiohttp.ClientTimeout(total=40.0)
NOT_NOW = 503, 502, 504, 429, 500


class Clients(threading.Thread):
    """Users in an event loop of their own, until ``over`` is set."""

    def __init__(self, url: str, verdicts: Verdicts, pause_s: float) -> None:
        super().__init__(name="chaos-clients", daemon=True)
        self._url, self._verdicts, self._pause_s = url, verdicts, pause_s
        self.over = threading.Event()

    def run(self) -> None:
        asyncio.run(self._users())

    async def _users(self) -> None:
        async with aiohttp.ClientSession(self._url, timeout=TIMEOUT) as http:
            await asyncio.gather(*(self._user(http, number) for number in range(USERS)))

    async def _user(self, http: aiohttp.ClientSession, number: int) -> None:
        dice, user = random.Random(number), f"user-{number}"
        await self._until_done(http, "PUT", f"/v1/users/{user}/consent", {"pairing": True})
        count = 0
        while not self.over.is_set():
            count += 1
            question = {"role": "user", "content": f"{user} asks {count}"}
            ask = {"model": "chat", "messages": [question], "user": user, "preference": {"pair": "always"}}
            status, answer = await self._call(http, "POST", "/v1/chat/completions", ask)
            if status == 200 and answer.get("preference"):
                await self._judge(http, answer["preference"], dice.choice(("a", "b", "a", "b", "tie")))
            await asyncio.sleep(self._pause_s)

    async def _judge(self, http: aiohttp.ClientSession, offer: dict[str, Any], choice: str) -> None:
        name = preference_id(offer["pair_id"])
        with self._verdicts.lock:
            self._verdicts.tried.add(name)
        body = {"pair_id": offer["pair_id"], "token": offer["token"], "choice": choice}
        status, _ = await self._until_done(http, "POST", "/v1/preferences", body)
        if status not in (200, 201):
            with self._verdicts.lock:
                if status not in (0, *NOT_NOW):
                    self._verdicts.refused.add(f"{name}: {status}")
            return
        with self._verdicts.lock:
            self._verdicts.acknowledged.add(name)
        status, _ = await self._until_done(http, "GET", f"/v1/preferences/{name}", None)
        if status == 404:
            with self._verdicts.lock:
                self._verdicts.stale.add(name)

    async def _until_done(self, http: aiohttp.ClientSession, method: str, path: str, body: Any) -> tuple[int, Any]:
        """The same request until it is answered with anything but "not now"."""
        deadline = asyncio.get_running_loop().time() + GIVE_UP_S
        while True:
            status, answer = await self._call(http, method, path, body)
            if status not in (0, *NOT_NOW) or asyncio.get_running_loop().time() > deadline:
                return status, answer
            await asyncio.sleep(0.2)

    async def _call(self, http: aiohttp.ClientSession, method: str, path: str, body: Any) -> tuple[int, Any]:
        """(status, body); status 0 where no answer came."""
        try:
            async with http.request(method, path, json=body) as response:
                return response.status, await response.json()
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return 0, {}
