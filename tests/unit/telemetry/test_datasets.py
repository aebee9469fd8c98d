"""A data set is the same verdicts for ever: whatever comes later, is joined, deleted or erased, or it says so."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from msgspec.structs import replace

from telemetry import store as stores
from telemetry.datasets import DatasetChanged, Datasets, DatasetUnknown, Filter
from telemetry.event_log import Entry, Position
from telemetry.events import PAIRS, PREFERENCES, AnyEvent, PreferenceRecorded, decode, encode, key_of
from telemetry.people import LocalProvider, PersonKeys
from telemetry.sealing import Sealer
from telemetry.store import KEEP_LOG, Recorded, Store
from tests import examples

ANN, BOB = "a" * 16, "b" * 16


def put(store: Store, *events: AnyEvent) -> None:
    """Each event in a commit of its own, behind what is there."""
    for event in events:
        at = store.tables[PREFERENCES].next_offsets().get(0, 0)
        entry = Entry(Position(PREFERENCES, 0, at), key_of(event), encode(event))
        store.append([Recorded(entry, event)], {PREFERENCES: {0: at + 1}})


def given(number: int, **changes: Any) -> PreferenceRecorded:
    return replace(examples.preference(number), **({"user": ANN, "event_id": f"preference-{number}"} | changes))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "store")
    put(found, *(given(n) for n in range(4)))
    return found


@pytest.fixture
def datasets(tmp_path: Path) -> Datasets:
    return Datasets(tmp_path / "store")


def ids(datasets: Datasets, name: str) -> set[str]:
    return datasets.ids(datasets.named(name))


def test_what_comes_later_is_not_in_it(store: Store, datasets: Datasets) -> None:
    made = datasets.create(Filter(), by="ann@here", note="first")
    put(store, given(4), examples.retraction(given(1)))
    assert made.verdicts == len(ids(datasets, made.id)) == 4
    later = datasets.create(Filter(), by="ann@here")
    assert ids(datasets, later.id) == (ids(datasets, made.id) - {given(1).event_id}) | {given(4).event_id}
    assert [each.note for each in datasets.all()] == ["first", ""]


def test_the_same_verdicts_are_the_same_data_set(store: Store, datasets: Datasets) -> None:
    made = datasets.create(Filter(), by="ann@here")
    put(store, given(9, outcome="tie"))
    ties = Filter(outcome="tie")
    assert datasets.create(Filter(outcome="chosen_rejected"), by="b").id != made.id, "another filter is another set"
    assert datasets.create(ties, by="b").id == datasets.create(ties, by="c").id
    assert len(datasets.all()) == 3


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (Filter(policy="other"), {10}),
        (Filter(cohort="beta"), {11}),
        (Filter(cluster="0123456789ab"), {18}),
        (Filter(source="labeler"), {12}),
        (Filter(source="labeler", labeler="nobody"), set[int]()),
        (Filter(outcome="tie"), {13}),
        (Filter(version="v000007-aaaaaaaa"), {14}),
        (Filter(variant="chat-calm"), {17}),
        (Filter(since=examples.SHOWN_AT + timedelta(days=1)), {15}),
        (Filter(until=examples.SHOWN_AT - timedelta(days=1)), {16}),
    ],
)
def test_a_filter_chooses(chosen: Filter, expected: set[int], store: Store, datasets: Datasets) -> None:
    at = examples.SHOWN_AT
    put(
        store, given(10, policy="other", occurred_at=at), given(11, cohort="beta", occurred_at=at),
        given(18, cluster="0123456789ab", occurred_at=at),
        given(12, source="labeler", labeler="eva", occurred_at=at), given(13, outcome="tie", occurred_at=at),
        given(14, rejected=examples.completion(1, version="v000007-aaaaaaaa"), occurred_at=at),
        given(17, rejected=replace(examples.completion(1), variant="chat-calm"), occurred_at=at),
        given(15, occurred_at=at + timedelta(days=2)), given(16, occurred_at=at - timedelta(days=2)),
    )  # fmt: skip
    others = {given(n).event_id for n in range(4)}
    made = datasets.create(chosen, by="a")
    assert ids(datasets, made.id) - others == {given(n).event_id for n in expected}


def test_joining_and_deleting_files_leaves_it_readable(
    store: Store, datasets: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = datasets.create(Filter(), by="a")
    put(store, *(given(n) for n in range(4, 8)))
    monkeypatch.setattr(stores, "KEEP_OLD_FILES_H", 0)
    files = set(_files(store))
    store.tables[PREFERENCES].compact()
    put(store, *(given(n) for n in range(8, 12)))
    store.tables[PREFERENCES].compact()
    assert ids(datasets, made.id) == {given(n).event_id for n in range(4)}
    gone = files - set(_files(store))
    assert len(gone) == 4, "what no data set needs is deleted: the files of verdicts 4 to 7"


def _files(store: Store) -> list[str]:
    return [path.name for path in Path(store.tables[PREFERENCES]._root, "preferences").glob("*.parquet")]


def test_a_sample_is_the_same_verdicts_each_time_and_another_seed_is_another(store: Store, datasets: Datasets) -> None:
    put(store, *(given(n) for n in range(4, 40)))
    first = datasets.create(Filter(sample=10), by="ann")
    assert first.verdicts == 10
    assert datasets.create(Filter(sample=10), by="bob").id == first.id
    other = datasets.create(Filter(sample=10, seed=1), by="ann")
    assert ids(datasets, other.id) != ids(datasets, first.id)
    put(store, *(given(n) for n in range(40, 80)))
    assert len(ids(datasets, first.id)) == 10, "what came later changes nothing"
    assert datasets.create(Filter(sample=1000), by="ann").verdicts == 80


def test_a_sample_has_as_many_of_each_as_there_are(store: Store, datasets: Datasets) -> None:
    put(store, *(given(n, cohort="beta") for n in range(4, 20)), *(given(n, cohort="few") for n in range(20, 22)))
    made = datasets.create(Filter(sample=10, per="cohort"), by="ann")
    cohorts = Counter(decode(payload).cohort for payload in datasets.payloads(made))  # type: ignore[union-attr]
    assert cohorts == {"default": 4, "beta": 4, "few": 2}


def test_a_pair_of_variants_is_chosen_whoever_won(store: Store, datasets: Datasets) -> None:
    calm, bold, main = (replace(given(0).chosen, variant=name) for name in ("calm", "bold", "main"))
    pairs = [(calm, bold), (bold, calm), (calm, main), (bold, main), (calm, calm)]
    put(store, *(given(n, chosen=a, rejected=b) for n, (a, b) in enumerate(pairs, start=50)))
    made = datasets.create(Filter(variant="calm", against="bold"), by="ann")
    assert ids(datasets, made.id) == {"preference-50", "preference-51"}
    assert ids(datasets, datasets.create(Filter(variant="calm", against="calm"), by="ann").id) == {"preference-54"}


def test_log_entries_are_never_cleaned_away(store: Store) -> None:
    assert store.tables[PREFERENCES]._delta.metadata().configuration["delta.enableExpiredLogCleanup"] == "false"
    assert KEEP_LOG not in store.tables[PAIRS]._delta.metadata().configuration, "where no data set looks, they are"
    again = Store(store.tables[PREFERENCES]._root)
    assert again.tables[PREFERENCES]._delta.version() == store.tables[PREFERENCES]._delta.version()


def test_a_verdict_that_is_missing_or_changed_is_noticed(store: Store, datasets: Datasets, tmp_path: Path) -> None:
    made = datasets.create(Filter(), by="a")
    victim = sorted((tmp_path / "store" / "preferences").glob("*.parquet"))[0]
    victim.unlink()
    with pytest.raises(DatasetChanged):
        list(datasets.verdicts(made, Sealer(None)))
    with pytest.raises(DatasetChanged):
        datasets.ids(
            replace(made, digest="0" * 64, table_version=DeltaTable(str(tmp_path / "store/preferences")).version())
        )


def test_of_whoever_is_erased_the_verdicts_still_count(tmp_path: Path) -> None:
    keys = PersonKeys(tmp_path, LocalProvider(tmp_path))
    sealer = Sealer(keys)
    for person in (ANN, BOB):
        keys.obtain(person)
    store = Store(tmp_path / "store")
    put(store, *(sealer.seal(given(n, user=(ANN, BOB)[n % 2])) for n in range(4)))
    datasets = Datasets(tmp_path / "store")
    made = datasets.create(Filter(), by="a")
    assert len(list(datasets.verdicts(made, sealer))) == 4
    keys.erase(ANN)
    left = list(datasets.verdicts(made, sealer))
    assert [(event.user, event.chosen.text) for event in left] == [(BOB, "good 1"), (BOB, "good 3")]
    assert len(datasets.ids(made)) == made.verdicts == 4


def test_names_that_are_none_are_said(datasets: Datasets, store: Store, tmp_path: Path) -> None:
    with pytest.raises(DatasetUnknown, match="ds-nothing"):
        datasets.named("ds-nothing")
    with pytest.raises(DatasetUnknown, match="verdicts in"):
        Datasets(tmp_path / "nowhere").create(Filter(), by="a")
    made = [datasets.create(chosen, by="a") for chosen in (Filter(), Filter(outcome="tie"))]
    assert datasets.named(made[0].id[:9]).id == made[0].id
    with pytest.raises(DatasetUnknown, match="ds-"):
        datasets.named("ds-")
