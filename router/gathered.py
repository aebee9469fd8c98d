"""Redis commands of many requests, sent together: what gathers while one pipeline is under way is the next.

A command alone in redis-py's asyncio client costs a request some tenth of its time, one in a pipeline a fifth of that.
Nobody waits for company: a command that finds no pipeline under way leaves in the same turn of the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

MOST: Final = 64  # commands in one pipeline
Argument = str | bytes | int


class Gathered:
    """Commands in the order in which they were asked. Reads shall not wait for writes to be synced: one each."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: list[tuple[tuple[Argument, ...], asyncio.Future[Any]]] = []
        self._sender: asyncio.Task[None] | None = None

    def ask(self, *command: Argument) -> asyncio.Future[Any]:
        """Redis's own answer to ``command``. Raises RedisError or OSError when awaited."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, answer))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return answer

    async def _send(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            pipeline = self._redis.pipeline(transaction=False)
            for command, _ in batch:
                pipeline.execute_command(*command)
            try:
                results = await pipeline.execute(raise_on_error=False)
            except (RedisError, OSError) as error:
                results = [error] * len(batch)
            for (_, answer), result in zip(batch, results, strict=True):
                if answer.done():  # nobody waits any more
                    continue
                if isinstance(result, Exception):
                    answer.set_exception(result)
                else:
                    answer.set_result(result)
        self._sender = None
