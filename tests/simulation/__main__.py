"""``python -m tests.simulation --seeds 20000``: seed after seed on every core; the first that breaks is named."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.run import Broken, run_seed

CHUNK = 250


def some(first: int, count: int) -> tuple[int, list[str]]:
    """How many of these seeds held, and what broke."""
    logging.disable(logging.CRITICAL)
    loop, broken = asyncio.new_event_loop(), []
    try:
        for seed in range(first, first + count):
            try:
                run_seed(seed, loop)
            except Broken as error:
                broken.append(str(error))
            except Exception as error:  # noqa: BLE001  named with its seed, so that it can be looked at
                broken.append(f"seed {seed}: {type(error).__name__}: {error}")
    finally:
        loop.close()
    return count - len(broken), broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    begun, held, broken = time.monotonic(), 0, list[str]()
    firsts = range(options.first, options.first + options.seeds, CHUNK)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        last = options.first + options.seeds
        for count, faults in pool.map(some, firsts, [min(CHUNK, last - first) for first in firsts]):
            held += count
            broken += faults
    for fault in broken[:10]:
        print(fault, file=sys.stderr)
    print(
        json.dumps({"seeds": held + len(broken), "broken": len(broken), "seconds": round(time.monotonic() - begun, 1)})
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
