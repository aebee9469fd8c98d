"""Redis commands of many requests, sent together: what gathers while one pipeline is under way is the next.

A command alone in redis-py's asyncio client costs a request some tenth of its time, one in a pipeline a fifth of that.
Nobody waits for company: a command that finds no pipeline under way leaves in the same turn of the event loop. When a
pipeline fails, all that wait fail with it, so that a Redis that hangs costs each of them one time-out, not a queue's.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any, Final

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisAway
from redis.exceptions import NoScriptError, RedisError

MOST: Final = 64  # commands in one pipeline
Argument = str | bytes | int
Waiting = tuple[tuple[Argument, ...], asyncio.Future[Any]]


class Script:
    """A Lua script, which Redis knows by its SHA-1 once it has seen it."""

    def __init__(self, text: str) -> None:
        self.text, self.digest = text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class Gathered:
    """Commands in the order in which they were asked. Who shall not wait behind others' writes has one of its own."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: list[Waiting] = []
        self._sender: asyncio.Task[None] | None = None

    def ask(self, *command: Argument) -> asyncio.Future[Any]:
        """Redis's own answer to ``command``. Raises RedisError or OSError when awaited."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, answer))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return answer

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """What the script returns; sent whole to a Redis that does not know it (any more). Raises as ``ask``."""
        words = (len(keys), *keys, *arguments)
        try:
            return await self.ask("EVALSHA", script.digest, *words)
        except NoScriptError:
            return await self.ask("EVAL", script.text, *words)

    async def _send(self) -> None:
        batch: list[Waiting] = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
                _tell(batch, await self._results(batch))
        except (RedisError, OSError) as error:
            self._fail(batch, error)
        except BaseException:  # re-raised: cancelled, or what nobody thought of; those who wait must not wait for ever
            self._fail(batch, RedisAway("the commands were given up"))
            raise
        finally:
            self._sender = None

    async def _results(self, batch: list[Waiting]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for command, _ in batch:
            pipeline.execute_command(*command)
        try:
            return await pipeline.execute(raise_on_error=False)
        except RuntimeError as error:  # uvloop's word for a connection that was reset while it idled
            raise RedisAway(str(error)) from error

    def _fail(self, batch: list[Waiting], error: Exception) -> None:
        left, self._waiting = [*batch, *self._waiting], []
        _tell(left, [error] * len(left))


def packing(given: type[AbstractConnection]) -> type[AbstractConnection]:
    """``given`` with its commands packed by hiredis: redis-py does it in Python, in five times that."""

    class Packing(given):  # type: ignore[misc, valid-type]
        def pack_command(self, *args: Argument) -> list[bytes]:
            words = str(args[0]).split() if isinstance(args[0], str) else args[:1]  # "SCRIPT LOAD" is two
            return [hiredis.pack_command((*words, *args[1:]))]

    return Packing


def _tell(batch: list[Waiting], results: list[Any]) -> None:
    for (_, answer), result in zip(batch, results, strict=True):
        if answer.done():  # nobody waits any more
            continue
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)
