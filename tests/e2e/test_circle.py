"""The whole circle by HTTP and command line: ask, click, and a version that learned from the click goes live."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.e2e.stack import ROOT, RunningStack

pytestmark = pytest.mark.timeout(600)
LIVE_LIMIT_S = 120.0


def test_two_bases_answer_at_once_each_with_its_own_versions_and_costs(tiny_stack: RunningStack) -> None:
    route = tiny_stack.call(lambda api: api.releases())["routing"]["policies"]["plain"][0]
    trained = tiny_stack.call(lambda api: api.ask("Hello?", model="chat@base", max_tokens=4))
    plain = tiny_stack.call(lambda api: api.ask("Hello?", model="plain", max_tokens=4))
    assert plain.version == route["stable"] == route["base_version"]
    assert trained.version != plain.version
    with urlopen(f"{tiny_stack.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    (cost,) = (line for line in lines if line.startswith('tiebreak_cost_total{variant="plain-main"'))
    assert float(cost.rpartition(" ")[2]) > 0.0


def tiebreak(stack: RunningStack, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=stack.environ, capture_output=True, text=True, check=False)


def test_the_curls_of_the_readme_work_as_printed(tiny_stack: RunningStack, tmp_path: Path) -> None:
    chapter = (ROOT / "README.md").read_text().partition("## Three curls")[2]
    found = re.search(r"```sh\n(.*?)```", chapter, re.DOTALL)
    assert found is not None
    script = "set -e\n" + found[1].replace("localhost:8000", f"127.0.0.1:{tiny_stack.port}")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pair = json.loads((tmp_path / "pair.json").read_text())
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert len(pair["choices"]) == 2
    assert receipt["pair_id"] == pair["preference"]["pair_id"]
    assert done.stdout.rstrip().endswith("}")
    assert f'"id":"{receipt["id"]}"' in done.stdout.rpartition("\n")[2].replace(" ", "")


def test_a_click_is_stored_trained_on_and_live(tiny_stack: RunningStack) -> None:
    ids = tiny_stack.clicks(24)
    assert len(set(ids)) == 24

    def is_live() -> bool:
        tiny_stack.clicks(1)  # a canary needs answers to be judged by
        return any("live" in tiny_stack.stages(each) for each in ids)

    tiny_stack.wait_for(is_live, LIVE_LIMIT_S, "a click is live")
    stages = next(stages for each in ids if "live" in (stages := tiny_stack.stages(each)))
    assert stages["accepted"]["at"] <= stages["stored"]["at"]
    assert stages["accepted"]["at"] <= stages["trained"]["at"] <= stages["live"]["at"]
    assert stages["live"]["version"] != "v000000"


def stable_of(stack: RunningStack) -> dict[str, str]:
    """The route of the policy's first variant."""
    route: dict[str, str] = stack.call(lambda api: api.releases())["routing"]["policies"]["chat"][0]
    return route


def test_answers_come_from_the_version_that_learned(tiny_stack: RunningStack) -> None:
    def is_promoted() -> bool:
        tiny_stack.clicks(1)
        route = stable_of(tiny_stack)
        return route["stable"] != route["base_version"]

    tiny_stack.wait_for(is_promoted, LIVE_LIMIT_S, "a trained version is stable")
    answer = tiny_stack.call(lambda api: api.ask("Hello?", model="chat@stable", max_tokens=2))
    base = tiny_stack.call(lambda api: api.ask("Hello?", model="chat@base", max_tokens=2))
    assert re.fullmatch(r"v\d{6}-[0-9a-f]{8}", answer.version)
    assert answer.version != base.version == stable_of(tiny_stack)["base_version"]


def test_status_shows_processes_channels_counts_and_lag(tiny_stack: RunningStack) -> None:
    done = tiebreak(tiny_stack, "status", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {process["name"] for process in document["stack"]["processes"]} == {
        "redis", "serving", "router", "recorder", "release", "trainer",
    }  # fmt: skip
    assert document["variants"][0]["variant"] == "chat-main"
    assert document["numbers"]["train_steps"] >= 1
    assert "recorder_lag" in document["numbers"]
    assert document["stored"]["preferences"] >= 24
    assert document["unreachable"] == []


def test_status_as_a_table_fits_people(tiny_stack: RunningStack) -> None:
    done = tiebreak(tiny_stack, "status")
    assert done.returncode == 0
    assert "trainer" in done.stdout
    assert "chat-main" in done.stdout


def test_export_writes_rows_that_trl_reads(tiny_stack: RunningStack, tmp_path: Path) -> None:
    done = tiebreak(tiny_stack, "export", "--out", str(tmp_path / "pairs.jsonl"))
    assert done.returncode == 0, done.stderr
    with (tmp_path / "pairs.jsonl").open(
        encoding="utf-8"
    ) as lines:  # a noisy model says U+2028, which ends no line here
        rows = [json.loads(line) for line in lines]
    assert len(rows) >= 10
    for row in rows:
        assert [message["role"] for message in row["prompt"]][-1] == "user"
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"


def test_an_operator_rolls_back_and_the_history_says_who(tiny_stack: RunningStack) -> None:
    stable = stable_of(tiny_stack)["stable"]
    assert stable != stable_of(tiny_stack)["base_version"], "nothing was released before"
    assert tiebreak(tiny_stack, "releases", "rollback", stable, "--reason", "a drill").returncode == 0

    def is_back() -> bool:
        releases = tiny_stack.call(lambda api: api.releases())
        return any(
            entry["version"] == stable and entry["state"] == "rolled_back" and "a drill" in entry["reason"]
            for entry in releases["history"]
        )

    tiny_stack.wait_for(is_back, 20.0, "rolled back")
    assert stable in tiebreak(tiny_stack, "releases", "list").stdout


def test_simulate_clicks_and_compares(tiny_stack: RunningStack) -> None:
    done = tiebreak(tiny_stack, "simulate", "--persona", "short", "--clicks", "4", "--concurrency", "2")
    assert done.returncode == 0, done.stderr
    assert "win rate" in done.stdout and "of these 4 clicks went live" in done.stdout


def test_a_second_stack_on_the_same_state_is_refused_in_one_line(tiny_stack: RunningStack) -> None:
    done = tiebreak(tiny_stack, "up")
    assert done.returncode == 1
    assert f"another stack (pid {tiny_stack.launcher.pid}) runs on {tiny_stack.state}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_refused_in_one_line(tiny_stack: RunningStack, tmp_path: Path) -> None:
    done = tiebreak(tiny_stack, "up", "--state", str(tmp_path))
    assert done.returncode == 1
    assert f"port {tiny_stack.port} of 127.0.0.1 is in use" in done.stderr
    assert f"TIEBREAK_PORT={tiny_stack.port + 1}" in done.stderr
    assert done.stderr.count("\n") == 1
