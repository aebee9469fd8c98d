"""What tests ask of other processes, which may end while they are looked at."""

from __future__ import annotations

import psutil


def command_line(process: psutil.Process) -> str:
    """Its words; "" where it has ended, a zombie included."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # ZombieProcess is one
        return ""
