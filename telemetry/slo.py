"""Service-level objectives as Prometheus rules: multiwindow, multi-burn-rate (Google SRE Workbook, chapter 5).

Pure: objectives in, rule dictionaries out. Names are Sloth's, so that its dashboards fit. Every alert has a
minimum-traffic gate: three failures at night are no burn.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

Rule = dict[str, Any]
WINDOWS: Final = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
BURNS: Final = (  # severity, factor, long window, short window
    ("page", 14.4, "1h", "5m"),
    ("page", 6.0, "6h", "30m"),
    ("ticket", 3.0, "1d", "2h"),
    ("ticket", 1.0, "3d", "6h"),
)


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """A share of events that must be good. ``errors`` and ``total`` are PromQL with ``{window}`` in them."""

    name: str
    target_ratio: float  # 0.995: five in a thousand may fail
    errors: str  # bad events in the window, present as 0 while there is traffic
    total: str  # all events in the window
    min_events: float  # events in the long window below which nobody is woken
    description: str

    @property
    def budget_ratio(self) -> float:
        """Share of events that may fail."""
        return round(1.0 - self.target_ratio, 10)

    @property
    def labels(self) -> dict[str, str]:
        return {"sloth_id": f"tiebreak-{self.name}", "sloth_service": "tiebreak", "sloth_slo": self.name}


def recording_rules(objective: Objective) -> list[Rule]:
    """Error ratios over every window, the objective, its budget, and the current burn rate."""
    selector = f'{{sloth_id="{objective.labels["sloth_id"]}"}}'
    ratios = [
        _record(f"slo:sli_error:ratio_rate{window}", error_ratio(objective, window), objective.labels)
        for window in WINDOWS
    ]
    return [
        *ratios,
        _record("slo:objective:ratio", f"vector({objective.target_ratio})", objective.labels),
        _record("slo:error_budget:ratio", f"vector({objective.budget_ratio})", objective.labels),
        _record(
            "slo:current_burn_rate:ratio",
            f"slo:sli_error:ratio_rate5m{selector} / on (sloth_id) slo:error_budget:ratio{selector}",
            objective.labels,
        ),
    ]


def error_ratio(objective: Objective, window: str) -> str:
    """Share of bad events in ``window``; no series without events."""
    errors, total = (part.replace("{window}", window) for part in (objective.errors, objective.total))
    return f"({errors}) / (({total}) > 0)"


def burn_condition(objective: Objective, severity: str) -> str:
    """True while the budget burns at one of ``severity``'s speeds in both of its windows."""
    selector = f'{{sloth_id="{objective.labels["sloth_id"]}"}}'
    arms = []
    for level, factor, long, short in BURNS:
        if level != severity:
            continue
        limit = f"{factor:g} * {objective.budget_ratio:g}"
        total = objective.total.replace("{window}", long)
        arms.append(
            f"(slo:sli_error:ratio_rate{long}{selector} > {limit}"
            f" and slo:sli_error:ratio_rate{short}{selector} > {limit}"
            f" and on () ({total}) >= {objective.min_events:g})"
        )
    return "\nor\n".join(arms)


def _record(name: str, expression: str, labels: dict[str, str]) -> Rule:
    return {"record": name, "expr": expression, "labels": dict(labels)}
