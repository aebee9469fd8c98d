"""Texts are readable with the person's key alone, in their place alone, and never again once the key is gone."""

from __future__ import annotations

import os
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from telemetry import people
from telemetry.config import TelemetryConfig, open_sealer
from telemetry.events import AnyEvent, FeedbackRecorded, PairShown, PreferenceRecorded, decode, encode
from telemetry.people import Forgotten, KeysAway, KeyUnusable, LocalProvider, PersonKeys
from telemetry.sealing import SHAPES, Sealer
from tests import examples

ANN, BOB = "a" * 16, "b" * 16
SECRET = "SECRET"


@pytest.fixture
def keys(tmp_path: Path) -> PersonKeys:
    return PersonKeys(tmp_path, LocalProvider(tmp_path))


@pytest.fixture
def sealer(keys: PersonKeys) -> Sealer:
    keys.obtain(ANN)
    keys.obtain(BOB)
    return Sealer(keys)


def texts() -> list[PairShown | PreferenceRecorded | FeedbackRecorded]:
    """One event of each kind that has texts, every one of them SECRET."""
    prompt = tuple(replace(message, content=SECRET) for message in examples.prompt(1))
    side = replace(
        examples.completion(1, text=SECRET), token_ids=(1, 2), logps=(-0.25, -0.5), reference_logps=(-1.0, -2.0, -3.0)
    )
    shown = replace(examples.pair(1), user=ANN, prompt=prompt, a=side, b=side)
    preference = replace(
        examples.preference(1), user=ANN, prompt=prompt, chosen=side, rejected=side, reasons=(SECRET, "b"),
        comment=SECRET, edited=SECRET,
    )  # fmt: skip
    thumb = replace(examples.feedback(1), user=ANN, prompt=prompt, completion=side, comment=SECRET)
    return [shown, preference, thumb]


def test_every_event_with_texts_is_among_them() -> None:
    kinds: Any = msgspec.inspect.type_info(AnyEvent)
    has_texts = {info.cls for info in kinds.types if {"prompt", "completion"} & {field.name for field in info.fields}}
    assert has_texts == set(SHAPES) == {type(event) for event in texts()}


@pytest.mark.parametrize("event", texts(), ids=lambda event: type(event).__name__)
def test_a_sealed_event_shows_no_text_and_opens_to_what_it_was(event: PairShown, sealer: Sealer) -> None:
    sealed = sealer.seal(event)
    payload = encode(sealed)
    assert SECRET.encode() not in payload
    assert b"-0.25" not in payload, "log-probs tell tokens"
    again = decode(payload)
    assert sealer.open(again) == event
    assert sealer.seal(again) == again, "what is sealed is not sealed twice"


@pytest.mark.parametrize("event", texts(), ids=lambda event: type(event).__name__)
def test_without_the_key_nothing_opens_it(event: PairShown, sealer: Sealer, keys: PersonKeys) -> None:
    sealed = sealer.seal(event)
    assert keys.erase(ANN)
    with pytest.raises(Forgotten):
        sealer.open(sealed)
    with pytest.raises(Forgotten):
        sealer.seal(event)
    keys.obtain(ANN)
    with pytest.raises(Forgotten):
        sealer.open(sealed), "a person who comes back has another key"


def test_a_text_opens_in_its_place_alone(sealer: Sealer) -> None:
    sealed = sealer.seal(texts()[1])
    with pytest.raises(KeyUnusable):
        sealer.open(replace(sealed, event_id="another"))
    with pytest.raises(KeyUnusable):
        sealer.open(replace(sealed, user=BOB))
    assert isinstance(sealed, PreferenceRecorded)
    assert sealed.sealed is not None
    data = sealed.sealed.data
    changed = replace(sealed.sealed, data=data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(KeyUnusable):
        sealer.open(replace(sealed, sealed=changed))


def test_bytes_are_sealed_for_a_person_and_a_name(sealer: Sealer, keys: PersonKeys) -> None:
    sealed = sealer.seal_bytes(ANN, b"SECRET", "name")
    assert b"SECRET" not in sealed
    assert sealer.open_bytes(sealed, "name") == b"SECRET"
    with pytest.raises(KeyUnusable):
        sealer.open_bytes(sealed, "other")
    keys.erase(ANN)
    with pytest.raises(Forgotten):
        sealer.open_bytes(sealed, "name")
    assert sealer.open_bytes(b'{"plain": 1}', "name") == b'{"plain": 1}'


def test_another_process_forgets_at_once(keys: PersonKeys, tmp_path: Path, sealer: Sealer) -> None:
    other = PersonKeys(tmp_path, LocalProvider(tmp_path))
    elsewhere = Sealer(other)
    sealed = elsewhere.seal(texts()[0])
    keys.erase(ANN)
    with pytest.raises(Forgotten):
        elsewhere.open(sealed)


def test_processes_that_need_a_first_key_together_get_the_same(tmp_path: Path) -> None:
    found: list[str] = []
    many = [PersonKeys(tmp_path, LocalProvider(tmp_path)) for _ in range(8)]
    threads = [threading.Thread(target=lambda k=k: found.append(k.obtain(ANN).id)) for k in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_key_files_are_their_owners_alone_and_leave_nothing(keys: PersonKeys, tmp_path: Path) -> None:
    keys.obtain(ANN)
    folder = tmp_path / "keys" / "people"
    assert stat.S_IMODE((folder / ANN).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys" / "master.key").stat().st_mode) == 0o600
    assert keys.erase(ANN)
    assert not keys.erase(ANN)
    assert os.listdir(folder) == []
    assert (tmp_path / "keys" / "erased" / ANN).exists(), "and the word that it was erased"


def test_a_damaged_key_file_and_another_master_are_told_apart_from_forgetting(tmp_path: Path) -> None:
    keys = PersonKeys(tmp_path, LocalProvider(tmp_path))
    keys.obtain(ANN)
    (tmp_path / "keys" / "master.key").write_bytes(os.urandom(32))
    with pytest.raises(KeyUnusable, match="master"):
        PersonKeys(tmp_path, LocalProvider(tmp_path)).find(ANN)
    (tmp_path / "keys" / "people" / ANN).write_bytes(b"torn")
    with pytest.raises(KeyUnusable, match="damaged"):
        PersonKeys(tmp_path, LocalProvider(tmp_path)).find(ANN)


def test_a_lost_key_is_no_erased_one(sealer: Sealer, tmp_path: Path) -> None:
    """A folder that was not mounted must not look like everybody's wish to be forgotten."""
    sealed = sealer.seal(texts()[0])
    (tmp_path / "keys" / "people" / ANN).rename(tmp_path / "lost")
    with pytest.raises(KeyUnusable, match="restore"):
        sealer.open(sealed)
    (tmp_path / "lost").rename(tmp_path / "keys" / "people" / ANN)
    assert sealer.open(sealed).prompt == texts()[0].prompt


def test_a_backup_does_not_bring_an_erased_key_back(sealer: Sealer, keys: PersonKeys, tmp_path: Path) -> None:
    sealed, path = sealer.seal(texts()[0]), tmp_path / "keys" / "people" / ANN
    backup = path.read_bytes()
    keys.erase(ANN)
    path.write_bytes(backup)
    with pytest.raises(Forgotten):
        Sealer(PersonKeys(tmp_path, LocalProvider(tmp_path))).open(sealed)
    keys.obtain(ANN)
    assert path.read_bytes() != backup
    with pytest.raises(Forgotten):
        sealer.open(sealed)


def test_a_damaged_or_missing_key_can_be_erased_and_its_texts_are_then_forgotten(
    sealer: Sealer, keys: PersonKeys, tmp_path: Path
) -> None:
    sealed, path = sealer.seal(texts()[0]), tmp_path / "keys" / "people" / ANN
    backup = path.read_bytes()
    path.write_bytes(b"torn")
    assert keys.erase(ANN)
    path.unlink(missing_ok=True)
    assert not keys.erase(ANN)
    path.write_bytes(backup)
    for _ in range(2):
        with pytest.raises(Forgotten):
            Sealer(PersonKeys(tmp_path, LocalProvider(tmp_path))).open(sealed)
        keys.obtain(ANN)
    fresh = sealer.seal(texts()[0])
    assert sealer.open(fresh).prompt == texts()[0].prompt, "who comes back has a key of their own"


def test_an_erasure_that_was_interrupted_leaves_no_key_behind(
    keys: PersonKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.obtain(ANN)

    def full(_: Path) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(people, "_wipe", full)
        with pytest.raises(OSError, match="space"):
            keys.erase(ANN)
    assert len(os.listdir(tmp_path / "keys" / "people")) == 1
    assert not keys.erase(ANN)
    assert os.listdir(tmp_path / "keys" / "people") == []


def test_two_erasures_and_a_new_key_at_the_same_time_leave_nothing_unreadable(tmp_path: Path) -> None:
    """A client that asks twice, while the person is back already."""
    many = [PersonKeys(tmp_path, LocalProvider(tmp_path)) for _ in range(6)]
    sealed: list[PairShown] = []

    def come_and_go(keys: PersonKeys) -> None:
        for _ in range(30):
            keys.obtain(ANN)
            with suppress(Forgotten):
                sealed.append(Sealer(keys).seal(texts()[0]))  # type: ignore[arg-type]
            keys.erase(ANN)

    threads = [threading.Thread(target=come_and_go, args=(keys,)) for keys in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sealed
    for each in sealed:
        with pytest.raises(Forgotten):  # never KeyUnusable
            Sealer(many[0]).open(each)


def test_nothing_is_sealed_under_a_later_key_than_the_one_that_was_named(sealer: Sealer, keys: PersonKeys) -> None:
    before = sealer.prepare(ANN)
    assert sealer.key_id(ANN) == before
    keys.erase(ANN)
    assert sealer.key_id(ANN) == ""
    after = sealer.prepare(ANN)
    with pytest.raises(Forgotten):
        sealer.seal(texts()[0], key_id=before)
    assert sealer.seal(texts()[0], key_id=after).sealed is not None


class Away:
    """A key management service that does not answer."""

    def wrap(self, key: bytes) -> bytes:
        raise ConnectionError("no route")

    unwrap = wrap


def test_a_provider_that_is_away_is_neither_lost_nor_erased(sealer: Sealer, tmp_path: Path) -> None:
    sealed = sealer.seal(texts()[0])
    away = Sealer(PersonKeys(tmp_path, Away()))
    with pytest.raises(KeysAway, match="no route"):
        away.open(sealed)
    with pytest.raises(KeysAway):
        away.prepare("c" * 16)


@pytest.mark.parametrize("name", ["../../etc/passwd", "A" * 16, "a" * 15])
def test_only_pseudonyms_name_key_files(keys: PersonKeys, name: str) -> None:
    with pytest.raises(ValueError, match="pseudonym"):
        keys.obtain(name)


def test_turned_off_nothing_is_sealed_and_what_was_still_opens(tmp_path: Path) -> None:
    on = open_sealer(TelemetryConfig(state=str(tmp_path)))
    on.prepare(ANN)
    sealed = on.seal(texts()[0])
    off = open_sealer(TelemetryConfig(state=str(tmp_path), encryption=False))
    assert off.open(sealed).prompt == texts()[0].prompt
    assert off.seal(texts()[0]).sealed is None
    never = open_sealer(TelemetryConfig(state=str(tmp_path / "new"), encryption=False))
    assert not (tmp_path / "new" / "keys").exists()
    assert never.seal(texts()[0]).sealed is None


class Reversed:
    """A key management service, for tests: what it wraps is reversed."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def wrap(self, key: bytes) -> bytes:
        return key[::-1]

    def unwrap(self, wrapped: bytes) -> bytes:
        return wrapped[::-1]


def test_another_key_provider_is_named_in_the_configuration(tmp_path: Path) -> None:
    config = TelemetryConfig(state=str(tmp_path), key_provider=f"{__name__}:Reversed")
    sealer = open_sealer(config)
    sealer.prepare(ANN)
    assert open_sealer(config).open(sealer.seal(texts()[0])).prompt == texts()[0].prompt
    assert not (tmp_path / "keys" / "master.key").exists()
