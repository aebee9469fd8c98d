"""What a fuzzer cannot make up. Every second request that is meant to be valid names things that exist.

``TIEBREAK_KNOWN`` is JSON: operation → what its path and its body are to name.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import schemathesis

KNOWN: dict[str, dict[str, dict[str, str]]] = json.loads(os.environ["TIEBREAK_KNOWN"])
_turns = itertools.count()


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    known = KNOWN.get(case.operation.label, {}) if next(_turns) % 2 else {}
    if "path" in known:
        case.path_parameters = {**case.path_parameters, **known["path"]}
    if isinstance(case.body, dict):
        case.body = {**whole(case.body), **known.get("body", {})}


def whole(value: Any) -> Any:
    """``value`` with 2.0 written as 2: JSON Schema cannot tell them apart, the router takes no 2.0 for an integer."""
    if isinstance(value, dict):
        return {name: whole(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
