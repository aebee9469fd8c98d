"""One Grafana dashboard as data: is it better, is it safe, is it fresh, does it run. Pure.

Queries use fixed windows and no Grafana macros but ``$variant``, so that a test can ask a real Prometheus.
"""

from __future__ import annotations

from typing import Any

import msgspec

WIDTH = 24
HEIGHT = 8


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """One panel: (query, legend) pairs with one unit."""

    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    goal: float | None = None  # drawn as a line


V = '{variant=~"$variant"}'
ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Is it better?",
        (
            Panel(
                title="Live win rate (M1)",
                description="Against its own stable or base, or another variant; one hour.",
                queries=((f"variant:tiebreak_win_rate:ratio_rate1h{V}", "{{variant}}"),),
                unit="percentunit",
                goal=0.5,
            ),
            Panel(
                title="Win rate per version (M1)",
                description="Whole life of a version.",
                queries=((f"variant_version:tiebreak_win_rate:ratio{V}", "{{variant}} {{version}}"),),
                unit="percentunit",
            ),
            Panel(
                title="Held-out win rate (M1)",
                description="Reward accuracy on held-out verdicts, at publication.",
                queries=((f"variant_version:tiebreak_heldout_win_rate:ratio{V}", "{{variant}} {{version}}"),),
                unit="percentunit",
                goal=0.7,
            ),
            Panel(
                title="Live preference compliance (M2)",
                description="Share of users' choices between different versions that went to this one.",
                queries=(
                    (f"variant:tiebreak_compliance:ratio_rate1h{V}", "{{variant}}"),
                    (f"variant_version:tiebreak_compliance:ratio{V}", "{{variant}} {{version}}"),
                ),
                unit="percentunit",
                goal=0.65,
            ),
            Panel(
                title="Thumbs",
                description="Ratings of single answers, whole life of a version.",
                queries=((f"sum by (version, rating) (tiebreak_feedback_total{V})", "{{version}} {{rating}}"),),
            ),
            Panel(
                title="Versions in the channels",
                description="What each channel points at now.",
                queries=((f"tiebreak_channel_info{V}", "{{variant}} {{channel}}: {{version}}"),),
                kind="table",
            ),
        ),
    ),
    (
        "Is it safe?",
        (
            Panel(
                title="Safety violations (M4)",
                description="Share of answers that the output filter stopped.",
                queries=(
                    (f"variant:tiebreak_safety_violation:ratio_rate1h{V}", "{{variant}}"),
                    (f"variant_version:tiebreak_safety_violation:ratio{V}", "{{variant}} {{version}}"),
                ),
                unit="percentunit",
                goal=0.0001,
            ),
            Panel(
                title="Releases",
                description="Moves of versions in the last hour.",
                queries=((f"sum by (variant, state) (increase(tiebreak_release_changes_total{V}[1h]))", "{{state}}"),),
            ),
            Panel(
                title="Burn rate",
                description="1 spends the error budget exactly; the page is at 14.4.",
                queries=(("slo:current_burn_rate:ratio", "{{sloth_slo}}"),),
                goal=1.0,
            ),
        ),
    ),
    (
        "Is it fresh?",
        (
            Panel(
                title="Pairs (M9)",
                description="Shown by routers and stored by the recorder, per second.",
                queries=((":tiebreak_pairs_shown:rate5m", "shown"), (":tiebreak_pairs_stored:rate5m", "stored")),
                unit="ops",
            ),
            Panel(
                title="Label freshness (M5)",
                description="Median age of the verdicts in the last batch.",
                queries=((f"variant:tiebreak_label_age_median:seconds{V}", "{{variant}}"),),
                unit="s",
            ),
            Panel(
                title="Retrain latency (M8)",
                description="From a verdict to the first answer of a version that learned from it; six hours.",
                queries=(
                    (f"variant:tiebreak_retrain_latency_seconds:p50_6h{V}", "{{variant}} p50"),
                    (f"variant:tiebreak_retrain_latency_seconds:p90_6h{V}", "{{variant}} p90"),
                ),
                unit="s",
            ),
            Panel(
                title="Training",
                description="Pairs trained on, and left out by reason, in the last hour.",
                queries=(
                    (f"sum by (variant) (increase(tiebreak_pairs_trained_total{V}[1h]))", "{{variant}} trained"),
                    (f"sum by (variant, reason) (increase(tiebreak_pairs_dropped_total{V}[1h]))", "{{reason}}"),
                ),
            ),
            Panel(
                title="Training values",
                description="The trainer's latest metrics, by TRL's names.",
                queries=((f"tiebreak_train_value{V}", "{{variant}} {{name}}"),),
            ),
            Panel(
                title="Lag",
                description="Log entries that recorder and trainer have not seen.",
                queries=(
                    ("max(tiebreak_recorder_lag_entries)", "recorder"),
                    ("max(tiebreak_trainer_lag_entries)", "trainer"),
                ),
            ),
        ),
    ),
    (
        "Does it run?",
        (
            Panel(
                title="Requests",
                description="Chat requests per second by status.",
                queries=(("sum by (policy, code) (rate(tiebreak_requests_total[5m]))", "{{policy}} {{code}}"),),
                unit="reqps",
            ),
            Panel(
                title="Time to first token",
                description="Median and 99th percentile.",
                queries=tuple(
                    (
                        f"histogram_quantile({q}, sum by (variant, le) (rate(tiebreak_ttft_seconds_bucket{V}[5m])))",
                        f"{{{{variant}}}} p{q * 100:g}",
                    )
                    for q in (0.5, 0.99)
                ),
                unit="s",
            ),
            Panel(
                title="Click to acknowledgement",
                description="Median and 99th percentile.",
                queries=tuple(
                    (
                        f"histogram_quantile({q}, sum by (le) (rate(tiebreak_verdict_seconds_bucket[5m])))",
                        f"p{q * 100:g}",
                    )
                    for q in (0.5, 0.99)
                ),
                unit="s",
            ),
            Panel(
                title="Errors per version",
                description="Completions that failed, whole life of a version.",
                queries=((f"sum by (version, error) (tiebreak_response_errors_total{V})", "{{version}} {{error}}"),),
            ),
            Panel(
                title="Replicas",
                description="Replicas that answer, and sequences in their batches.",
                queries=(
                    ("max by (base) (tiebreak_replicas_ready)", "{{base}} ready"),
                    ("sum by (base) (tiebreak_engine_batch_requests)", "{{base}} in batch"),
                    ("sum by (base) (tiebreak_engine_queue_requests)", "{{base}} queued"),
                ),
            ),
            Panel(
                title="Processes",
                description="1 while Prometheus can read the process.",
                queries=(('up{job="tiebreak"}', "{{process}} {{instance}}"),),
            ),
        ),
    ),
)


def queries() -> list[tuple[str, str]]:
    """(panel title, query) of the whole dashboard, ``$variant`` left in."""
    return [(panel.title, query) for _, panels in ROWS for panel in panels for query, _ in panel.queries]


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "title": "Tiebreak",
        "uid": "tiebreak",
        "tags": ["tiebreak"],
        "schemaVersion": 39,
        "timezone": "utc",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _variant()]},
        "annotations": {"list": [_releases()]},
        "links": [
            {"title": "Runbooks", "type": "link", "url": "deploy/observability/runbooks.md", "targetBlank": True}
        ],
        "panels": _panels(),
    }


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, members in ROWS:
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place})
        y, x = y + 1, 0
        for member in members:
            if x + member.width > WIDTH:
                x, y = 0, y + HEIGHT
            panels.append(_panel(member, len(panels) + 1, x, y))
            x += member.width
        y += HEIGHT
    return panels


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    custom: dict[str, Any] = {}
    if panel.goal is not None:
        steps.append({"color": "orange", "value": panel.goal})
        custom = {"thresholdsStyle": {"mode": "line"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit, "custom": custom, "thresholds": {"mode": "absolute", "steps": steps},
            },
            "overrides": [],
        },
        "targets": [
            {
                "refId": chr(ord("A") + i), "expr": query, "legendFormat": legend,
                "instant": panel.kind == "table", "format": "table" if panel.kind == "table" else "time_series",
            }
            for i, (query, legend) in enumerate(panel.queries)
        ],
    }  # fmt: skip


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variant() -> dict[str, Any]:
    return {
        "name": "variant", "type": "query", "label": "Variant", "multi": True, "includeAll": True, "allValue": ".*",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": "label_values(tiebreak_channel_info, variant)", "refresh": 2,
        "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip


def _releases() -> dict[str, Any]:
    series = 'tiebreak_channel_info{channel="stable"}'
    return {
        "name": "Releases", "enable": True, "iconColor": "purple",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "expr": f"{series} unless {series} offset 1m", "titleFormat": "{{variant}} stable", "textFormat": "{{version}}",
        "step": "15s",
    }  # fmt: skip
