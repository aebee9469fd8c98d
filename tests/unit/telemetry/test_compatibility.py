"""Contracts only grow: what a later build could not read of an earlier one's log is found, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from telemetry.compatibility import against_all, main, present, problems, revisions

A_RECORD = msgspec.defstruct("Part", [("size", int)])
FIELDS: list[Any] = [
    ("name", str),
    ("part", A_RECORD),
    ("kind", Literal["a", "b"]),
    ("note", str | None, None),
    ("count", int, 0),
    ("shares", dict[str, float], msgspec.field(default_factory=dict)),
    ("pair", tuple[str, str], ("", "")),
    ("parts", tuple[A_RECORD, ...], ()),
    ("choice", int | str),
    ("rating", Literal[1, -1]),
    ("words", tuple[str | None, ...], ()),
    ("loads", dict[str, float | None], msgspec.field(default_factory=dict)),
    ("anything", Any),
]


def schema(fields: list[Any], topic: str = "things.v1") -> dict[str, Any]:
    return present({msgspec.defstruct("Thing", fields, tag=True, kw_only=True): topic})


def changed(name: str, *field: Any) -> list[Any]:
    return [(name, *field) if each[0] == name else each for each in FIELDS]


def test_the_committed_schemas_are_those_of_the_events_as_they_are() -> None:
    committed = revisions()
    assert committed[-1] == present(), "run `python -m telemetry.compatibility --write`"
    assert against_all(committed[:-1], committed[-1]) == []


@pytest.mark.parametrize(
    "fields",
    [
        [*FIELDS, ("more", str, "")],
        [*FIELDS, ("more", str | None, None)],
        changed("kind", Literal["a", "b", "c"]),
        changed("name", str | None),
        changed("count", float, 0),
        changed("kind", str),
        changed("name", str, "d"),
        changed("name", Any),
        changed("choice", int | str | None),
        changed("part", A_RECORD | None),
        list(reversed(FIELDS)),
    ],
)
def test_what_only_adds_is_taken(fields: list[Any]) -> None:
    assert problems(schema(FIELDS), schema(fields)) == []


SMALLER_PART = msgspec.defstruct("Part", [("size", Annotated[int, msgspec.Meta(ge=0)])])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (FIELDS[1:], "Thing.name is gone"),
        ([*FIELDS, ("more", str)], "Thing.more has no default"),
        (changed("name", int), "Thing.name was string and is integer"),
        (changed("count", str, ""), "Thing.count was integer and is string"),
        (changed("kind", Literal["a"]), "Thing.kind no longer takes 'b'"),
        (changed("name", Literal["a"]), "Thing.name takes only some values now"),
        (changed("note", str), "Thing.note no longer takes null"),
        (changed("choice", int), "Thing.choice no longer takes string"),
        (changed("kind", int), "Thing.kind was"),
        (changed("rating", str), "Thing.rating was"),
        (changed("words", tuple[str, ...], ()), "Thing.words[] no longer takes null"),
        (changed("loads", dict[str, float], msgspec.field(default_factory=dict)), "Thing.loads[] no longer takes null"),
        (changed("anything", int), "Thing.anything was {} and is integer"),
        (changed("name", bytes), "Thing.name is encoded in another way"),
        (changed("count", int, 1), "Thing.count: its default changed"),
        (changed("count", int), "Thing.count has no default"),
        (changed("name", Annotated[str, msgspec.Meta(max_length=3)]), "Thing.name: maxLength became narrower"),
        (changed("name", Annotated[str, msgspec.Meta(pattern="^a")]), "Thing.name: pattern became narrower"),
        (changed("shares", dict[str, str], msgspec.field(default_factory=dict)), "Thing.shares[] was number"),
        (changed("pair", tuple[str, str, str], ("", "")), "Thing.pair"),
        (changed("pair", tuple[str, int], ("", "")), "Thing.pair[1] was string and is integer"),
        ([*changed("part", SMALLER_PART)[:7], *FIELDS[8:]], "Part.size: minimum became narrower"),
    ],
)
def test_what_takes_away_is_named(fields: list[Any], told: str) -> None:
    found = problems(schema(FIELDS), schema(fields))
    assert any(told in problem for problem in found), found


def test_an_event_that_moves_to_another_topic_is_gone_from_the_first() -> None:
    assert "Thing is gone from things.v1" in problems(schema(FIELDS), schema(FIELDS, "others.v1"))[0]


def test_every_earlier_revision_counts_not_only_the_last() -> None:
    """A field that went and came back as something else: the log still holds the first."""
    first, second, third = schema(FIELDS), schema(FIELDS[:4]), schema([*FIELDS[:4], ("count", str, "")])
    assert problems(second, third) == []
    assert any("count was integer and is string" in problem for problem in against_all([first, second], third))


def test_a_revision_is_written_once_and_a_breaking_one_never(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([], tmp_path) == 1, "nothing is committed yet"
    assert main(["--write"], tmp_path) == 0
    assert main(["--write"], tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["0001.json"]
    document = json.loads((tmp_path / "0001.json").read_text())
    document["$defs"]["PairShown"]["properties"]["mood"] = {"type": "string"}
    (tmp_path / "0001.json").write_text(json.dumps(document))
    assert main(["--write"], tmp_path) == 1
    assert "PairShown.mood is gone" in capsys.readouterr().err
