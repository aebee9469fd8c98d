"""promtool test cases for the rules: each alert fires on its failure, and on nothing else. Pure.

One minute between samples. ``a+bxn`` is promtool's series notation: start at a, add b, n times.
"""

from __future__ import annotations

from typing import Any

from deploy.observability.alerts import alerts

BEFORE = 200  # minutes of normal life where a case needs a past
ROUTER = 'instance="router:1", job="tiebreak", process="router"'
TRAINER = 'instance="trainer:1", job="tiebreak", process="trainer"'
RECORDER = 'instance="recorder:1", job="tiebreak", process="recorder"'
RELEASE = 'instance="release:1", job="tiebreak", process="release"'
SAFETY = ("TiebreakSafetySpike", "TiebreakSafetyObjectiveMissed")
Series = dict[str, str]


def document() -> dict[str, Any]:
    """The promtool test file."""
    return {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [
            _case("an idle deployment is quiet", idle(), at=BEFORE + 80, firing=()),
            _case("a healthy deployment is quiet", healthy(), at=BEFORE + 80, firing=()),
            _case("a restart of every process is quiet", restarted(), at=BEFORE + 80, firing=()),
            _case("a handful of lost duels is quiet", few_duels(), at=BEFORE + 80, firing=()),
            _case("shown but not stored", outage(), at=60, firing=("TiebreakPipelineOutage",)),
            _case("a dead recorder", dead_recorder(), at=60, firing=("TiebreakPipelineOutage", "TiebreakProcessDown")),
            _case("ten points fewer duels won", worse(), at=BEFORE + 80, firing=("TiebreakWinRateDrop",)),
            _case("many answers stopped", unsafe(), at=60, firing=SAFETY),
            _case("one answer in ten fails", failing(), at=60, firing=("TiebreakErrorBudgetBurn",)),
            _case("the recorder lags", lagging(), at=60, firing=("TiebreakIngestionSlow",)),
            _case("verdicts wait for an hour", delayed(), at=60, firing=("TiebreakRetrainDelayed",)),
            _case("a version was rolled back", rolled_back(), at=60, firing=("TiebreakVersionRolledBack",)),
            _case("weights turned four times", astray(), at=60, firing=("TiebreakLearnerWentAstray",)),
            _case("an entry nobody understands", dead_letter(), at=60, firing=("TiebreakDeadLetters",)),
        ],
    }  # fmt: skip


def idle() -> Series:
    """Everything is up, nobody asks anything."""
    return {name: "0x500" for name in healthy()} | _up()


def healthy() -> Series:
    """30 requests, 6 pairs and verdicts a minute, two thirds of the duels won."""
    return _up() | {
        f'tiebreak_requests_total{{policy="chat", code="200", {ROUTER}}}': "0+30x500",
        f'tiebreak_responses_total{{variant="v", version="1", channel="stable", {ROUTER}}}': "0+30x500",
        f'tiebreak_ttft_seconds_count{{variant="v", version="1", {ROUTER}}}': "0+30x500",
        f'tiebreak_ttft_seconds_bucket{{variant="v", version="1", le="10.0", {ROUTER}}}': "0+30x500",
        f"tiebreak_verdict_seconds_count{{{ROUTER}}}": "0+6x500",
        f'tiebreak_verdict_seconds_bucket{{le="0.1", {ROUTER}}}': "0+6x500",
        f'tiebreak_pairs_shown_total{{policy="chat", {ROUTER}}}': "0+6x500",
        f"tiebreak_pairs_stored_total{{{RECORDER}}}": "0+6x500",
        f"tiebreak_recorder_lag_entries{{{RECORDER}}}": "0x500",
        **_duels("1", "0+2x500", "0+1x500"),
    }


def restarted() -> Series:
    """All counters start again at 0 at minute 250."""
    again = {"0+30x500": "0+30x250 0+30x150", "0+6x500": "0+6x250 0+6x150"}
    return {name: again.get(values, values) for name, values in healthy().items()}


def few_duels() -> Series:
    """Good hours, then nine duels lost in a row: too few to wake anyone."""
    return idle() | _duels("1", "0+2x200 400x200", "0+1x200 200+1x9 209x190")


def outage() -> Series:
    return healthy() | {f"tiebreak_pairs_stored_total{{{RECORDER}}}": "50x500"}


def dead_recorder() -> Series:
    """The process is gone, and with it its series."""
    up = {name: "1x20 0x500" if "recorder" in name else values for name, values in _up().items()}
    return healthy() | up | {f"tiebreak_pairs_stored_total{{{RECORDER}}}": "0+6x20 _x500"}


def worse() -> Series:
    """Two of three duels won for hours; then a new version that wins one of three."""
    old = _duels("1", "0+2x200 400x200", "0+1x200 200x200")
    return healthy() | old | _duels("2", "_x200 0+1x200", "_x200 0+2x200")


def unsafe() -> Series:
    return healthy() | {f'tiebreak_safety_violations_total{{variant="v", version="1", {ROUTER}}}': "_x40 1+1x500"}


def failing() -> Series:
    return healthy() | {f'tiebreak_requests_total{{policy="chat", code="503", {ROUTER}}}': "_x10 3+3x500"}


def lagging() -> Series:
    return healthy() | {f"tiebreak_recorder_lag_entries{{{RECORDER}}}": "0x20 0+500x500"}


def delayed() -> Series:
    """Versions go live, half an hour after the verdicts they learned from."""
    name = "tiebreak_retrain_latency_seconds_bucket"
    return healthy() | {
        f'{name}{{variant="v", le="900.0", {RELEASE}}}': "0x500",
        f'{name}{{variant="v", le="3600.0", {RELEASE}}}': "0+1x500",
        f'{name}{{variant="v", le="+Inf", {RELEASE}}}': "0+1x500",
    }


def rolled_back() -> Series:
    return healthy() | {f'tiebreak_release_changes_total{{variant="v", state="rolled_back", {RELEASE}}}': "0x55 1x500"}


def astray() -> Series:
    return healthy() | {f'tiebreak_went_astray_total{{variant="v", {TRAINER}}}': "0x20 1x10 2x10 3x10 4x450"}


def dead_letter() -> Series:
    return healthy() | {f'tiebreak_dead_letters_total{{topic="tiebreak.preferences.v1", {RECORDER}}}': "_x55 1x500"}


def _up() -> Series:
    return {f"up{{{labels}}}": "1x500" for labels in (ROUTER, RECORDER, RELEASE)}


def _duels(version: str, won: str, lost: str) -> Series:
    series = f'tiebreak_duels_total{{variant="v", version="{version}", opponent="stable", {RELEASE}, outcome='
    return {f'{series}"win"}}': won, f'{series}"loss"}}': lost}


def _case(name: str, series: Series, *, at: int, firing: tuple[str, ...]) -> dict[str, Any]:
    """Every alert is looked at: those in ``firing`` fire, all others do not."""
    everything = sorted({alert.name for alert in alerts()})
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": key, "values": values} for key, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count by (alertname) (ALERTS{{alertstate="firing", alertname="{alert}"}}) > bool 0',
                "eval_time": f"{at}m",
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert in firing else [],
            }
            for alert in everything
        ],
    }
