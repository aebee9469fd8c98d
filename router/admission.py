"""Who may come in, and how many at once: keys, roles, the open mode's limits, concurrency.

A key file is TOML, one ``[[keys]]`` per caller with ``name``, ``sha256`` (hex of the key's SHA-256:
``printf %s "$KEY" | sha256sum``) and ``roles`` (``inference``, ``admin``). Without one the router is open,
and serves on loopback only. Keys are random and long, so a plain hash is enough.
"""

from __future__ import annotations

import hashlib
import ipaddress
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from router.errors import Forbidden, TooManyRequests, Unauthenticated, Unavailable
from router.places import Places
from telemetry.configuration import InvalidConfiguration
from telemetry.metrics import IN_FLIGHT, REJECTED

Role = Literal["inference", "admin"]
_LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})


class Caller(msgspec.Struct, frozen=True):
    """Who sent a request: one key's owner."""

    name: str
    roles: tuple[Role, ...]


OPEN_CALLER = Caller("", ("inference", "admin"))


class _Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    roles: Annotated[tuple[Role, ...], msgspec.Meta(min_length=1)] = ("inference",)


class _KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: Annotated[tuple[_Key, ...], msgspec.Meta(min_length=1)]


def read_keys(path: Path) -> dict[str, Caller]:
    """SHA-256 of a key → its caller. Raises InvalidConfiguration when the file cannot be used."""
    try:
        document = msgspec.convert(tomllib.loads(path.read_text()), _KeyFile)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidConfiguration(f"key file {path}: {error}") from error
    return {key.sha256: Caller(key.name, key.roles) for key in document.keys}


def refuse_open_address(host: str, keys: Mapping[str, Caller]) -> None:
    """Raises InvalidConfiguration when the router would serve strangers without asking for a key."""
    if keys or is_loopback(host):
        return
    message = f"[stack] host = {host!r}: without keys the router serves on loopback only"
    raise InvalidConfiguration(f'{message}; set [router] key_file, or host = "127.0.0.1"')


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Admission:
    """Authenticates callers and counts what is being answered, with the router's other workers."""

    def __init__(
        self, keys: Mapping[str, Caller], places: Places, *, max_in_flight: int, max_in_flight_per_key: int
    ) -> None:
        """``places`` counts ``place_names(keys)``."""
        self._keys = keys
        self._places = places
        self._limit = max_in_flight
        self._limit_per_key = max_in_flight_per_key

    def authenticate(self, authorization: str | None, role: Role) -> Caller:
        """The caller behind an ``Authorization`` header. Raises Unauthenticated or Forbidden."""
        if not self._keys:
            return OPEN_CALLER
        scheme, _, key = (authorization or "").partition(" ")
        caller = self._keys.get(hashlib.sha256(key.strip().encode()).hexdigest())
        if scheme.lower() != "bearer" or caller is None:
            REJECTED.labels("unauthenticated").inc()
            raise Unauthenticated()
        if role not in caller.roles:
            REJECTED.labels("forbidden").inc()
            raise Forbidden(f"This key has no {role} role.")
        return caller

    def enter(self, caller: Caller) -> None:
        """Take a place, to be given back with ``leave``. Raises Unavailable or TooManyRequests."""
        self.check(caller)
        self._count(caller, 1)

    def check(self, caller: Caller) -> None:
        """Raise what ``enter`` would raise."""
        if self._is_full(_ALL, self._limit):
            REJECTED.labels("overloaded").inc()
            raise Unavailable("The gateway is full: try again shortly.", code="overloaded", retry_after_s=1.0)
        if self._keys and self._is_full(_of(caller), self._limit_per_key):
            REJECTED.labels("concurrency").inc()
            raise TooManyRequests(retry_after_s=1.0)

    def leave(self, caller: Caller) -> None:
        """Give the place back."""
        self._count(caller, -1)

    def _is_full(self, name: str, limit: int) -> bool:
        if self._places.total(name) < limit:
            return False
        self._places.forget_the_dead()
        return self._places.total(name) >= limit

    def _count(self, caller: Caller, change: int) -> None:
        self._places.add(_ALL, change)
        self._places.add(_of(caller), change)
        IN_FLIGHT.set(self._places.mine(_ALL))


_ALL = "all"


def place_names(keys: Mapping[str, Caller]) -> list[str]:
    """What an Admission counts: everything, and each caller's."""
    return [_ALL, *(_of(caller) for caller in (OPEN_CALLER, *keys.values()))]


def _of(caller: Caller) -> str:
    return f"key {caller.name}"
