"""What the settings refuse, and which of them decide what is learned."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from online_trainer.config import FLIPS_PAIRS, PACE, PLACES, TrainerConfig
from telemetry.configuration import InvalidConfiguration, convert_table


def read(**settings: Any) -> TrainerConfig:
    return convert_table(settings, "trainer", TrainerConfig, {}, where="local.toml")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beta": 0.0}, "beta is 0: a temperature above 0"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"tie_share": 0.0}, "tie_share is 0: .* between 0 and 1"),
        ({"tie_share": 1.0, "objective": "davidson"}, "tie_share is 1"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5: from 0 to below 0.5"),
        ({"label_smoothing": 0.5, "objective": "robust"}, "label_smoothing is 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"label_smoothing": 0.1, "objective": "ipo"}, "ipo knows none: leave it out, or take one of sigmoid"),
        ({"label_smoothing": 0.1, "objective": "rao_kupper"}, "rao_kupper knows none"),
        ({"label_smoothing": 0.1, "objective": "davidson"}, "davidson knows none"),
        ({"objective": "robust", "estimates_flips": True, "heldout_window": 23}, "heldout_window is 23: raise it"),
    ],
)
def test_what_a_loss_cannot_be_computed_with_is_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfiguration, match=rf"local.toml: \[trainer\]: .*{words}"):
        read(**settings)


@pytest.mark.parametrize("objective", ["sigmoid", "robust", "ipo", "simpo", "rao_kupper", "davidson"])
def test_every_objective_works_with_the_defaults_and_without_smoothing(objective: str) -> None:
    assert read(objective=objective).label_smoothing == TrainerConfig().label_smoothing
    assert read(objective=objective, label_smoothing=0.0).label_smoothing == 0.0


def test_flips_are_estimated_on_as_many_verdicts_as_the_learner_wants() -> None:
    assert read(objective="robust", estimates_flips=True, heldout_window=FLIPS_PAIRS).estimates


def changed(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 0.25 if isinstance(value, float) else value + 1
        case tuple():
            return value[:1]
    return {"sigmoid": "simpo", "base": "ema", "auto": "float32"}.get(value, f"{value}x")


@pytest.mark.parametrize("name", [field.name for field in msgspec.structs.fields(TrainerConfig)])
def test_settings_differ_where_what_is_learned_may_differ(name: str) -> None:
    before = TrainerConfig()
    after = replace(before, **{name: () if name == "debias" else changed(getattr(before, name))})
    assert (after.learning_digest != before.learning_digest) == (name not in PLACES | PACE)
    assert (name in before.learning) == (name not in PLACES)
