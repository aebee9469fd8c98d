"""Random bytes of the operating system, fetched in blocks: a call for each id costs a switch between threads."""

from __future__ import annotations

import os
import threading
from typing import Final

BLOCK_BYTES: Final = 4096

_lock = threading.Lock()
_block = b""


def random_bytes(count: int) -> bytes:
    """``count`` (at most BLOCK_BYTES) bytes that were never given out before, as good as ``os.urandom``'s."""
    global _block
    with _lock:
        if len(_block) < count:
            _block = os.urandom(BLOCK_BYTES)
        given, _block = _block[:count], _block[count:]
    return given


def _forget() -> None:
    """A forked child must not give out its parent's bytes, nor wait for a lock that nobody in it holds."""
    global _lock, _block
    _lock, _block = threading.Lock(), b""


os.register_at_fork(after_in_child=_forget)
