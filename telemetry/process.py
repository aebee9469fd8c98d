"""What every process of the stack does alike: announce readiness, own the deployment's key.

A ready-ack is a file ``<state>/run/<name>.ready`` with pid, url and time; the launcher waits for it.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from telemetry.events import utc_now


def announce_ready(state: Path, name: str, **info: str | int) -> None:
    """Tell the launcher that process ``name`` serves now. ``info`` holds e.g. url, metrics_url."""
    document = {"name": name, "pid": os.getpid(), "at": utc_now().isoformat(), **info}
    path = state / "run" / f"{name}.ready"
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".{os.getpid()}")
    staging.write_bytes(msgspec.json.encode(document))
    staging.rename(path)


def signing_key(state: Path) -> bytes:
    """The deployment's 32-byte secret in ``<state>/keys/signing.key``, made on first use (mode 0600)."""
    path = state / "keys" / "signing.key"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(descriptor, "wb") as file:
        key = os.urandom(32)
        file.write(key)
    return key
