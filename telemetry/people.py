"""One data key a person: whoever is to be forgotten is forgotten when that key is gone.

What a person wrote or was answered is encrypted with the person's key wherever it is written (telemetry/sealing.py).
The key lies wrapped in a file of its own, ``<state>/keys/people/<pseudonym>``; what it is wrapped with is the key
provider's: a local master key, or a key management service behind the same two calls. Erasing is removing that
file, and overwriting it.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from telemetry.process import secret_file, sync

MOST_KEPT: Final = 10_000  # keys that a process has unwrapped, each as long as its file is the same
NOBODY: Final = "nobody"  # whose key seals what belongs to no known person
_PSEUDONYM: Final = re.compile(r"[0-9a-f]{16}")
_NONCE_BYTES: Final = 12


class Forgotten(LookupError):
    """the person's key was erased: what it sealed can never be read again"""

    def __str__(self) -> str:
        return self.__doc__ or ""


class KeyUnusable(RuntimeError):
    """A person's key is missing and was not erased, is damaged, or is wrapped by another master key: restore keys/."""


class KeysAway(RuntimeError):
    """The key provider does not answer."""


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
    """Every person's key, by pseudonym ("" is nobody in particular). Safe to share between threads and processes.

    Whose key was erased has a tombstone with that key's id: what is merely missing is told apart, and so is a key that
    a backup brings back.
    """

    def __init__(self, state: Path, provider: KeyProvider) -> None:
        self._people, self._erased = state / "keys" / "people", state / "keys" / "erased"
        self._provider = provider
        for folder in (self._people, self._erased):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._kept: OrderedDict[str, tuple[tuple[int, int], PersonKey]] = OrderedDict()

    def at_hand(self, person: str) -> PersonKey | None:
        """The key, if this process has unwrapped it and its file is still the same; costs a look at the file."""
        kept = self._kept.get(person)
        return kept[1] if kept is not None and kept[0] == self._mark(person) else None

    def find(self, person: str) -> PersonKey | None:
        """The key, or None where there is none. Raises KeyUnusable, or KeysAway; may wait for the key provider."""
        if (key := self.at_hand(person)) is not None:
            return key
        path, mark = self._path(person), self._mark(person)
        try:
            file = msgspec.msgpack.decode(path.read_bytes(), type=_KeyFile)
        except FileNotFoundError:
            self._kept.pop(person, None)
            return None
        except msgspec.MsgspecError as error:
            raise KeyUnusable(KeyUnusable.__doc__) from error
        if mark is None or self.is_erased(person, file.id):  # a backup brought it back
            return None
        try:
            key = PersonKey(file.id, self._provider.unwrap(file.wrapped))
        except OSError as error:
            raise KeysAway(f"{KeysAway.__doc__} {error}") from error
        self._kept[person] = (mark, key)
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return key

    def opener(self, person: str, key_id: str) -> PersonKey:
        """The key that sealed something. Raises Forgotten where it was erased, KeyUnusable where it is lost."""
        key = self.find(person)
        if key is not None and key.id == key_id:
            return key
        if not key_id or self.is_erased(person, key_id):
            raise Forgotten()
        raise KeyUnusable(KeyUnusable.__doc__)

    def obtain(self, person: str) -> PersonKey:
        """The key, made durably where there is none yet."""
        while (key := self.find(person)) is None:
            self._make(person)
        return key

    def is_erased(self, person: str, key_id: str) -> bool:
        """Whether that key of the person was erased."""
        try:
            return key_id in self._tombstone(person).read_text().split()
        except FileNotFoundError:
            return False

    def erase(self, person: str) -> bool:
        """Delete the key, durably; whether there was one. What a crash interrupts is done when it is asked again."""
        if not person:
            raise ValueError("nobody in particular cannot be forgotten")
        path = self._path(person)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return False
        with self._tombstone(person).open("a") as tombstone:
            try:
                tombstone.write(f"{msgspec.msgpack.decode(content, type=_KeyFile).id}\n")
            except msgspec.MsgspecError:  # a damaged key opens nothing anyway
                tombstone.write("\n")
            tombstone.flush()
            os.fsync(tombstone.fileno())
        sync(self._erased)
        leaving = path.with_name(f".{secrets.token_hex(8)}")
        path.rename(leaving)
        sync(self._people)
        with leaving.open("r+b") as file:
            file.write(bytes(len(content)))
            file.flush()
            os.fsync(file.fileno())
        leaving.unlink()
        self._kept.pop(person, None)
        return True

    def _make(self, person: str) -> None:
        try:
            wrapped = self._provider.wrap(secrets.token_bytes(32))
        except OSError as error:
            raise KeysAway(f"{KeysAway.__doc__} {error}") from error
        staging = self._people / f".{secrets.token_hex(8)}"
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.msgpack.encode(_KeyFile(secrets.token_hex(8), wrapped)))
                file.flush()
                os.fsync(file.fileno())
            path = self._path(person)
            if path.exists():
                self._drop_revived(person, path)
            with suppress(FileExistsError):  # another process was quicker: its key is the person's
                os.link(staging, path)
        finally:
            staging.unlink()
        sync(self._people)

    def _drop_revived(self, person: str, path: Path) -> None:
        """A key that was erased, and that a backup brought back, gives way."""
        with suppress(FileNotFoundError, msgspec.MsgspecError):
            if self.is_erased(person, msgspec.msgpack.decode(path.read_bytes(), type=_KeyFile).id):
                path.unlink()

    def _mark(self, person: str) -> tuple[int, int] | None:
        """What tells one key file from another that took its place."""
        try:
            found = self._path(person).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _path(self, person: str) -> Path:
        if person and not _PSEUDONYM.fullmatch(person):
            raise ValueError(f"{person!r} is no pseudonym")
        return self._people / (person or NOBODY)

    def _tombstone(self, person: str) -> Path:
        return self._erased / self._path(person).name
