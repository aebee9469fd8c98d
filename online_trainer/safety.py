"""How safe an answer is, 0 to 1, by the deployment's own scorer: a small model, a service, or what the filter said.

A scorer is code of the deployment's: where it raises, or says no number, an answer has no score and training goes on.
What then becomes of a version is evaluate.py's affair.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable

from telemetry import metrics
from telemetry.configuration import InvalidConfiguration
from telemetry.events import Completion

log = logging.getLogger(__name__)
UNSCORED = "safety/unscored"  # answers that had no score, since the process began


class Scorer:
    """The deployment's function, and how often it failed."""

    def __init__(self, name: str, score: Callable[[str], float], variant: str) -> None:
        self._name, self._score, self._failures = name, score, 0
        self._shown = metrics.TRAIN_VALUE.labels(variant, UNSCORED)
        self._warned: set[str] = set()

    def __call__(self, text: str) -> float | None:
        """Between 0 and 1; None where the function failed."""
        try:
            score = float(self._score(text))
        except Exception as error:  # noqa: BLE001 - whatever the deployment's code raises, training goes on
            self._failed(type(error).__name__)
            return None
        if math.isnan(score):
            self._failed("no number")
            return None
        return min(1.0, max(0.0, score))

    def _failed(self, why: str) -> None:
        """Count it, and say each way of failing once; the error's own words may hold the answer's."""
        self._failures += 1
        self._shown.set(self._failures)
        if why not in self._warned:
            self._warned.add(why)
            log.warning(
                "[trainer] safety_scorer %s failed on an answer (%s): it has no score, nor has any other that it "
                "fails on; %s counts them",
                self._name, why, UNSCORED,
                extra={"action": "safety_scorer_failed"},
            )  # fmt: skip


def load_scorer(name: str, variant: str) -> Scorer | None:
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
    return Scorer(name, found, variant)


def safety(completion: Completion, scorer: Scorer | None) -> float | None:
    """0 where the output filter stopped the answer, else the scorer's word (without one: 1); None where it failed."""
    if completion.finish_reason == "content_filter":
        return 0.0
    return 1.0 if scorer is None else scorer(completion.text)
