"""``tiebreak datasets | labels | export | audit`` on a real log and store, as people type them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from deploy.audit import entries
from deploy.cli import main as tiebreak
from telemetry.config import TelemetryConfig, open_log, open_sealer
from telemetry.event_log import EventLog
from telemetry.events import PREFERENCES
from telemetry.labeling import labeler_name
from telemetry.process import signing_key
from telemetry.store import read
from tests import examples
from tests.e2e.stack import TINY
from tests.integration.recording import RecorderProcess, append, stored_ids, wait_for

ANN, BOB = "a" * 16, "b" * 16
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def log(telemetry_config: TelemetryConfig) -> Iterator[EventLog]:
    found = open_log(telemetry_config)
    yield found
    found.close()


@pytest.fixture
def recorder(telemetry_config: TelemetryConfig, log: EventLog) -> Iterator[RecorderProcess]:
    """Four judged pairs and two that are not, of two people, stored; and a recorder that goes on."""
    sealer = open_sealer(telemetry_config)
    for person in (ANN, BOB):
        sealer.prepare(person)
    people = [(ANN, BOB)[n % 2] for n in range(6)]
    shown = [sealer.seal(replace(examples.pair(n), user=person)) for n, person in enumerate(people)]
    given = [sealer.seal(replace(examples.preference(n), user=person)) for n, person in enumerate(people[:4])]
    append(log, *shown, *given)
    with RecorderProcess(telemetry_config) as process:
        wait_for(lambda: sum(stored_ids(telemetry_config).values()) == 10, "stored")
        yield process


@pytest.fixture
def run(telemetry_config: TelemetryConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("TIEBREAK_TELEMETRY_REDIS_URL", telemetry_config.redis_url)

    def command(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = tiebreak([*words, "--config", str(TINY), "--state", str(telemetry_config.state_path)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return command


def test_a_data_set_is_made_listed_compared_and_exported(
    recorder: RecorderProcess, run: Run, log: EventLog, telemetry_config: TelemetryConfig, tmp_path: Path
) -> None:
    assert recorder.process is not None
    status, first, _ = run("datasets", "create", "--note", "before")
    assert status == 0
    tie = open_sealer(telemetry_config).seal(replace(examples.preference(9, outcome="tie"), user=ANN))
    append(log, tie)
    wait_for(lambda: tie.event_id in stored_ids(telemetry_config), "the tie is stored")
    _, second, _ = run("datasets", "create")
    _, listed, _ = run("datasets", "list", "--json")
    assert [(each["id"], each["verdicts"], each["note"]) for each in json.loads(listed)] == [
        (first.strip(), 4, "before"), (second.strip(), 5, ""),
    ]  # fmt: skip
    assert run("datasets", "diff", first.strip(), second.strip()) == (
        1, f"+ {examples_id(tie)}\n", "0 gone, 1 new, 4 in both\n",
    )  # fmt: skip
    out = tmp_path / "rows.jsonl"
    status, _, told = run("datasets", "export", second.strip()[:8], "--out", str(out))
    assert (status, told) == (0, "4 rows of 5 verdicts; 0 of people who were erased, 1 without a preference\n")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["chosen"][0]["content"] for row in rows} == {f"good {n}" for n in range(4)}
    status, _, _ = run("datasets", "export", second.strip(), "--format", "events", "--out", str(out))
    assert len(out.read_text().splitlines()) == 5


def test_what_people_prefer_otherwise_is_shown_and_nothing_is_trained_where_that_is_nothing(
    recorder: RecorderProcess, run: Run, log: EventLog, telemetry_config: TelemetryConfig
) -> None:
    _, first, _ = run("datasets", "create")
    event = replace(examples.preference(9), user=ANN)
    event = replace(event, chosen=replace(event.chosen, text="Why? And what then?"))
    event = open_sealer(telemetry_config).seal(event)
    append(log, event)
    wait_for(lambda: event.event_id in stored_ids(telemetry_config), "the verdict is stored")
    _, second, _ = run("datasets", "create")
    status, shown, _ = run("datasets", "drift", first.strip(), second.strip())
    assert status == 0
    questions = next(line.split() for line in shown.splitlines() if "questions" in line)
    assert questions[2:] == ["0", "4", "0", "1", "4", "0"]
    status, out, told = run("train", "--dataset", second.strip(), "--if-drifted", first.strip(), "9")
    assert (status, out) == (0, "") and f"nats from {first.strip()}" in told


def examples_id(event: Any) -> str:
    return str(event.event_id)


def test_times_need_a_zone_and_names_have_to_be_there(recorder: RecorderProcess, run: Run) -> None:
    status, _, told = run("datasets", "create", "--since", "2026-01-01")
    assert (status, "zone" in told) == (2, True)
    status, _, told = run("datasets", "export", "ds-nothing", "--out", "-")
    assert (status, told.startswith("tiebreak: ds-nothing: no data set")) == (2, True)


@pytest.mark.parametrize("form", ["label-studio", "argilla"])
def test_pairs_go_out_to_labelers_and_their_labels_come_back_once(
    form: str, recorder: RecorderProcess, run: Run, telemetry_config: TelemetryConfig, tmp_path: Path
) -> None:
    out = tmp_path / "tasks.json"
    status, _, told = run("labels", "export", "--format", form, "--out", str(out))
    assert (status, told) == (0, "2 pairs\n")
    tasks = json.loads(out.read_text())
    assert out.read_text().count("answer") == 4, "both sides of both, opened"
    labeled = tmp_path / "labels.json"
    labeled.write_text(json.dumps([with_labels(task, form) for task in tasks]))
    status, _, told = run("labels", "import", str(labeled), "--format", form, "--instructions", "v2")
    assert (status, told) == (0, "4 recorded\n")
    wait_for(lambda: len(labels_of(telemetry_config)) == 4, "stored")
    assert run("labels", "import", str(labeled), "--format", form, "--instructions", "v2")[2] == "4 recorded before\n"
    found = labels_of(telemetry_config)
    assert {(row["chosen_position"], row["instructions"]) for row in found} == {("a", "v2"), ("b", "v2")}
    key = signing_key(telemetry_config.state_path)
    assert {row["labeler"] for row in found} == {labeler_name(key, name) for name in ("eva", "ida")}
    assert not any(name in str(found) for name in ("eva", "ida")), "labelers by keyed hash"
    assert {row["pair_id"] for row in found} == {"pair-4", "pair-5"}
    assert all(row["prompt"] is None for row in found), "sealed like every verdict"
    labeled.write_text(labeled.read_text().replace("pair-4", "pair-99"))
    status, _, told = run("labels", "import", str(labeled), "--format", form, "--instructions", "v3")
    assert (status, told) == (1, "2 of pairs that are not in the store, 2 recorded\n")
    labeled.write_text("{")
    assert run("labels", "import", str(labeled), "--format", form)[0] == 1


def test_corrections_and_repeats_are_kept_and_marked(
    recorder: RecorderProcess, run: Run, log: EventLog, telemetry_config: TelemetryConfig, tmp_path: Path
) -> None:
    def labeled(day: int, *given: tuple[str, str]) -> str:
        annotations = [
            {
                "completed_by": {"email": f"{name}@example.org"},
                "created_at": f"2026-01-{day:02}T10:00:00Z",
                "result": [{"from_name": "preference", "value": {"choices": [choice]}}],
            }
            for name, choice in given
        ]
        file = tmp_path / f"{day}.json"
        file.write_text(json.dumps([{"data": {"pair_id": "pair-4"}, "annotations": annotations}]))
        return str(file)

    monday, tuesday = labeled(5, ("eva", "a"), ("ida", "b")), labeled(6, ("eva", "b"), ("ida", "b"))
    append(log, examples.published("v000001-aaaaaaaa", []))
    for file in (monday, tuesday):
        assert run("labels", "import", file)[::2] == (0, "2 recorded\n")
    wait_for(lambda: len(labels_of(telemetry_config)) == 4, "stored")
    for file in (monday, tuesday):
        assert run("labels", "import", file)[::2] == (0, "2 recorded before\n")
    eva, ida, corrected, repeated = (
        row["event_id"] for row in sorted(labels_of(telemetry_config), key=lambda row: row["occurred_at"])
    )
    found = json.loads(run("lineage", ida, "--json")[1])["verdict"]
    assert (found["repeats"], found["agrees"], found["contradicts"]) == ([repeated], [corrected], [eva])
    shown = [line.split() for line in run("lineage", ida)[1].splitlines()]
    assert shown[-3:] == [["repeats", repeated], ["agrees", corrected], ["contradicts", eva]]
    wait_for(lambda: f'"verdict {ida}"' in run("audit", "list", "--json")[1], "the look is in the audit trail")


def with_labels(task: dict[str, Any], form: str) -> dict[str, Any]:
    """What the tool exports after eva chose a and ida chose b."""
    if form == "argilla":
        responses = [{"value": "a", "user_id": "eva"}, {"value": "b", "user_id": "ida"}]
        return task | {"responses": {"preference": responses}}
    annotations = [
        {
            "completed_by": {"id": n, "email": name},
            "result": [{"from_name": "preference", "type": "choices", "value": {"choices": [choice]}}],
        }
        for n, (name, choice) in enumerate((("eva", "a"), ("ida", "b")))
    ]
    return task | {"annotations": annotations}


def labels_of(telemetry: TelemetryConfig) -> list[dict[str, Any]]:
    rows = read(telemetry.store_root, PREFERENCES).to_pylist()
    return [row for row in rows if row["source"] == "labeler"]


def test_what_was_done_is_in_the_trail_and_the_trail_is_whole(
    recorder: RecorderProcess, run: Run, telemetry_config: TelemetryConfig, tmp_path: Path
) -> None:
    _, made, _ = run("datasets", "create")
    assert run("export", "--out", str(tmp_path / "all.jsonl"))[0] == 0
    assert run("labels", "export", "--out", str(tmp_path / "tasks.json"))[0] == 0
    wait_for(lambda: len(entries(telemetry_config)) == 3, "three entries")
    status, listed, _ = run("audit", "list", "--json")
    assert [(each["action"], each["subject"]) for each in json.loads(listed)] == [
        ("dataset_created", made.strip()), ("exported", "preferences"), ("exported", "pairs"),
    ]  # fmt: skip
    status, told, _ = run("audit", "verify")
    assert status == 0
    assert told.startswith("3 entries, each linked")
    assert recorder.stop() == 0
    (telemetry_config.state_path / "audit.head").unlink()
    status, _, told = run("audit", "verify")
    assert (status, "head is missing" in told) == (1, True)
