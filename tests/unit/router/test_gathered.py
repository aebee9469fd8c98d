"""Commands as hiredis packs them are those that redis-py packs."""

from __future__ import annotations

import pytest
from redis.asyncio.connection import UnixDomainSocketConnection

from router.gathered import Argument, packing


@pytest.mark.parametrize(
    "command",
    [
        ("GET", "k"),
        ("SET", "schlüssel", b"\x00\xff\r\n", "EX", 3600),
        ("EVALSHA", "ab" * 20, 2, "a", "b", b"x" * 100_000, 0, -1, ""),
        ("SCRIPT LOAD", "return 1"),
        (b"GET", "k"),
    ],
)
def test_the_same_bytes_leave(command: tuple[Argument, ...]) -> None:
    connection = packing(UnixDomainSocketConnection)(path="nowhere")
    theirs = UnixDomainSocketConnection(path="nowhere").pack_command(*command)
    assert b"".join(connection.pack_command(*command)) == b"".join(theirs)
    assert b"".join(connection.pack_commands([command] * 3)) == 3 * b"".join(theirs)
