"""Guards: which numbers stop a version, and that missing ones never help it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from deploy.release.evidence import Observation, glued_ratio, observe, strange_ratio, summarise, wilson_upper
from deploy.release.guards import Score, judge_canary, judge_probes, judge_watch, offline_gate
from telemetry.events import CompletionServed
from tests.unit.release.story import FAILED, GIBBERISH, GOOD_METRICS, HEALTHY, LIMITS


def test_the_offline_gate_passes_good_metrics() -> None:
    assert offline_gate(GOOD_METRICS, LIMITS.gate).action == "pass"


@pytest.mark.parametrize("name", sorted(GOOD_METRICS))
def test_the_offline_gate_names_a_missing_metric(name: str) -> None:
    metrics = {key: value for key, value in GOOD_METRICS.items() if key != name}
    decision = offline_gate(metrics, LIMITS.gate)
    assert decision.action == "fail"
    assert name in decision.reason


@pytest.mark.parametrize("name", ["probe_perplexity", "kl_per_token", "heldout_win_rate"])
def test_a_metric_that_is_no_number_counts_as_missing(name: str) -> None:
    assert offline_gate(GOOD_METRICS | {name: float("nan")}, LIMITS.gate).action == "fail"


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("heldout_win_rate", 0.4, "held-out"),
        ("kl_per_token", 5.0, "KL"),
        ("probe_repetition", 0.5, "repetition"),
        ("probe_length_tokens", 90.0, "length"),
        ("probe_length_tokens", 3.0, "length"),
        ("probe_entropy", 0.1, "entropy"),
        ("probe_perplexity", 50.0, "perplexity"),
    ],
)
def test_the_offline_gate_stops(name: str, value: float, word: str) -> None:
    decision = offline_gate(GOOD_METRICS | {name: value}, LIMITS.gate)
    assert (decision.action, word in decision.reason) == ("fail", True)


def test_a_win_rate_on_too_few_heldout_pairs_is_not_asked_for() -> None:
    few = GOOD_METRICS | {"heldout_pairs": 3.0, "heldout_win_rate": 0.0}
    assert offline_gate(few, LIMITS.gate).action == "pass"


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        (replace(HEALTHY, repetition_ratio=0.6), "repetition"),
        (replace(HEALTHY, tokens=0), "empty"),
        (replace(HEALTHY, surprise=8.0), "surprise"),
        (replace(HEALTHY, tokens=4), "times as long"),
        (replace(HEALTHY, strange_ratio=0.6), "look like none"),
        (replace(HEALTHY, glued_ratio=0.3), "run into the word"),
        (replace(HEALTHY, is_unsafe=True), "unsafe"),
        (FAILED, "error ratio"),
    ],
)
def test_probes_stop(seen: Observation, word: str) -> None:
    decision = judge_probes((seen,) * 4, (HEALTHY,) * 4, LIMITS.text)
    assert (decision.action, word in decision.reason) == ("fail", True), decision.reason


@pytest.mark.parametrize(
    ("seen", "word"), [(replace(HEALTHY, tpot_s=2.0), "time per token"), (replace(HEALTHY, ttft_s=9.0), "first token")]
)
def test_latency_is_judged_on_many_answers_only(seen: Observation, word: str) -> None:
    enough = LIMITS.text.min_live_answers
    few = judge_probes((seen,) * (enough - 1), (HEALTHY,) * enough, LIMITS.text)
    assert few.action == "pass", few.reason
    many = judge_probes((seen,) * enough, (HEALTHY,) * enough, LIMITS.text)
    assert (many.action, word in many.reason) == ("fail", True), many.reason


def test_a_canarys_length_is_judged_on_many_answers_only() -> None:
    brief, enough = replace(HEALTHY, tokens=HEALTHY.tokens // 8), LIMITS.text.min_live_answers
    few = judge_canary((brief,) * (enough - 1), (HEALTHY,) * enough, Score(4.0, 4), {}, LIMITS)
    assert few.action == "pass", few.reason
    many = judge_canary((brief,) * enough, (HEALTHY,) * enough, Score(4.0, 4), {}, LIMITS)
    assert (many.action, "times as long" in many.reason) == ("fail", True), many.reason


def test_unanswered_probes_are_no_evidence() -> None:
    assert judge_probes((), (HEALTHY,) * 4, LIMITS.text).action == "wait"


def test_without_a_reference_only_absolute_limits_hold() -> None:
    assert judge_probes((replace(HEALTHY, surprise=8.0),) * 4, (), LIMITS.text).action == "pass"
    assert judge_probes((GIBBERISH,) * 4, (), LIMITS.text).action == "fail"


def test_a_canary_needs_answers_and_verdicts() -> None:
    def judged(answers: int, score: Score) -> str:
        return judge_canary((HEALTHY,) * answers, (HEALTHY,) * 9, score, {}, LIMITS).action

    assert judged(0, Score()) == "wait"
    assert judged(9, Score(0.0, 0)) == "wait"
    assert judged(3, Score(4.0, 4)) == "wait"
    assert judged(4, Score(2.0, 4)) == "pass"
    assert judged(6, Score(1.0, 4)) == "wait"
    assert judged(6, Score(0.0, 6)) == "fail"


def test_a_long_undecided_canary_waits() -> None:
    decision = judge_canary((HEALTHY,) * 60, (HEALTHY,) * 60, Score(28.0, 60), GOOD_METRICS, LIMITS)
    assert (decision.action, "undecided" in decision.reason) == ("wait", True)


def test_a_new_stable_is_judged_from_the_fourth_answer_on() -> None:
    def judged(seen: Observation, times: int, age_s: float) -> str:
        baseline = (HEALTHY,) * 9
        return judge_watch((seen,) * times, baseline, age_s, LIMITS.text, LIMITS.watch).action

    assert judged(GIBBERISH, 3, 1.0) == "wait"
    assert judged(GIBBERISH, 4, 1.0) == "fail"
    assert judged(HEALTHY, 0, 1e9) == "wait"
    assert judged(HEALTHY, 20, 29.0) == "wait"
    assert judged(HEALTHY, 20, 30.0) == "pass"


def test_wilsons_bound_is_what_the_paper_gives() -> None:
    assert wilson_upper(0, 0, 1.96) == 1.0
    assert wilson_upper(0, 10, 1.96) == pytest.approx(0.2775, abs=1e-4)
    assert wilson_upper(5, 10, 1.96) == pytest.approx(0.7634, abs=1e-4)
    assert wilson_upper(10, 10, 1.96) == 1.0


def test_failed_answers_do_not_pull_the_text_numbers() -> None:
    summary = summarise((HEALTHY, FAILED))
    assert (summary.answers, summary.errors, summary.tokens) == (1, 1, 40.0)
    assert summary.error_ratio == 0.5


def test_a_completion_becomes_seconds_a_token_and_nats() -> None:
    event = CompletionServed(
        completion_id="c", request_id="r", policy="chat", variant="v", version="x", channel="canary",
        finish_reason="stop", completion_tokens=11, ttft_s=0.5, duration_s=2.5, mean_logp=-1.5,
    )  # fmt: skip
    seen = observe(event)
    assert (seen.tpot_s, seen.surprise, seen.is_error) == (0.2, 1.5, False)


@pytest.mark.parametrize(
    ("text", "ratio"),
    [
        ("The sea is wide, and nobody's boat (not even Ann's) has crossed it in 2,000 years.", 0.0),
        ("L'été, ça va très bien; naïve café.", 0.0),
        ("NASA launched it on 12/05/1999.", 0.0),
        ("theFOOtbar qx7zz9 aRRay_of", 1.0),
        ("", 0.0),
    ],
)
def test_words_that_are_none_are_told_from_words(text: str, ratio: float) -> None:
    assert strange_ratio(text) == ratio


@pytest.mark.parametrize(
    ("tokens", "ratio"),
    [
        (["Explain", " rain", " to", " a", " child", "."], 0.0),
        (["un", "believ", "able", " rain", "!"], 0.5),
        ([" then", "plement", "ary", "ru", "le"], 1.0),
        (["alone"], 0.0),
        ([], 0.0),
    ],
)
def test_tokens_that_run_into_the_word_before_them_are_counted(tokens: list[str], ratio: float) -> None:
    assert glued_ratio(tokens) == ratio
