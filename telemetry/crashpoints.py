"""Named points where tests stop a process, to see what is lost when it ends or hangs exactly there.

``reach`` does nothing unless TIEBREAK_CRASH_POINTS names a folder. There ``<point>.armed`` stops the first process
that reaches the point (SIGSTOP), which leaves ``<point>.reached`` with its process id; whoever armed it decides what
happens (tests/chaos). Every point stands between two effects of which a crash can leave the first without the
second.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

ENVIRONMENT: Final = "TIEBREAK_CRASH_POINTS"
POINTS: Final = (
    "router.pair_remembered",
    "router.verdict_claimed",
    "router.verdict_durable",
    "router.verdict_marked",
    "producer.handing_over",
    "producer.acknowledged",
    "outbox.writing",
    "outbox.synced",
    "outbox.sent",
    "recorder.read",
    "recorder.topic_committed",
    "recorder.committed",
    "recorder.projected",
    "trainer.stepped",
    "trainer.checkpoint_staged",
    "trainer.checkpointed",
    "trainer.told",
    "publisher.staged",
    "publisher.written",
)
_FOLDER: Final = os.environ.get(ENVIRONMENT, "")


def reach(point: str) -> None:
    """Stop here if a test wants it."""
    if not _FOLDER:
        return
    reached = Path(_FOLDER, f"{point}.reached.{os.getpid()}")
    try:
        os.rename(Path(_FOLDER, f"{point}.armed"), reached)
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGSTOP)
