"""Burn-rate rules: the numbers of the SRE workbook, and nothing without traffic."""

from __future__ import annotations

from telemetry.slo import Objective, burn_condition, error_ratio, recording_rules

OBJECTIVE = Objective(
    name="demo",
    target_ratio=0.99,
    errors="sum(increase(bad[{window}]))",
    total="sum(increase(all[{window}]))",
    min_events=50,
    description="Things work.",
)


def test_the_budget_is_what_the_target_leaves() -> None:
    assert OBJECTIVE.budget_ratio == 0.01


def test_a_ratio_has_no_value_without_events() -> None:
    assert error_ratio(OBJECTIVE, "5m") == "(sum(increase(bad[5m]))) / ((sum(increase(all[5m]))) > 0)"


def test_a_page_needs_a_long_and_a_short_window_at_14_4_or_6_times() -> None:
    first, second = burn_condition(OBJECTIVE, "page").split("\nor\n")
    assert "ratio_rate1h" in first and "ratio_rate5m" in first and "14.4 * 0.01" in first
    assert "ratio_rate6h" in second and "ratio_rate30m" in second and "6 * 0.01" in second


def test_a_ticket_is_for_slow_burns() -> None:
    first, second = burn_condition(OBJECTIVE, "ticket").split("\nor\n")
    assert "ratio_rate1d" in first and "3 * 0.01" in first
    assert "ratio_rate3d" in second and "1 * 0.01" in second


def test_every_arm_asks_for_traffic() -> None:
    for severity in ("page", "ticket"):
        for arm in burn_condition(OBJECTIVE, severity).split("\nor\n"):
            assert ">= 50" in arm


def test_every_window_that_an_alert_reads_is_recorded() -> None:
    names = {rule["record"] for rule in recording_rules(OBJECTIVE)}
    for window in ("5m", "30m", "1h", "2h", "6h", "1d", "3d"):
        assert f"slo:sli_error:ratio_rate{window}" in names
