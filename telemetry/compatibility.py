"""The contracts as JSON Schemas, and the rule that they only ever grow: ``python -m telemetry.compatibility [--write]``

``telemetry/schemas/0001.json``, ``0002.json`` … each hold every event of one revision, as ``events.py`` had it then. A
revision may follow when it reads whatever any earlier one wrote (backward, transitively): no event, field or value
goes, no type narrows, and what is new has a default. ``--write`` adds the next file; anything else is refused with a
reason. A breaking change is a new topic with a new event.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from telemetry.events import TOPIC_OF

FOLDER: Final = Path(__file__).with_name("schemas")
Schema = dict[str, Any]


def present(topic_of: Mapping[type[Any], str] = TOPIC_OF) -> Schema:
    """Every event of this build by name with its topic, and the records that they are made of."""
    found, components = msgspec.json.schema_components(topic_of, ref_template="#/$defs/{name}")
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Tiebreak events",
        "oneOf": [each | {"topic": topic} for each, topic in zip(found, topic_of.values(), strict=True)],
        "$defs": {name: _without_prose(component) for name, component in components.items()},
    }
    plain: Schema = json.loads(json.dumps(document))  # as it is read back: lists, no tuples
    return plain


def _without_prose(record: Schema) -> Schema:
    """Its docstring may change at any time."""
    return {key: value for key, value in record.items() if key != "description"}


def revisions(folder: Path = FOLDER) -> list[Schema]:
    """The committed ones, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def problems(older: Schema, newer: Schema) -> list[str]:
    """Why ``newer`` cannot read all that ``older`` wrote; empty when it can."""
    found = []
    topics = {_name(each): each["topic"] for each in newer["oneOf"]}
    for each in older["oneOf"]:
        if topics.get(_name(each)) != each["topic"]:
            found.append(f"{_name(each)} is gone from {each['topic']}: readers would dead-letter what is in the log")
    for name, record in older["$defs"].items():
        if name not in newer["$defs"]:
            found.append(f"{name} is gone")
        else:
            found += _narrowed(record, newer["$defs"][name], name)
    return found


def _name(reference: Schema) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _narrowed(older: Schema, newer: Schema, where: str) -> Iterator[str]:
    """What values of ``older`` a reader of ``newer`` would refuse, or no longer find."""
    narrow, wide = older.get("anyOf", [older]), newer.get("anyOf", [newer])
    if len(narrow) == len(wide) == 1:
        yield from _narrowed_plain(narrow[0], wide[0], where)
        return
    for each in narrow:
        if all(list(_narrowed_plain(each, taken, where)) for taken in wide):
            yield f"{where} no longer takes {_told(each)}"


def _narrowed_plain(older: Schema, newer: Schema, where: str) -> Iterator[str]:
    """The same for schemas without alternatives."""
    if not _is_limited(newer):
        return
    if older.get("$ref") != newer.get("$ref") or not _types(older) or not _types(older) <= _types(newer):
        yield f"{where} was {_told(older)} and is {_told(newer)}"
        return
    if (taken := _values(newer)) is not None:
        given = _values(older)
        if given is None:
            yield f"{where} takes only some values now"
        for value in given or ():
            if value not in taken:
                yield f"{where} no longer takes {value!r}"
    for limit, is_narrower in _LIMITS.items():
        if limit in newer and (limit not in older or is_narrower(newer[limit], older[limit])):
            yield f"{where}: {limit} became narrower"
    if older.get("contentEncoding") != newer.get("contentEncoding"):
        yield f"{where} is encoded in another way"
    yield from _narrowed_parts(older, newer, where)


def _narrowed_parts(older: Schema, newer: Schema, where: str) -> Iterator[str]:
    fields = newer.get("properties", {})
    for name, field in older.get("properties", {}).items():
        if name not in fields:
            yield f"{where}.{name} is gone"
        else:
            yield from _narrowed(field, fields[name], f"{where}.{name}")
            if "default" in field and field["default"] != fields[name].get("default"):
                yield f"{where}.{name}: its default changed, and with it what records without it say"
    for name in sorted(set(newer.get("required", ())) - set(older.get("required", ()))):
        yield f"{where}.{name} has no default: what was written before lacks it"
    for part in ("items", "additionalProperties"):
        if isinstance(newer.get(part), dict):
            yield from _narrowed(_part(older, part), newer[part], f"{where}[]")
    before, after = older.get("prefixItems", []), newer.get("prefixItems", [])
    if len(before) != len(after):
        yield f"{where} had {len(before)} parts and has {len(after)}"
    for number, (part_before, part_after) in enumerate(zip(before, after, strict=False)):
        yield from _narrowed(part_before, part_after, f"{where}[{number}]")


_LIMITS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "minimum": lambda new, old: new > old,
    "exclusiveMinimum": lambda new, old: new > old,
    "minLength": lambda new, old: new > old,
    "minItems": lambda new, old: new > old,
    "maximum": lambda new, old: new < old,
    "exclusiveMaximum": lambda new, old: new < old,
    "maxLength": lambda new, old: new < old,
    "maxItems": lambda new, old: new < old,
    "pattern": lambda new, old: new != old,
    "format": lambda new, old: new != old,
}
_ANYTHING: Final = ("null", "boolean", "integer", "number", "string", "array", "object")


def _part(schema: Schema, name: str) -> Schema:
    found = schema.get(name)
    return found if isinstance(found, dict) else {}


def _is_limited(schema: Schema) -> bool:
    """Whether it says anything at all; {} takes everything."""
    return any(key in schema for key in ("type", "enum", "const", "$ref"))


def _values(schema: Schema) -> list[Any] | None:
    """The only ones that it takes; None: all of its type."""
    if "const" in schema:
        return [schema["const"]]
    found: list[Any] | None = schema.get("enum")
    return found


def _types(schema: Schema) -> set[str]:
    """JSON types that it takes; an integer is a number."""
    if "$ref" in schema:
        return {"object"}
    if not _is_limited(schema):
        return set(_ANYTHING)
    if (values := _values(schema)) is not None and "type" not in schema:
        return {_type_of(value) for value in values}
    named = schema["type"]
    types = {named} if isinstance(named, str) else set(named)
    return types | {"integer"} if "number" in types else types


def _type_of(value: object) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return kinds[type(value)]


def _told(schema: Schema) -> str:
    return str(schema.get("$ref", "") or schema.get("type", "") or json.dumps(schema, sort_keys=True))


def against_all(earlier: Sequence[Schema], newer: Schema) -> list[str]:
    """``problems`` with every earlier revision, each told once."""
    return list(dict.fromkeys(problem for older in earlier for problem in problems(older, newer)))


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """0 when the committed schemas are this build's, or were made so."""
    parser = argparse.ArgumentParser(prog="python -m telemetry.compatibility", description=__doc__)
    parser.add_argument("--write", action="store_true", help="add this build's schemas as the next revision")
    options = parser.parse_args(arguments)
    earlier, now = revisions(folder), present()
    if found := against_all(earlier, now):
        print("events.py cannot read what earlier builds wrote:", *found, sep="\n  ", file=sys.stderr)
        return 1
    if earlier and earlier[-1] == now:
        return 0
    if not options.write:
        print("events.py has grown: `python -m telemetry.compatibility --write` commits its schemas", file=sys.stderr)
        return 1
    folder.mkdir(exist_ok=True)
    path = folder / f"{len(earlier) + 1:04d}.json"
    path.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
