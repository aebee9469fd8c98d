"""What is committed is what the code generates, and every alert leads to a runbook section."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from deploy.observability import alerts, dashboard
from deploy.observability.__main__ import FOLDER, generated, scrape_config
from telemetry import metrics


@pytest.mark.parametrize("name", sorted(generated()))
def test_the_committed_file_is_what_the_code_generates(name: str) -> None:
    assert (FOLDER / name).read_text() == generated()[name], "run python -m deploy.observability"


def test_every_alert_has_a_runbook_section_and_every_section_an_alert() -> None:
    sections = re.findall(r"^## (\w+)$", (FOLDER / "runbooks.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted({alert.name for alert in alerts.alerts()})


def test_every_alert_says_how_bad_it_is_who_is_asked_and_where_to_read_on() -> None:
    for alert in alerts.alerts():
        rule = alert.rule()
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["labels"]["team"] in ("ml-sre", "ml-training")
        path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (FOLDER.parents[1] / path).is_file() and anchor == alert.name.lower()


def test_every_metric_that_rules_and_dashboard_read_is_exposed_by_some_process() -> None:
    known = {value._name for value in vars(metrics).values() if hasattr(value, "_name")}
    text = "\n".join(generated().values())
    used = set(re.findall(r"(?<![\w:])tiebreak_\w+(?![\w:]*:)", text)) - {"tiebreak_"}
    plain = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in used}
    assert plain - known == set()


def test_every_indicator_is_recorded_and_shown() -> None:
    recorded = {rule.get("record", "") for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
                for rule in group["rules"]}  # fmt: skip
    shown = " ".join(query for _, query in dashboard.queries())
    for name in (
        "variant:tiebreak_win_rate:ratio_rate1h", "variant_version:tiebreak_win_rate:ratio",
        "variant_version:tiebreak_heldout_win_rate:ratio", "variant_version:tiebreak_compliance:ratio",
        "variant:tiebreak_compliance:ratio_rate1h", "variant:tiebreak_safety_violation:ratio_rate1h",
        "variant_version:tiebreak_safety_violation:ratio", "variant:tiebreak_label_age_median:seconds",
        "variant:tiebreak_retrain_latency_seconds:p50_6h", ":tiebreak_pairs_stored:rate5m",
    ):  # fmt: skip
        assert name in recorded, name
        assert name in shown, name


def test_panels_do_not_overlap_and_stay_on_the_page() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard.dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= dashboard.WIDTH
        taken |= cells


def test_a_deployments_processes_become_scrape_targets(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ready = {"name": "release", "pid": 1, "metrics_url": "http://127.0.0.1:4567/metrics"}
    (tmp_path / "run" / "release.ready").write_text(json.dumps(ready))
    (tmp_path / "run" / "mute.ready").write_text(json.dumps({"name": "mute", "pid": 2}))
    document = yaml.safe_load(scrape_config(tmp_path, tmp_path / "rules.yml"))
    targets = document["scrape_configs"][0]["static_configs"]
    assert targets == [{"targets": ["127.0.0.1:4567"], "labels": {"process": "release"}}]
