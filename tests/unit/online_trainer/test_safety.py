"""A scorer is the deployment's own code: whatever it does, there is a score or there is none."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from online_trainer.safety import Scorer, load_scorer, safety
from telemetry.configuration import InvalidConfiguration
from tests.unit.online_trainer.kit import completion


def moody(text: str) -> float:
    """Says what the text says, and raises where that is no number."""
    return float(text)


def test_a_score_is_held_between_0_and_1_and_there_is_none_where_the_scorer_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scorer = load_scorer(f"{__name__}:moody", "chat-main")
    assert scorer is not None
    assert [scorer(text) for text in ("0.25", "7", "-7", "nan", "a secret", "another")] == [
        0.25, 1.0, 0.0, None, None, None,
    ]  # fmt: skip
    assert [record.getMessage().count("ValueError") for record in caplog.records] == [0, 1], "each way of failing once"
    assert "moody" in caplog.text and "secret" not in caplog.text


def test_what_the_filter_stopped_needs_no_scorer() -> None:
    stopped = replace(completion("no number"), finish_reason="content_filter")
    assert safety(stopped, Scorer("moody", moody, "chat-main")) == 0.0
    assert safety(completion("no number"), Scorer("moody", moody, "chat-main")) is None
    assert safety(completion("no number"), None) == 1.0


@pytest.mark.parametrize("name", ["nowhere:score", f"{__name__}:nothing", "nowhere"])
def test_a_scorer_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InvalidConfiguration, match=f"safety_scorer '{name}' cannot be loaded"):
        load_scorer(name, "chat-main")
