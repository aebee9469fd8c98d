"""A process that appends numbered events as fast as it is told, through the outbox: ``python -m tests.chaos.writer``.

Each life of the process is a writer of its own. What it tries and what is acknowledged it writes into its history
before and after; a killed process loses nothing of that, since the kernel has it.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from telemetry.config import TelemetryConfig, open_log
from telemetry.configuration import read_table
from telemetry.events import TOPIC_OF, CompletionServed, encode, key_of
from telemetry.outbox import OutboxLog

KEYS = 16
MOST_UNDER_WAY = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--per-second", type=int, required=True)
    options = parser.parse_args()
    telemetry = read_table(options.config, "telemetry", TelemetryConfig)
    outbox = OutboxLog(open_log(telemetry), telemetry.state_path / "outbox" / "writer")
    name = f"writer-{uuid.uuid4().hex[:12]}"
    history = os.open(options.history / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    free = threading.Semaphore(MOST_UNDER_WAY)

    def settle(event_id: str, done: Future[Any]) -> None:
        free.release()
        if done.exception() is None:
            os.write(history, f"done {event_id}\n".encode())

    number, begun = 0, time.monotonic()
    while True:
        number += 1
        key = f"{name}-{number % KEYS}"
        event = CompletionServed(
            completion_id=key, request_id=name, policy="chat", variant="chat-main", version="v000000-00000000",
            channel="base", finish_reason="stop", prompt_tokens=number,
        )  # fmt: skip
        free.acquire()
        os.write(history, f"try {event.event_id} {key} {number}\n".encode())
        done = outbox.append(TOPIC_OF[type(event)], key_of(event), encode(event))
        done.add_done_callback(lambda done, name=event.event_id: settle(name, done))  # type: ignore[misc]
        ahead = number / options.per_second - (time.monotonic() - begun)
        if ahead > 0:
            time.sleep(ahead)
        elif ahead < -1.0:  # it was away: no burst afterwards
            begun, number = time.monotonic(), number
            begun -= number / options.per_second


if __name__ == "__main__":
    main()
