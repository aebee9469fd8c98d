"""Indicators and objectives as Prometheus recording rules, ``level:metric:operations``.

A version's series begin at its first count, which ``increase`` never sees. So counts are first summed per
instance over all versions, a series that exists from then on, and windows are taken over those sums. What is
said of one version needs no window: a version is immutable, its whole life is its window.
"""

from __future__ import annotations

from typing import Final

from telemetry.slo import Objective, Rule, recording_rules

WINDOWS: Final = ("10m", "1h", "1d")
LIVE_SOURCES: Final = 'source=~"end_user|simulated"'  # labelers, judges and imports are not live choices

OBJECTIVES: Final = (
    Objective(
        name="requests-availability",
        target_ratio=0.995,
        errors="sum(increase(instance:tiebreak_requests_failed:sum[{window}]))",
        total="sum(increase(instance:tiebreak_requests:sum[{window}]))",
        min_events=50,
        description="Chat requests are answered without a server error.",
    ),
    Objective(
        name="first-token-latency",
        target_ratio=0.95,
        errors="sum(increase(instance:tiebreak_ttft_slow:sum[{window}]))",
        total="sum(increase(instance:tiebreak_ttft:sum[{window}]))",
        min_events=50,
        description="The first token is there within 10 seconds.",
    ),
    Objective(
        name="verdict-latency",
        target_ratio=0.99,
        errors="sum(increase(instance:tiebreak_verdicts_slow:sum[{window}]))",
        total="sum(increase(instance:tiebreak_verdicts_answered:sum[{window}]))",
        min_events=50,
        description="A click is acknowledged within 100 ms.",
    ),
)


def groups() -> list[dict[str, object]]:
    """Rule groups in the order in which they build on each other."""
    return [
        {"name": "tiebreak-counts", "interval": "15s", "rules": _counts()},
        {"name": "tiebreak-indicators", "interval": "15s", "rules": _indicators()},
        {"name": "tiebreak-slo", "interval": "30s", "rules": [rule for o in OBJECTIVES for rule in recording_rules(o)]},
    ]


def _counts() -> list[Rule]:
    requests, ttft = "tiebreak_requests_total", "tiebreak_ttft_seconds"
    verdict, responses = "tiebreak_verdict_seconds", "tiebreak_responses_total"
    duels = 'tiebreak_duels_total{outcome=~"win|loss"}'
    return [
        _sum("instance:tiebreak_requests:sum", "instance", requests),
        _sum("instance:tiebreak_requests_failed:sum", "instance", f'{requests}{{code=~"5.."}}', zero=requests),
        _sum("instance:tiebreak_ttft:sum", "instance", f"{ttft}_count"),
        _slow("instance:tiebreak_ttft_slow:sum", ttft, "10.0"),
        _sum("instance:tiebreak_verdicts_answered:sum", "instance", f"{verdict}_count"),
        _slow("instance:tiebreak_verdicts_slow:sum", verdict, "0.1"),
        _sum("instance:tiebreak_pairs_shown:sum", "instance", "tiebreak_pairs_shown_total"),
        _sum("variant_instance:tiebreak_responses:sum", "variant, instance", responses),
        _sum(
            "variant_instance:tiebreak_safety_violations:sum",
            "variant, instance",
            "tiebreak_safety_violations_total",
            zero=responses,
        ),
        _sum("variant_instance:tiebreak_duels:sum", "variant, instance", duels),
        _sum(
            "variant_instance:tiebreak_duels_won:sum",
            "variant, instance",
            'tiebreak_duels_total{outcome="win"}',
            zero=duels,
        ),
        _sum("variant_instance:tiebreak_choices:sum", "variant, instance", _choices('outcome!="skip"')),
        _sum(
            "variant_instance:tiebreak_choices_won:sum",
            "variant, instance",
            _choices('outcome="win"'),
            zero=_choices('outcome!="skip"'),
        ),
    ]


def _indicators() -> list[Rule]:
    return [
        *_ratios("tiebreak_win_rate", "tiebreak_duels_won", "tiebreak_duels"),  # M1, live
        *_ratios("tiebreak_compliance", "tiebreak_choices_won", "tiebreak_choices"),  # M2
        *_ratios("tiebreak_safety_violation", "tiebreak_safety_violations", "tiebreak_responses"),  # M4
        _version_ratio(
            "tiebreak_win_rate", 'tiebreak_duels_total{outcome="win"}', 'tiebreak_duels_total{outcome=~"win|loss"}'
        ),
        _version_ratio("tiebreak_compliance", _choices('outcome="win"'), _choices('outcome!="skip"')),
        _version_ratio("tiebreak_safety_violation", "tiebreak_safety_violations_total", "tiebreak_responses_total"),
        {
            "record": "variant_version:tiebreak_heldout_win_rate:ratio",  # M1, held out
            "expr": "max by (variant, version) (tiebreak_heldout_win_rate_ratio)",
        },
        {
            "record": "variant:tiebreak_label_age_median:seconds",  # M5
            "expr": "max by (variant) (tiebreak_label_age_median_seconds)",
        },
        *(_quantile("tiebreak_retrain_latency_seconds", quantile, "6h") for quantile in (0.5, 0.9)),  # M8
        *({"record": f":tiebreak_pairs_stored:rate{w}", "expr": f"sum(rate(tiebreak_pairs_stored_total[{w}]))"}
          for w in ("5m", "1h")),  # M9
        *({"record": f":tiebreak_pairs_shown:rate{w}", "expr": f"sum(rate(instance:tiebreak_pairs_shown:sum[{w}]))"}
          for w in ("5m", "1h")),
    ]  # fmt: skip


def _choices(selector: str) -> str:
    return f'tiebreak_verdicts_total{{is_cross="true", {LIVE_SOURCES}, {selector}}}'


def _sum(name: str, by: str, series: str, zero: str = "") -> Rule:
    """Sum over versions; 0 instead of nothing as soon as ``zero`` exists."""
    expression = f"sum by ({by}) ({series})"
    return {"record": name, "expr": f"{expression} or 0 * sum by ({by}) ({zero})" if zero else expression}


def _slow(name: str, histogram: str, bound: str) -> Rule:
    return {
        "record": name,
        "expr": f'sum by (instance) ({histogram}_count) - sum by (instance) ({histogram}_bucket{{le="{bound}"}})',
    }


def _ratios(name: str, part: str, whole: str) -> list[Rule]:
    return [
        {
            "record": f"variant:{name}:ratio_rate{window}",
            "expr": f"sum by (variant) (increase(variant_instance:{part}:sum[{window}]))"
            f" / (sum by (variant) (increase(variant_instance:{whole}:sum[{window}])) > 0)",
        }
        for window in WINDOWS
    ]


def _version_ratio(name: str, part: str, whole: str) -> Rule:
    by = "variant, version"
    return {
        "record": f"variant_version:{name}:ratio",
        "expr": f"(sum by ({by}) ({part}) or 0 * sum by ({by}) ({whole})) / (sum by ({by}) ({whole}) > 0)",
    }


def _quantile(histogram: str, quantile: float, window: str) -> Rule:
    return {
        "record": f"variant:{histogram}:p{int(quantile * 100)}_{window}",
        "expr": f"histogram_quantile({quantile}, sum by (variant, le) (increase({histogram}_bucket[{window}])))",
    }
