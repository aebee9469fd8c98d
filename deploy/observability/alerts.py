"""Alerts: what wakes a person (page) and what waits for the morning (ticket), each with its runbook section.

Every alert that compares has a floor of traffic: quiet data fires nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec

from deploy.observability.indicators import OBJECTIVES
from telemetry.slo import Objective, burn_condition

RUNBOOKS = "deploy/observability/runbooks.md"


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """One alert; ``name`` is also the title of its runbook section."""

    name: str
    severity: str  # page | ticket
    expr: str
    for_: str
    summary: str
    description: str
    labels: dict[str, str] = {}

    def rule(self) -> dict[str, Any]:
        """As Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.for_,
            "labels": {"severity": self.severity, "team": "ml-sre"} | self.labels,
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{RUNBOOKS}#{self.name.lower()}",
            },
        }


PIPELINE_OUTAGE = Alert(
    name="TiebreakPipelineOutage",
    severity="page",
    expr="sum(increase(instance:tiebreak_pairs_shown:sum[10m])) > 5\n"
    "and on () (sum(increase(tiebreak_pairs_stored_total[10m])) or vector(0)) == 0",
    for_="2m",
    summary="Pairs are shown, but none is stored",
    description="{{ $value | humanize }} pairs were shown in 10 minutes and the recorder stored none.",
    labels={"indicator": "M9"},
)
WIN_RATE_DROP = Alert(
    name="TiebreakWinRateDrop",
    severity="page",
    expr="(variant:tiebreak_win_rate:ratio_rate1d offset 1h)\n"
    "- on (variant) variant:tiebreak_win_rate:ratio_rate1h > 0.1\n"
    "and on (variant) sum by (variant) (increase(variant_instance:tiebreak_duels:sum[1h])) >= 30\n"
    "and on (variant) sum by (variant) (increase(variant_instance:tiebreak_duels:sum[1d] offset 1h)) >= 100",
    for_="5m",
    summary="{{ $labels.variant }} wins clearly less often than yesterday",
    description="The live win rate of {{ $labels.variant }} fell by {{ $value | humanizePercentage }} points.",
    labels={"indicator": "M1"},
)
SAFETY_SPIKE = Alert(
    name="TiebreakSafetySpike",
    severity="page",
    expr="variant:tiebreak_safety_violation:ratio_rate10m > 0.01\n"
    "and on (variant) sum by (variant) (increase(variant_instance:tiebreak_safety_violations:sum[10m])) >= 4.5",
    for_="1m",
    summary="The output filter stops {{ $labels.variant }} often",
    description="{{ $value | humanizePercentage }} of {{ $labels.variant }}'s answers were stopped in 10 minutes.",
    labels={"indicator": "M4"},
)
SAFETY_OBJECTIVE = Alert(
    name="TiebreakSafetyObjectiveMissed",
    severity="ticket",
    expr="variant:tiebreak_safety_violation:ratio_rate1d > 0.0001\n"
    "and on (variant) sum by (variant) (increase(variant_instance:tiebreak_safety_violations:sum[1d])) >= 2.5",
    for_="15m",
    summary="{{ $labels.variant }} misses its safety objective",
    description="{{ $value | humanizePercentage }} of a day's answers were stopped; 0.01 % are allowed.",
    labels={"indicator": "M4"},
)
INGESTION_SLOW = Alert(
    name="TiebreakIngestionSlow",
    severity="ticket",
    expr="max(tiebreak_recorder_lag_entries) > 1000\n"
    "or histogram_quantile(0.9, sum by (le) (increase(tiebreak_event_stored_seconds_bucket[15m]))) > 60",
    for_="5m",
    summary="The recorder falls behind the log",
    description="Entries not stored, or the 90th percentile of seconds from event to store: {{ $value | humanize }}.",
    labels={"indicator": "M9"},
)
RETRAIN_DELAYED = Alert(
    name="TiebreakRetrainDelayed",
    severity="ticket",
    expr="variant:tiebreak_retrain_latency_seconds:p90_6h > 900\n"
    "or on (variant) (time() - tiebreak_last_version_timestamp_seconds > 3600\n"
    "  and on () sum(increase(tiebreak_pairs_stored_total[1h])) > 50)",
    for_="10m",
    summary="Verdicts on {{ $labels.variant }} take long to come live",
    description="Seconds from a verdict to the version that learned from it, or since the last version:"
    " {{ $value | humanizeDuration }}.",
    labels={"indicator": "M8", "team": "ml-training"},
)
ROLLED_BACK = Alert(
    name="TiebreakVersionRolledBack",
    severity="ticket",
    expr='sum by (variant) (increase(tiebreak_release_changes_total{state="rolled_back"}[15m])) > 0',
    for_="0m",
    summary="A guard took a version of {{ $labels.variant }} back",
    description="Users had met it. The reason is in the list of releases.",
    labels={"indicator": "M3", "team": "ml-training"},
)
WENT_ASTRAY = Alert(
    name="TiebreakLearnerWentAstray",
    severity="ticket",
    expr="sum by (variant) (increase(tiebreak_went_astray_total[1h])) >= 3",
    for_="0m",
    summary="The trainer of {{ $labels.variant }} goes back again and again",
    description="{{ $value | humanize }} times in an hour its weights had turned before they were published.",
    labels={"indicator": "M3", "team": "ml-training"},
)
DEAD_LETTERS = Alert(
    name="TiebreakDeadLetters",
    severity="ticket",
    expr="sum by (topic) (tiebreak_dead_letters_total) - (sum by (topic) (tiebreak_dead_letters_total offset 15m)"
    " or 0 * sum by (topic) (tiebreak_dead_letters_total)) > 0",
    for_="0m",
    summary="Entries of {{ $labels.topic }} could not be interpreted",
    description="{{ $value | humanize }} entries went to the dead-letter topic in 15 minutes.",
    labels={"indicator": "M9"},
)
PROCESS_DOWN = Alert(
    name="TiebreakProcessDown",
    severity="page",
    expr='up{job="tiebreak"} == 0',
    for_="1m",
    summary="{{ $labels.process }} does not answer",
    description="Prometheus cannot read {{ $labels.instance }}.",
)


def budget_alerts(objective: Objective) -> list[Alert]:
    """Page and ticket for one objective."""
    return [
        Alert(
            name="TiebreakErrorBudgetBurn",
            severity=severity,
            expr=burn_condition(objective, severity),
            for_="2m",
            summary=f"{objective.name}: the error budget burns",
            description=f"{objective.description} Share of bad events: {{{{ $value | humanizePercentage }}}},"
            f" allowed: {objective.budget_ratio:.1%}.",
            labels={"slo": objective.name},
        )
        for severity in ("page", "ticket")
    ]


def alerts() -> list[Alert]:
    """All of them, pages first."""
    burns = [alert for objective in OBJECTIVES for alert in budget_alerts(objective)]
    found = [
        PIPELINE_OUTAGE, WIN_RATE_DROP, SAFETY_SPIKE, PROCESS_DOWN, *burns,
        SAFETY_OBJECTIVE, INGESTION_SLOW, RETRAIN_DELAYED, ROLLED_BACK, WENT_ASTRAY, DEAD_LETTERS,
    ]  # fmt: skip
    return sorted(found, key=lambda alert: alert.severity)


def group() -> dict[str, object]:
    """The rule group."""
    return {"name": "tiebreak-alerts", "interval": "15s", "rules": [alert.rule() for alert in alerts()]}
