"""What other threads finish and the event loop waits for: all that comes together wakes it once.

``asyncio.wrap_future`` wakes the loop for each, and then the two threads take turns with the interpreter.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Landing:
    """Of one event loop."""

    def __init__(self) -> None:
        self._landed: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._is_woken = False

    async def of(self, work: Future[T]) -> T:
        """What ``work`` comes to, or its exception. Nobody who stops waiting stops the work."""
        loop = asyncio.get_running_loop()
        landed: asyncio.Future[Any] = loop.create_future()
        work.add_done_callback(lambda done: self._take(loop, landed, done))
        return cast(T, await landed)

    def _take(self, loop: asyncio.AbstractEventLoop, landed: asyncio.Future[Any], done: Future[Any]) -> None:
        """Any thread."""
        self._landed.append((landed, done))
        if not self._is_woken:
            self._is_woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._land)

    def _land(self) -> None:
        self._is_woken = False  # before the first is taken: what comes from here on wakes anew
        while self._landed:
            landed, done = self._landed.popleft()
            if landed.done():  # nobody waits any more
                continue
            if done.cancelled():
                landed.cancel()
            elif error := done.exception():
                landed.set_exception(error)
            else:
                landed.set_result(done.result())
