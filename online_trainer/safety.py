"""How safe an answer is, 0 to 1, by the deployment's own scorer: a small model, a service, or what the filter said."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from telemetry.configuration import InvalidConfiguration
from telemetry.events import Completion

Scorer = Callable[[str], float]


def load_scorer(name: str) -> Scorer | None:
    """The function ``module:function``; None for "". Raises InvalidConfiguration where there is no such function."""
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidConfiguration(
            f"[trainer]: safety_scorer {name!r} cannot be loaded ({error}); it is module:function, text → 0…1"
        ) from error
    return cast(Scorer, found)


def safety(completion: Completion, scorer: Scorer | None) -> float:
    """0 where the output filter stopped the answer, else the scorer's word, held between 0 and 1 (without one: 1)."""
    if completion.finish_reason == "content_filter":
        return 0.0
    return 1.0 if scorer is None else held(scorer(completion.text))


def held(score: float) -> float:
    """``score`` between 0 and 1."""
    return min(1.0, max(0.0, float(score)))
