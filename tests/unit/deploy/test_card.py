"""A version's model card."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy.cli import main
from telemetry.manifest import ADAPTER_FILE, Manifest, file_digest, write_version
from telemetry.process import signing_key

METRICS = {
    "heldout_pairs": 12.0, "heldout_win_rate": 0.75, "heldout_loss": 0.512, "heldout_calibration_error": 0.081,
    "probe_perplexity": 5.25, "base_probe_perplexity": 4.5, "kl_per_token": 0.07, "flip_rate": 0.05,
}  # fmt: skip


def published(state: Path, metrics: dict[str, float]) -> str:
    adapter = state / ADAPTER_FILE
    adapter.write_bytes(b"weights")
    manifest = Manifest(
        variant="chat-main", sequence=7, parent="v000006-00000000", base="smollm2", base_digest="ab" * 32,
        created_at=datetime(2026, 1, 2, tzinfo=UTC), step=40, rank=8, alpha=16.0, target_modules=("q_proj",),
        files={ADAPTER_FILE: file_digest(adapter)}, preference_ids=("p1", "p2"), training={"beta": 0.1},
        metrics=metrics,
    )  # fmt: skip
    return write_version(state / "versions", manifest, {ADAPTER_FILE: adapter}, signing_key(state))[0]


def test_a_card_says_what_it_learned_from_how_and_how_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = published(tmp_path, METRICS)
    assert main(["card", name, "--state", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"# chat-main {name}\n")
    assert "2 verdicts that its parent did not know" in text and "5 % of verdicts" in text
    assert "| 12 | 75 % | 0.512 | 0.081 |" in text
    assert "| perplexity of probe answers under the base | 5.250 | 4.500 |" in text
    assert "No held-out pair judged it" not in text


def test_what_was_not_measured_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", published(tmp_path, {"heldout_pairs": 0.0}), "--state", str(tmp_path)]) == 0
    assert "No held-out pair judged it" in capsys.readouterr().out


def test_an_unknown_and_a_changed_version_have_no_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "v000099-aaaaaaaa", "--state", str(tmp_path)]) == 1
    assert "the store holds nothing of that name" in capsys.readouterr().err
    name = published(tmp_path, METRICS)
    (tmp_path / "versions" / "chat-main" / name / ADAPTER_FILE).write_bytes(b"other")
    assert main(["card", name, "--state", str(tmp_path)]) == 1
    assert "does not match the manifest" in capsys.readouterr().err
