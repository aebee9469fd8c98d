"""Rules, alerts and dashboard on a real Prometheus and a real promtool."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.observability import alerts, dashboard
from deploy.observability.__main__ import FOLDER, generated
from tests.integration.prometheus import Prometheus, require


def test_promtool_finds_no_fault_in_the_rules() -> None:
    checked = subprocess.run(
        [require("promtool"), "check", "rules", str(FOLDER / "rules.yml")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_on_its_failure_and_is_quiet_otherwise() -> None:
    command = [require("promtool"), "test", "rules", str(FOLDER / "rules_test.yml")]
    tested = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    cases = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
    fired = {sample["labels"] for case in cases for test in case["promql_expr_test"] for sample in test["exp_samples"]}
    assert fired == {f'{{alertname="{alert.name}"}}' for alert in alerts.alerts()}


@pytest.mark.parametrize("mended", ["TiebreakPipelineOutage", "TiebreakWinRateDrop"])
def test_the_cases_notice_an_alert_that_never_fires(tmp_path: Path, mended: str) -> None:
    rules = yaml.safe_load(generated()["rules.yml"])
    cases = yaml.safe_load(generated()["rules_test.yml"])
    for group in rules["groups"]:
        for rule in group["rules"]:
            if rule.get("alert") == mended:
                rule["expr"] = "vector(0) > 1"
    is_fired_in = [
        case
        for case in cases["tests"]
        if any(mended in str(test["expr"]) and test["exp_samples"] for test in case["promql_expr_test"])
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(cases | {"tests": is_fired_in[:1]}))
    command = [require("promtool"), "test", "rules", str(tmp_path / "rules_test.yml")]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode != 0


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that reads a busy process, with the generated rules at a test's pace."""
    folder = tmp_path_factory.mktemp("prometheus")
    command = [sys.executable, "-m", "tests.integration.busy_process"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=FOLDER.parents[1]) as busy:
        try:
            assert busy.stdout is not None
            port = int(busy.stdout.readline())
            server = Prometheus(folder, _config(folder, port))
            yield server
            server.close()
        finally:
            busy.kill()


def _config(folder: Path, port: int) -> Path:
    """The generated rules, evaluated every second."""
    rules = yaml.safe_load(generated()["rules.yml"])
    for group in rules["groups"]:
        del group["interval"]
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"process": "busy"}}]
    document = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "tiebreak", "static_configs": targets}],
    }
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_every_query_of_the_dashboard_returns_data(prometheus: Prometheus) -> None:
    waiting = {query.replace("$variant", ".*") for _, query in dashboard.queries()}
    assert len(waiting) > 25
    deadline = time.monotonic() + 60
    while waiting and time.monotonic() < deadline:
        waiting = {query for query in waiting if not _has_a_number(prometheus, query)}
        time.sleep(0.5)
    assert not waiting


def _has_a_number(prometheus: Prometheus, query: str) -> bool:
    return any(sample["value"][1] != "NaN" for sample in prometheus.query(query))


def test_the_win_rate_that_prometheus_shows_is_the_one_that_happened(prometheus: Prometheus) -> None:
    test_every_query_of_the_dashboard_returns_data(prometheus)
    won, lost = (
        float(prometheus.query(f'tiebreak_duels_total{{outcome="{outcome}"}}')[0]["value"][1])
        for outcome in ("win", "loss")
    )
    shown = float(prometheus.query("variant_version:tiebreak_win_rate:ratio")[0]["value"][1])
    assert shown == pytest.approx(won / (won + lost), abs=0.1)
    by_version = {
        sample["metric"]["version"]: float(sample["value"][1])
        for sample in prometheus.query("variant_version:tiebreak_compliance:ratio")
    }
    assert sum(by_version.values()) == pytest.approx(1.0, abs=0.1)


def test_prometheus_evaluates_every_rule_without_an_error(prometheus: Prometheus) -> None:
    test_every_query_of_the_dashboard_returns_data(prometheus)
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
