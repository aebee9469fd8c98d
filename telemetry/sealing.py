"""What a person said and was told, encrypted where it is written: log, store, outbox, Redis, checkpoints.

Of an event the texts go, all of them (prompt, answers with their tokens and log-probs, comments); who, when, which
versions and the outcome stay readable, so that guards, receipts and lineage need no key. A reader opens an event
with the person's key, or hears that the person is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from telemetry.events import Completion, FeedbackRecorded, Message, PairShown, PreferenceRecorded, Sealed, decode
from telemetry.people import Forgotten, KeyUnusable, PersonKey, PersonKeys

R = TypeVar("R", bound=msgspec.Struct)


class Shape(NamedTuple):
    """Where a record has texts besides its ``prompt``: its completions, and what people wrote."""

    sides: tuple[str, ...]
    notes: tuple[str, ...] = ()


SHAPES: Final[dict[type[Any], Shape]] = {
    PairShown: Shape(("a", "b")),
    PreferenceRecorded: Shape(("chosen", "rejected"), ("reasons", "comment", "edited")),
    FeedbackRecorded: Shape(("completion",), ("comment",)),
}
NOTHING: Final = Sealed("", b"")
EMPTY: Final[dict[str, Any]] = {"reasons": (), "comment": "", "edited": None}


class _Words(msgspec.Struct, frozen=True, array_like=True):
    """What of a completion tells its text."""

    text: str
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    reference_logps: tuple[float, ...]


class _Content(msgspec.Struct, frozen=True, array_like=True):
    prompt: tuple[Message, ...]
    sides: tuple[_Words, ...]
    notes: tuple[Any, ...]


_contents = msgspec.msgpack.Decoder(_Content)
_encoder = msgspec.msgpack.Encoder()


class Sealer:
    """Seals and opens; without keys it leaves everything as it is."""

    def __init__(self, keys: PersonKeys | None, *, is_sealing: bool = True) -> None:
        """``is_sealing`` False: only what was sealed before is opened."""
        self.keys, self.is_sealing = keys, is_sealing and keys is not None

    def prepare(self, person: str) -> str:
        """The id of the person's key, made where there is none; may wait for the disk and the key provider."""
        return self.keys.obtain(person).id if self.keys is not None and self.is_sealing else ""

    def key_id(self, person: str) -> str:
        """The id of the person's key as it is now, "" for none; asks no provider. Raises KeyUnusable, or OSError."""
        return self.keys.id_of(person) if self.keys is not None and self.is_sealing else ""

    def must_wait(self, person: str) -> bool:
        """Whether the person's key has to be unwrapped before anything can be sealed or opened."""
        return self.keys is not None and self.keys.at_hand(person) is None

    def seal(self, event: R, *, key_id: str = "") -> R:
        """The event without its texts, and these sealed within it.

        Raises Forgotten where the person's key (``key_id``, if it is named) was erased, KeyUnusable where it is lost,
        or KeysAway.
        """
        shape = SHAPES.get(type(event))
        if shape is None:
            return event
        sealed: R = self.seal_record(event, shape, name=event.event_id, key_id=key_id)  # type: ignore[attr-defined]
        return sealed

    def open(self, event: R) -> R:
        """The event with its texts. Raises Forgotten, KeyUnusable or KeysAway."""
        shape = SHAPES.get(type(event))
        return event if shape is None else self.open_record(event, shape, name=event.event_id)  # type: ignore[attr-defined]

    def opened(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """The events in the store's ``rows`` with their texts; without those of people who are forgotten."""
        for row in rows:
            with suppress(Forgotten):
                yield self.open(decode(row["event"].encode()))

    def seal_record(self, record: Any, shape: Shape, *, name: str, key_id: str = "") -> Any:
        """``seal`` for a record of this shape, with ``user``, ``prompt`` and ``sealed``; ``name`` is its own alone."""
        if not self.is_sealing or record.sealed is not None:
            return record
        key = self._key(record.user, key_id)
        sides = [getattr(record, field) for field in shape.sides]
        content = _Content(
            record.prompt,
            tuple(_Words(side.text, side.token_ids, side.logps, side.reference_logps) for side in sides),
            tuple(getattr(record, field) for field in shape.notes),
        )
        data = key.encrypt(_encoder.encode(content), _context(record, name))
        return bare(record, shape, Sealed(key.id, data))

    def open_record(self, record: Any, shape: Shape, *, name: str) -> Any:
        """The inverse of ``seal_record``."""
        sealed = record.sealed
        if sealed is None:
            return record
        if sealed == NOTHING:
            raise Forgotten()
        key = self._key(record.user, sealed.key_id)
        content = _contents.decode(key.decrypt(sealed.data, _context(record, name)))
        sides = {
            field: _with_words(getattr(record, field), words)
            for field, words in zip(shape.sides, content.sides, strict=True)
        }
        notes: dict[str, Any] = dict(zip(shape.notes, content.notes, strict=True))
        if "reasons" in notes:
            notes["reasons"] = tuple(notes["reasons"])
        return replace(record, prompt=content.prompt, sealed=None, **sides, **notes)

    def seal_bytes(self, person: str, text: bytes, name: str, *, key_id: str = "") -> bytes:
        """``text`` for whoever has the person's key. Raises as ``seal``."""
        if not self.is_sealing:
            return text
        key = self._key(person, key_id)
        envelope = _Envelope(person, Sealed(key.id, key.encrypt(text, name.encode())))
        return MARK + _encoder.encode(envelope)

    def open_bytes(self, sealed: bytes, name: str) -> bytes:
        """The inverse of ``seal_bytes``; what was never sealed comes back as it is. Raises as ``open``."""
        if not sealed.startswith(MARK):
            return sealed
        envelope = msgspec.msgpack.decode(sealed[len(MARK) :], type=_Envelope)
        key = self._key(envelope.person, envelope.sealed.key_id)
        return key.decrypt(envelope.sealed.data, name.encode())

    def _key(self, person: str, key_id: str) -> PersonKey:
        if self.keys is None:
            raise KeyUnusable("this deployment has no keys: restore its folder keys/")
        return self.keys.known(person, key_id)


def bare(record: Any, shape: Shape, sealed: Sealed = NOTHING) -> Any:
    """The record without its texts. With nothing sealed in it, it opens as one whose person is forgotten."""
    sides = {field: _bare(getattr(record, field)) for field in shape.sides}
    notes = {field: EMPTY[field] for field in shape.notes}
    return replace(record, prompt=(), sealed=sealed, **sides, **notes)


MARK: Final = b"\x00sealed\x00"  # no JSON begins like this


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    person: str
    sealed: Sealed


def _context(record: Any, name: str) -> bytes:
    return f"{type(record).__name__}/{name}".encode()


def _bare(side: Completion) -> Completion:
    return replace(side, text="", token_ids=(), logps=(), reference_logps=())


def _with_words(side: Completion, words: _Words) -> Completion:
    return replace(
        side, text=words.text, token_ids=words.token_ids, logps=words.logps, reference_logps=words.reference_logps
    )
