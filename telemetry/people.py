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
from pathlib import Path
from typing import IO, Final, Protocol

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from telemetry.process import hold, secret_file, sync

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

    Whose key was erased has a tombstone: a line ``-id`` for each key that is gone, ``*`` where it was missing or
    damaged when it was to be erased, and ``+id`` for keys made since. So a key that is merely missing is told apart
    from an erased one, and a backup brings none back.
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

    def id_of(self, person: str) -> str:
        """The id of the person's key, "" where there is none; asks no provider. Raises KeyUnusable."""
        if (key := self.at_hand(person)) is not None:
            return key.id
        file = self._file(person)
        return "" if file is None or self.is_erased(person, file.id) else file.id

    def find(self, person: str) -> PersonKey | None:
        """The key, or None where there is none. Raises KeyUnusable, or KeysAway; may wait for the key provider."""
        if (key := self.at_hand(person)) is not None:
            return key
        mark, file = self._mark(person), self._file(person)
        if file is None or mark is None or self.is_erased(person, file.id):
            self._kept.pop(person, None)
            return None
        try:
            key = PersonKey(file.id, self._provider.unwrap(file.wrapped))
        except OSError as error:
            raise KeysAway(f"{KeysAway.__doc__} {error}") from error
        self._kept[person] = (mark, key)
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return key

    def known(self, person: str, key_id: str = "") -> PersonKey:
        """The key called ``key_id``, or whichever there is. Raises Forgotten where it was erased, else KeyUnusable."""
        key = self.find(person)
        if key is not None and key_id in ("", key.id):
            return key
        if self.is_erased(person, key_id) if key_id else self._tombstone(person).exists():
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
            words = self._tombstone(person).read_text().split()
        except FileNotFoundError:
            return False
        return f"-{key_id}" in words or ("*" in words and f"+{key_id}" not in words)

    def erase(self, person: str) -> bool:
        """Delete the key, durably; whether there was one. What a crash interrupts is done when it is asked again."""
        if not person:
            raise ValueError("nobody in particular cannot be forgotten")
        with self._alone():
            for left in self._people.glob(f".{person}.*"):  # of an erasure that was interrupted
                _wipe(left)
            try:
                file = self._file(person)
            except KeyUnusable:
                file = None
            self._write_tombstone(person, "*" if file is None else f"-{file.id}")
            path = self._path(person)
            had_one = path.exists()
            if had_one:
                leaving = path.with_name(f".{person}.{secrets.token_hex(8)}")
                path.rename(leaving)
                sync(self._people)
                _wipe(leaving)
        self._kept.pop(person, None)
        return had_one

    def _make(self, person: str) -> None:
        try:
            wrapped = self._provider.wrap(secrets.token_bytes(32))
        except OSError as error:
            raise KeysAway(f"{KeysAway.__doc__} {error}") from error
        with self._alone():
            file = self._file(person)
            if file is not None and not self.is_erased(person, file.id):
                return  # another process was quicker: its key is the person's
            made = _KeyFile(secrets.token_hex(8), wrapped)
            if self._tombstone(person).exists():
                self._write_tombstone(person, f"+{made.id}")
            staging = self._people / f".{secrets.token_hex(8)}"
            descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as written:
                written.write(msgspec.msgpack.encode(made))
                written.flush()
                os.fsync(written.fileno())
            staging.rename(self._path(person))
            sync(self._people)

    def _alone(self) -> IO[str]:
        """Until it is closed nobody else makes or erases a key."""
        return hold(self._erased / ".lock", wait=True)

    def _write_tombstone(self, person: str, word: str) -> None:
        with self._tombstone(person).open("a") as tombstone:
            tombstone.write(f"{word}\n")
            tombstone.flush()
            os.fsync(tombstone.fileno())
        sync(self._erased)

    def _file(self, person: str) -> _KeyFile | None:
        try:
            content = self._path(person).read_bytes()
        except FileNotFoundError:
            return None
        if not any(content):  # erased while it was read
            return None
        try:
            return msgspec.msgpack.decode(content, type=_KeyFile)
        except msgspec.MsgspecError as error:
            raise KeyUnusable(KeyUnusable.__doc__) from error

    def _mark(self, person: str) -> tuple[int, int] | None:
        """What tells one key file from another that took its place."""
        try:
            found = os.stat(f"{self._people}/{_file_name(person)}")  # four times a verdict: no Path is made for it
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _path(self, person: str) -> Path:
        return self._people / _file_name(person)

    def _tombstone(self, person: str) -> Path:
        return self._erased / _file_name(person)


def _file_name(person: str) -> str:
    if person and not _PSEUDONYM.fullmatch(person):
        raise ValueError(f"{person!r} is no pseudonym")
    return person or NOBODY


def _wipe(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
