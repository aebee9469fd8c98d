"""The command line: what is said, and with which exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.cli import main, parser
from deploy.doctor import examine


@pytest.mark.parametrize(
    "arguments",
    [["up"], ["status"], ["simulate"], ["releases"], ["releases", "promote"], ["export"], ["doctor"], ["demo"]],
)
def test_every_command_explains_itself(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out) > 150


def test_status_without_a_stack_says_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--state", str(tmp_path)]) == 1
    assert "tiebreak up" in capsys.readouterr().err


def test_simulate_without_a_persona_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate"]) == 2
    assert "short_sentences" in capsys.readouterr().err


def test_an_unreachable_gateway_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = tmp_path / "d.toml"
    toml.write_text("[stack]\nport = 1\n")
    assert main(["releases", "list", "--config", str(toml), "--state", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "cannot be reached" in error
    assert error.count("\n") == 1


def test_a_broken_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = tmp_path / "d.toml"
    toml.write_text("[stack]\nprot = 1\n")
    assert main(["up", "--config", str(toml), "--state", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "prot" in error
    assert error.count("\n") == 1


def test_export_of_an_empty_store_writes_an_empty_file(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    assert main(["export", "--state", str(tmp_path), "--out", str(out)]) == 0
    assert out.read_text() == ""


def test_doctor_names_a_mend_for_everything_that_is_not_well(tmp_path: Path) -> None:
    toml = tmp_path / "d.toml"
    toml.write_text('[stack]\nhost = "0.0.0.0"\nmin_free_memory_gb = 1e6\n')
    findings = list(examine(toml, state=str(tmp_path)))
    assert {"memory", "access"} <= {finding.name for finding in findings if finding.verdict == "fail"}
    assert all(finding.mend for finding in findings if finding.verdict != "ok")


def test_releases_need_a_version_to_move() -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["releases", "rollback"])
    options = parser().parse_args(["releases", "rollback", "v000001-0000abcd", "--reason", "bad", "--state", "/s"])
    assert (options.action, options.version, options.reason, options.state) == (
        "rollback", "v000001-0000abcd", "bad", "/s",
    )  # fmt: skip


def test_status_json_is_json_even_when_nothing_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from deploy.status import StackStatus, write_status

    (tmp_path / "run").mkdir()
    gone = StackStatus(
        state="stopped", url="http://127.0.0.1:1", pid=1, config="c", state_folder=str(tmp_path), updated_at="",
        processes=(),
    )  # fmt: skip
    write_status(tmp_path / "run", gone)
    assert main(["status", "--json", "--state", str(tmp_path)]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["stack"]["state"] == "stopped"
    assert document["unreachable"] == ["/admin/releases"]
