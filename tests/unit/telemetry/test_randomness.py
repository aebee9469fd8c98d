"""Ids are made of bytes that nobody gets twice: not another thread, not a forked child."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from telemetry.randomness import BLOCK_BYTES, random_bytes


def test_no_bytes_are_given_out_twice_to_threads() -> None:
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(lambda _: random_bytes(10), range(BLOCK_BYTES)))
    assert {len(part) for part in given} == {10}
    assert len(set(given)) == len(given)


def test_a_forked_child_draws_other_bytes_than_its_parent() -> None:
    random_bytes(1)  # there is a block to share
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, random_bytes(16))
        os._exit(0)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        os.close(writing)
        assert pipe.read() != random_bytes(16)
