"""Lineage as the store tells it, both ways, on a real store."""

from __future__ import annotations

from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from rich.console import Console

from deploy.lineage import document, show
from telemetry.event_log import Entry, Position
from telemetry.events import TOPIC_OF, AnyEvent, PreferenceRecorded, encode, key_of
from telemetry.lineage import Lineages, NotRecorded
from telemetry.store import Recorded, Store
from tests import examples

ONE, TWO, THREE = "v000001-aaaaaaaa", "v000002-bbbbbbbb", "v000003-cccccccc"


def record(root: Path, *events: AnyEvent) -> None:
    """Put ``events`` into the store as the recorder does, each at the next offset of its topic."""
    offsets: dict[str, int] = {}
    recorded = []
    for event in events:
        topic = TOPIC_OF[type(event)]
        position = Position(topic, 0, offsets.get(topic, 0))
        offsets[topic] = position.offset + 1
        recorded.append(Recorded(Entry(position, key_of(event), encode(event)), event))
    Store(root).append(recorded, {topic: {0: offset} for topic, offset in offsets.items()})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    first, second, third, tie = (examples.preference(n) for n in range(4))
    ids = {name: verdict.event_id for name, verdict in zip("abct", (first, second, third, tie), strict=True)}
    record(
        tmp_path,
        first, second, third, msgspec.structs.replace(tie, outcome="tie"),
        examples.batch(1, [ids["a"]], [(ids["t"], "no_preference")]),
        examples.published(ONE, [ids["a"]]),
        examples.release(ONE, "canary"),
        examples.batch(2, [ids["b"]]),
        msgspec.structs.replace(examples.batch(3, [ids["c"]]), replayed_ids=(ids["a"],)),
        examples.published(TWO, [ids["b"], ids["c"]], parent=ONE),
        examples.published(THREE, [], parent=examples.BASE),  # another line: it knows none of them
        examples.release(ONE, "stable"),
        examples.retraction(second),
    )  # fmt: skip
    (tmp_path / "ids.json").write_bytes(msgspec.json.encode(ids))
    return tmp_path


def ids_in(root: Path) -> dict[str, str]:
    found: dict[str, str] = msgspec.json.decode((root / "ids.json").read_bytes())
    return found


def test_a_version_knows_its_own_verdicts_and_its_forebears(root: Path) -> None:
    ids = ids_in(root)
    assert document(str(root), TWO)["preference_ids"] == [ids["a"], ids["b"], ids["c"]]
    line = Lineages(root).ancestry(TWO)
    assert [(each.version, each.parent, each.states) for each in line] == [
        (TWO, ONE, ()),
        (ONE, examples.BASE, ("canary", "stable")),
    ]
    assert document(str(root), THREE)["preference_ids"] == []
    assert document(str(root), examples.BASE) == {"version": examples.BASE, "preference_ids": [], "ancestry": []}


def test_a_verdict_names_its_steps_and_every_version_that_knows_it(root: Path) -> None:
    ids, lineages = ids_in(root), Lineages(root)
    first = lineages.verdict(ids["a"])
    assert (first.batches, first.replays, first.versions) == (("chat-main/000001",), 1, (ONE, TWO))
    third = lineages.verdict(ids["c"])
    assert (third.batches, third.versions, third.is_retracted) == (("chat-main/000003",), (TWO,), False)
    assert lineages.verdict(ids["b"]).is_retracted


def test_a_verdict_that_no_step_used_says_why(root: Path) -> None:
    tie = Lineages(root).verdict(ids_in(root)["t"])
    assert (tie.dropped, tie.batches, tie.versions) == ("no_preference", (), ())


def test_a_verdict_names_the_others_on_its_pair_and_what_each_is_to_it(tmp_path: Path) -> None:
    """Eva prefers a, then b, then a again; ida b, then neither; whoever was shown the pair clicked a."""
    choices: tuple[tuple[str, str, Literal["a", "b", ""]], ...] = (
        ("click", "", "a"), ("eva-a", "eva", "a"), ("eva-b", "eva", "b"), ("eva-again", "eva", "a"),
        ("ida-b", "ida", "b"), ("ida-tie", "ida", ""),
    )  # fmt: skip
    given = [_given(second, *each) for second, each in enumerate(choices)]
    elsewhere = msgspec.structs.replace(_given(9, "elsewhere", "eva", "a"), pair_id="pair-2")
    retraction = examples.retraction(given[2])
    record(tmp_path, *reversed(given), elsewhere, retraction, examples.published(ONE, []))
    lineages = Lineages(tmp_path)

    def others(name: str) -> tuple[tuple[str, ...], ...]:
        found = lineages.verdict(name)
        return found.repeats, found.agrees, found.contradicts

    assert others("click") == ((), ("eva-a", "eva-again"), ("eva-b", "ida-b", "ida-tie"))
    assert others("eva-a") == (("eva-again",), ("click",), ("eva-b", "ida-b", "ida-tie"))
    assert others("eva-b") == ((), ("ida-b",), ("click", "eva-a", "eva-again", "ida-tie")), "taken back, and kept"
    assert others("ida-tie") == ((), (), ("click", "eva-a", "eva-b", "eva-again", "ida-b"))
    assert others("elsewhere") == ((), (), ())
    assert document(str(tmp_path), "eva-b")["verdict"]["agrees"] == ("ida-b",)
    said = StringIO()
    show(str(tmp_path), "eva-a", Console(file=said, width=120))
    assert [line.split(maxsplit=1) for line in map(str.strip, said.getvalue().splitlines()[-3:])] == [
        ["repeats", "eva-again"], ["agrees", "click"], ["contradicts", "eva-b, ida-b, ida-tie"],
    ]  # fmt: skip


def _given(second: int, name: str, labeler: str, position: Literal["a", "b", ""]) -> PreferenceRecorded:
    return msgspec.structs.replace(
        examples.preference(1),
        event_id=name,
        occurred_at=examples.SHOWN_AT + timedelta(seconds=second),
        labeler=labeler,
        outcome="chosen_rejected" if position else "tie",
        chosen_position=position,
    )


def test_what_the_store_does_not_hold_is_said(root: Path, tmp_path: Path) -> None:
    lineages = Lineages(root)
    with pytest.raises(NotRecorded, match="v000009-00000000: the store holds nothing"):
        lineages.ancestry("v000009-00000000")
    with pytest.raises(NotRecorded):
        lineages.verdict("no-such-verdict")
    with pytest.raises(NotRecorded):
        Lineages(tmp_path / "nowhere")


def test_a_person_is_in_every_version_that_learned_from_a_verdict_or_thumb_of_theirs(tmp_path: Path) -> None:
    verdict = msgspec.structs.replace(examples.preference(1), user="ann")
    thumb = msgspec.structs.replace(examples.feedback(2), user="bob")
    record(
        tmp_path, verdict, thumb,
        examples.published(ONE, [verdict.event_id]),
        examples.published(TWO, [thumb.event_id], parent=ONE),
        examples.published(THREE, [], parent=examples.BASE),
    )  # fmt: skip
    lineages = Lineages(tmp_path)
    assert lineages.of_person("ann") == (ONE, TWO)
    assert lineages.of_person("bob") == (TWO,)
    assert lineages.of_person("eve") == ()
