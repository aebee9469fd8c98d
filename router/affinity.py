"""Which replica has read the beginning of a conversation before: its keys and values may still be there.

Only a hint. A prompt's prefixes end where its messages end, and belong to one version: another version's keys and
values are of no use. The least recently used are forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from telemetry.events import Message

CAPACITY = 16_384


def prefix_keys(version: str, messages: Sequence[Message]) -> list[int]:
    """A key for each prefix of the conversation, the longest first."""
    keys: list[int] = []
    key = hash(version)
    for message in messages:
        key = hash((key, message))
        keys.append(key)
    return keys[::-1]


class PrefixMemory:
    """Prefix → the replica that read it last."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._readers: OrderedDict[int, str] = OrderedDict()

    def readers(self, keys: Sequence[int]) -> list[str]:
        """Replicas that read a prefix, the one with the longest first."""
        return list(dict.fromkeys(self._readers[key] for key in keys if key in self._readers))

    def note(self, keys: Sequence[int], replica_id: str) -> None:
        """``replica_id`` reads this prompt now."""
        for key in reversed(keys):
            self._readers[key] = replica_id
            self._readers.move_to_end(key)
        while len(self._readers) > self._capacity:
            self._readers.popitem(last=False)
