from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from router.landing import Landing


class Counting(asyncio.SelectorEventLoop):
    """Counts how often another thread woke it."""

    woken = 0

    def call_soon_threadsafe(self, *arguments: Any, **named: Any) -> Any:
        self.woken += 1
        return super().call_soon_threadsafe(*arguments, **named)


def in_a_thread(*acts: Any) -> None:
    """All of ``acts``, one after the other, while the loop stands still."""
    thread = threading.Thread(target=lambda: [act() for act in acts])
    thread.start()
    thread.join()


def test_what_comes_together_wakes_the_loop_once() -> None:
    loop, landing = Counting(), Landing()

    async def ten_twice() -> list[int]:
        found = list[int]()
        for _ in range(2):
            works = [Future[int]() for _ in range(10)]
            waiting = [asyncio.create_task(landing.of(work)) for work in works]
            await asyncio.sleep(0)
            in_a_thread(*(lambda work=work, n=n: work.set_result(n) for n, work in enumerate(works)))
            found += await asyncio.gather(*waiting)
        return found

    assert loop.run_until_complete(ten_twice()) == [*range(10), *range(10)]
    assert loop.woken == 2
    loop.close()


async def test_an_error_is_the_waiters_and_who_has_left_is_left_alone() -> None:
    landing = Landing()
    failing, abandoned, done = Future[int](), Future[int](), Future[int]()
    done.set_result(3)
    assert await landing.of(done) == 3
    leaving = asyncio.create_task(landing.of(abandoned))
    waiting = asyncio.create_task(landing.of(failing))
    await asyncio.sleep(0)
    leaving.cancel()
    in_a_thread(lambda: abandoned.set_result(1), lambda: failing.set_exception(OSError("full")))
    with pytest.raises(OSError, match="full"):
        await asyncio.wait_for(waiting, 5)
    assert leaving.cancelled() and abandoned.result() == 1


def test_work_that_ends_after_its_loop_is_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    loop, landing, work = asyncio.new_event_loop(), Landing(), Future[int]()
    waiting = loop.create_task(landing.of(work))
    loop.run_until_complete(asyncio.sleep(0))
    waiting.cancel()
    loop.run_until_complete(asyncio.gather(waiting, return_exceptions=True))
    loop.close()
    work.set_result(1)
    assert not caplog.records
