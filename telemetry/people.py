"""One data key a person: whoever is to be forgotten is forgotten when that key is gone.

What a person wrote or was answered is encrypted with the person's key wherever it is written (telemetry/sealing.py).
The key lies wrapped in a file of its own, ``<state>/keys/people/<pseudonym>``; what it is wrapped with is the key
provider's: a local master key, or a key management service behind the same two calls. Erasing is overwriting and
removing that file.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
from collections import OrderedDict
from pathlib import Path
from typing import Final, Protocol

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from telemetry.process import secret_file

MOST_KEPT: Final = 10_000  # keys that a process has unwrapped, each as long as its file is the same
NOBODY: Final = "nobody"  # whose key seals what belongs to no known person
_PSEUDONYM: Final = re.compile(r"[0-9a-f]{16}")
_NONCE_BYTES: Final = 12


class Forgotten(LookupError):
    """The person's key is gone: what it sealed can never be read again."""


class KeyUnusable(RuntimeError):
    """A person's key file is damaged, or wrapped by another master key: restore the folder of keys."""


class KeyProvider(Protocol):
    """Wraps the people's keys. One that asks a service raises OSError when that is away."""

    def wrap(self, key: bytes) -> bytes: ...

    def unwrap(self, wrapped: bytes) -> bytes:
        """The inverse of ``wrap``; raises KeyUnusable."""
        ...


class LocalProvider:
    """The master key in ``<state>/keys/master.key``, made on first use (mode 0600). AES key wrap (RFC 3394)."""

    def __init__(self, state: Path) -> None:
        self._master = secret_file(state / "keys" / "master.key")

    def wrap(self, key: bytes) -> bytes:
        return aes_key_wrap(self._master, key)

    def unwrap(self, wrapped: bytes) -> bytes:
        try:
            return aes_key_unwrap(self._master, wrapped)
        except (InvalidUnwrap, ValueError) as error:
            raise KeyUnusable(KeyUnusable.__doc__) from error


def load_provider(name: str, state: Path) -> KeyProvider:
    """``module:factory``, called with the state's folder; the local provider for an empty name."""
    if not name:
        return LocalProvider(state)
    module, _, factory = name.partition(":")
    provider: KeyProvider = getattr(importlib.import_module(module), factory)(state)
    return provider


def has_keys(state: Path) -> bool:
    """Whether anything was ever sealed in this deployment."""
    return (state / "keys" / "people").is_dir()


class PersonKey:
    """One person's key while it is in use. AES-256-GCM with random nonces; ``context`` binds a text to its place."""

    def __init__(self, key_id: str, key: bytes) -> None:
        self.id, self._cipher = key_id, AESGCM(key)

    def encrypt(self, text: bytes, context: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, text, context)

    def decrypt(self, sealed: bytes, context: bytes) -> bytes:
        """Raises KeyUnusable for what was changed, or sealed for another place."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
        except InvalidTag as error:
            raise KeyUnusable("a sealed text was changed, or moved from its place") from error


class _KeyFile(msgspec.Struct, array_like=True):
    id: str
    wrapped: bytes


class PersonKeys:
    """Every person's key, by pseudonym ("" is nobody in particular). Safe to share between threads and processes."""

    def __init__(self, state: Path, provider: KeyProvider) -> None:
        self._folder, self._provider = state / "keys" / "people", provider
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._kept: OrderedDict[str, tuple[tuple[int, int], PersonKey]] = OrderedDict()

    def find(self, person: str) -> PersonKey | None:
        """The key, or None where there is none (any more). Raises KeyUnusable."""
        path = self._path(person)
        try:
            found = path.stat()
            mark = (found.st_ino, found.st_mtime_ns)
            kept = self._kept.get(person)
            if kept is not None and kept[0] == mark:
                return kept[1]
            content = path.read_bytes()
        except FileNotFoundError:
            self._kept.pop(person, None)
            return None
        try:
            file = msgspec.msgpack.decode(content, type=_KeyFile)
        except msgspec.MsgspecError as error:
            raise KeyUnusable(f"{path}: {KeyUnusable.__doc__}") from error
        key = PersonKey(file.id, self._provider.unwrap(file.wrapped))
        self._kept[person] = (mark, key)
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return key

    def obtain(self, person: str) -> PersonKey:
        """The key, made durably where there is none yet."""
        while (key := self.find(person)) is None:
            self._make(person)
        return key

    def people(self) -> int:
        """How many have a key."""
        return sum(1 for path in self._folder.iterdir() if _PSEUDONYM.fullmatch(path.name))

    def erase(self, person: str) -> bool:
        """Delete the key, durably; whether there was one."""
        if not person:
            raise ValueError("nobody in particular cannot be forgotten")
        path = self._path(person)
        self._kept.pop(person, None)
        try:
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
            path.unlink()
        except FileNotFoundError:
            return False
        self._sync()
        return True

    def _make(self, person: str) -> None:
        content = msgspec.msgpack.encode(_KeyFile(secrets.token_hex(8), self._provider.wrap(secrets.token_bytes(32))))
        staging = self._folder / f".{secrets.token_hex(8)}"
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(staging, self._path(person))
            except FileExistsError:  # another process was quicker: its key is the person's
                return
        finally:
            staging.unlink()
        self._sync()

    def _path(self, person: str) -> Path:
        if person and not _PSEUDONYM.fullmatch(person):
            raise ValueError(f"{person!r} is no pseudonym")
        return self._folder / (person or NOBODY)

    def _sync(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
