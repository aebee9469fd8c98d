"""Ids are made of bytes that nobody gets twice: not another thread, not a forked child."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from telemetry.randomness import BLOCK_BYTES, random_bytes


def test_no_bytes_are_given_out_twice_to_threads() -> None:
    with ThreadPoolExecutor(4) as pool:
        given = list(pool.map(lambda _: random_bytes(10), range(BLOCK_BYTES)))
    assert {len(part) for part in given} == {10}
    assert len(set(given)) == len(given)


def test_a_forked_child_draws_other_bytes_than_its_parent() -> None:
    script = """
import os
from telemetry.randomness import random_bytes
random_bytes(1)  # there is a block to share
reading, writing = os.pipe()
if os.fork() == 0:
    os.write(writing, random_bytes(16))
    os._exit(0)
print(os.read(reading, 16).hex(), random_bytes(16).hex())
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    childs, parents = told.stdout.split()
    assert len(childs) == len(parents) == 32
    assert childs != parents
