"""What every process of the stack does alike: announce readiness, hold a folder, own the deployment's key.

A ready-ack is a file ``<state>/run/<name>.ready`` with pid, url and time; the launcher waits for it.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import os
import sys
import tempfile
from contextlib import suppress
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import IO

import msgspec

from telemetry.events import utc_now

KEY_BYTES = 32


def announce_ready(state: Path, name: str, **info: str | int) -> None:
    """Tell the launcher that process ``name`` serves now. ``info`` holds e.g. url, metrics_url."""
    document = {"name": name, "pid": os.getpid(), "at": utc_now().isoformat(), **info}
    path = state / "run" / f"{name}.ready"
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(f".{os.getpid()}")
    staging.write_bytes(msgspec.json.encode(document))
    staging.rename(path)


class HeldByAnother(RuntimeError):
    """Another process holds a lock file."""

    def __init__(self, path: Path, pid: str) -> None:
        super().__init__(f"{path} is held by process {pid}")
        self.pid = pid


def hold(path: Path, *, wait: bool = False) -> IO[str]:
    """The lock file at ``path``: held until it is closed or this process ends, however that happens.

    Raises HeldByAnother, unless it is to ``wait``, and OSError where the file cannot be opened.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        with file:
            file.seek(0)
            raise HeldByAnother(path, file.read().strip() or "unknown") from error
    with suppress(OSError):  # a full disk: the lock is what counts, not who has it
        file.truncate(0)
        os.write(file.fileno(), str(os.getpid()).encode())
    return file


def keep_what_is_loaded() -> None:
    """Call when a process is about to serve: a collection over all that was loaded is felt as a slow click or token."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # at the end everything is let go as ever


def go_without(package: str) -> None:
    """From here on this process does as if ``package`` were not installed; call it before anything has loaded it."""

    class Refusal(MetaPathFinder):
        def find_spec(self, fullname: str, path: object, target: object = None) -> None:
            if fullname.partition(".")[0] == package:
                raise ModuleNotFoundError(f"this process does without {package}", name=fullname)

    sys.meta_path.insert(0, Refusal())


def signing_key(state: Path) -> bytes:
    """The deployment's 32-byte secret that signs versions and pair tokens."""
    return secret_file(state / "keys" / "signing.key")


def secret_file(path: Path) -> bytes:
    """The 32-byte secret in the file at ``path``, made on first use (mode 0600).

    Processes that start together agree: the file has its name only once it is whole. Raises ValueError for a torn one.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        _make_key(path)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ValueError(f"{path} has {len(key)} bytes instead of {KEY_BYTES}: restore it, or remove it for a new one")
    return key


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_key(path: Path) -> None:
    descriptor, staging = tempfile.mkstemp(dir=path.parent)  # its mode is 0600
    with os.fdopen(descriptor, "wb") as file:
        file.write(os.urandom(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    try:
        with suppress(FileExistsError):
            os.link(staging, path)
    finally:
        os.unlink(staging)
