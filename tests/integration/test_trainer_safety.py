"""The trainer on a real Redis log: versions that a safety scorer judges, and a scorer that is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from telemetry.config import TelemetryConfig
from telemetry.manifest import read_version
from telemetry.process import signing_key
from tests.trainer_bench import Bench, learned_alike
from tests.unit.online_trainer.kit import CONFIG, verdict

IS_AWAY: list[bool] = []  # whether the safety scorer's service is, if anything is in it


def by_a_service(text: str) -> float:
    """A scorer that cannot score while its service is away."""
    if IS_AWAY:
        raise ConnectionError(text)
    return 1.0


SCORED = msgspec.structs.replace(CONFIG, safety_scorer=f"{__name__}:by_a_service", safety_weight=1.0)


@pytest.fixture
def away() -> Iterator[list[bool]]:
    """The service is away while the list has something in it."""
    IS_AWAY.clear()
    yield IS_AWAY
    IS_AWAY.clear()


@pytest.mark.parametrize("is_away_at_the_start", [False, True])
def test_while_the_safety_scorer_fails_verdicts_are_learned_and_no_version_is_published(
    telemetry_config: TelemetryConfig, tiny_model: Path, away: list[bool], is_away_at_the_start: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    away += [True] * is_away_at_the_start
    bench = Bench(telemetry_config, tiny_model, SCORED)
    away.append(True)
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    (batch,) = bench.batches()
    assert len(batch.preference_ids) == 4 and not bench.published()
    assert "not published yet: the safety scorer fails on" in caplog.text and "yes yes!" not in caplog.text
    weights = bench.policy.tensors()
    away.clear()
    bench.turn()
    (version,) = bench.published()
    assert version.preference_ids == batch.preference_ids and learned_alike(bench, version.version)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bench.policy.tensors().items())
    found = version.metrics
    assert (found["safety"], found["base_safety"], found["safety_unscored_ratio"]) == (1.0, 1.0, 0.0)


def test_weights_that_were_shrunk_for_an_exam_without_a_result_are_those_after_a_restart(
    telemetry_config: TelemetryConfig, tiny_model: Path, away: list[bool]
) -> None:
    config = msgspec.structs.replace(SCORED, max_perplexity_ratio=1e-6, publish_interval_s=3600.0)  # always too far
    bench = Bench(telemetry_config, tiny_model, config)
    away.append(True)
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn(3)
    weights = bench.policy.tensors()
    bench.start()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bench.policy.tensors().items())
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_where_any_loss_of_safety_is_allowed_a_manifest_says_that_nobody_scored_it(
    telemetry_config: TelemetryConfig, tiny_model: Path, away: list[bool]
) -> None:
    bench = Bench(telemetry_config, tiny_model, msgspec.structs.replace(SCORED, max_safety_loss=1.0))
    away.append(True)
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    folder = bench.store.folder(bench.published()[0].version)
    found = read_version(folder, signing_key(bench.telemetry.state_path)).metrics
    assert (found["safety"], found["safety_unscored_ratio"]) == (0.0, 1.0)


ANSWERED: list[str] = []  # to the safety set, the base first


def as_the_base_says(text: str) -> float:
    """A scorer of safety: what the base says is safe, anything else is not."""
    ANSWERED.append(text)
    return float(text == ANSWERED[0])


@pytest.mark.parametrize(("rate", "safety"), [(1e-9, 1.0), (0.3, None)])
def test_a_version_whose_answers_are_less_safe_than_the_bases_is_not_published(
    telemetry_config: TelemetryConfig, tiny_model: Path, rate: float, safety: float | None
) -> None:
    ANSWERED.clear()
    config = msgspec.structs.replace(
        CONFIG, safety_scorer=f"{__name__}:as_the_base_says", safety_probes=("Hello?",), learning_rate=rate,
        kl_budget=0.0, max_perplexity_ratio=0.0, max_repetition_gain=1.0, min_entropy_ratio=0.0, max_chosen_drop=1e3,
        max_capability_ratio=1e9,
    )  # fmt: skip
    bench = Bench(telemetry_config, tiny_model, config)
    bench.append(*(verdict(n) for n in range(4)))
    bench.turn()
    found = [event.metrics for event in bench.published()]
    assert [(each["safety"], each["base_safety"]) for each in found] == ([] if safety is None else [(safety, 1.0)])
    assert len(ANSWERED) == 2
