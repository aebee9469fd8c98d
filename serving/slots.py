"""Which version sits in which adapter slot, and how many requests each one answers. Pure bookkeeping.

A version goes reserve → ready → drain → free; requests pin it while they run. Slot 0 is the base: always
ready, never freed. Called from the event loop and from the engine's thread, so every step takes the lock.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from serving.errors import InvalidRequest, NoFreeSlot, VersionNotReady, VersionUnknown

REMEMBERED_FAILURES = 32


@dataclass(slots=True)
class Held:
    """One version in one slot."""

    version: str
    slot: int
    state: Literal["loading", "ready", "draining"]
    in_flight: int = 0
    idle: Future[None] = field(default_factory=Future)  # resolves when draining and nothing is in flight


class SlotTable:
    """``slots`` counts adapter slots; the base's slot 0 comes on top."""

    def __init__(self, slots: int, base_version: str) -> None:
        self.base_version = base_version
        self._lock = threading.Lock()
        self._free = list(range(slots, 0, -1))
        self._held = {base_version: Held(base_version, 0, "ready")}
        self._failed: OrderedDict[str, str] = OrderedDict()

    def reserve(self, version: str) -> int | None:
        """A free slot for ``version``, now loading; None when the version is ready already."""
        with self._lock:
            held = self._held.get(version)
            if held is not None and held.state == "ready":
                return None
            if held is not None:
                raise VersionNotReady(f"{version} is {held.state}; ask again when it is done")
            if not self._free:
                names = ", ".join(v for v in self._held if v != self.base_version)
                raise NoFreeSlot(f"no free adapter slot for {version}: {names} are held; unload one first")
            slot = self._free.pop()
            self._held[version] = Held(version, slot, "loading")
            return slot

    def set_ready(self, version: str) -> None:
        with self._lock:
            self._held[version].state = "ready"
            self._failed.pop(version, None)

    def fail(self, version: str, reason: str) -> None:
        """Give the slot of a version that did not become ready back, and remember why."""
        with self._lock:
            held = self._held.pop(version, None)
            if held is not None:
                self._free.append(held.slot)
            self._failed[version] = reason
            while len(self._failed) > REMEMBERED_FAILURES:
                self._failed.popitem(last=False)

    def pin(self, version: str, *, is_warming: bool = False) -> int:
        """The slot of a ready version, held until ``unpin``; warming may pin a loading one."""
        with self._lock:
            held = self._held.get(version)
            wanted = "loading" if is_warming else "ready"
            if held is None or held.state != wanted:
                state = "not loaded" if held is None else held.state
                raise VersionNotReady(f"{version} is {state} here")
            held.in_flight += 1
            return held.slot

    def unpin(self, version: str) -> None:
        with self._lock:
            held = self._held.get(version)
            if held is None:  # a warming request that outlived its failed load
                return
            held.in_flight -= 1
            is_idle = held.state == "draining" and held.in_flight == 0
        if is_idle:
            held.idle.set_result(None)

    def drain(self, version: str) -> Future[None]:
        """Take no further request for a ready version; resolves once none is in flight."""
        if version == self.base_version:
            raise InvalidRequest(f"{version} is the base model itself and cannot be unloaded")
        with self._lock:
            held = self._held.get(version)
            if held is None:
                raise VersionUnknown(f"{version} is not loaded here")
            if held.state == "loading":
                raise VersionNotReady(f"{version} is loading; unload it when it is ready")
            is_first = held.state == "ready"
            held.state = "draining"
            is_idle = is_first and held.in_flight == 0
        if is_idle:
            held.idle.set_result(None)
        return held.idle

    def slot_of(self, version: str) -> int | None:
        """The slot a version sits in, None when it is not held."""
        with self._lock:
            held = self._held.get(version)
            return held.slot if held else None

    def free(self, version: str) -> int | None:
        """Give a drained version's slot back: the slot, or None when someone else did."""
        with self._lock:
            held = self._held.get(version)
            if held is None or held.state != "draining" or held.in_flight:
                return None
            del self._held[version]
            self._free.append(held.slot)
            return held.slot

    def names(self, state: str) -> tuple[str, ...]:
        with self._lock:
            return tuple(held.version for held in self._held.values() if held.state == state)

    def failed(self) -> dict[str, str]:
        with self._lock:
            return dict(self._failed)

    def in_flight(self) -> dict[str, int]:
        with self._lock:
            return {held.version: held.in_flight for held in self._held.values() if held.in_flight}

    def free_slots(self) -> int:
        with self._lock:
            return len(self._free)
