"""Every Prometheus name, once. Base units, ``_total`` for counters, bounded labels, never a user id.

Processes import the objects they feed; ``expose`` serves the default registry on loopback.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

SHARED_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client reads it when it is imported

# vLLM's buckets for time to first token, so that dashboards can be compared.
TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
FAST_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
LOOP_BUCKETS: Final = (1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 14400.0, 172800.0)

# router
REQUESTS = Counter("tiebreak_requests_total", "Chat requests answered", ["policy", "code"])
RESPONSES = Counter("tiebreak_responses_total", "Completions served", ["variant", "version", "channel"])
RESPONSE_ERRORS = Counter("tiebreak_response_errors_total", "Completions that failed", ["variant", "version", "error"])
COST = Counter(
    "tiebreak_cost_total",
    "Cost of tokens by the variants' prices, in the deployment's currency; a prompt read once counts once",
    ["variant", "version"],
)
TTFT = Histogram("tiebreak_ttft_seconds", "Time to first token", ["variant", "version"], buckets=TTFT_BUCKETS)
DURATION = Histogram(
    "tiebreak_response_duration_seconds", "Whole completion", ["variant", "version"], buckets=TTFT_BUCKETS
)
IN_FLIGHT = Gauge("tiebreak_requests_in_flight", "Chat requests being answered", multiprocess_mode="livesum")
CONCURRENCY_LIMIT = Gauge(
    "tiebreak_concurrency_limit_requests", "Requests that the replicas of a base are given at once", ["base"],
    multiprocess_mode="livesum",
)  # fmt: skip
PAIRS_SHOWN = Counter("tiebreak_pairs_shown_total", "Pairs shown to opted-in users", ["policy"])
REFERENCES = Counter(
    "tiebreak_pair_references_total",
    "Pairs whose base was asked for log-probs: kept, missing",
    ["base", "result"],
)
PAIR_SIDES_LOST = Counter("tiebreak_pair_sides_lost_total", "Sides of pairs that failed", ["variant", "version"])
VERDICTS = Counter(
    "tiebreak_verdicts_total",
    "Verdicts per side: outcome win, loss, tie, both_bad, skip; is_cross when the sides' versions differ",
    ["variant", "version", "outcome", "source", "is_cross"],
)
VERDICT_SECONDS = Histogram("tiebreak_verdict_seconds", "Click received to acknowledged", buckets=FAST_BUCKETS)
FEEDBACK = Counter("tiebreak_feedback_total", "Thumbs on single answers", ["variant", "version", "rating"])
SAFETY_VIOLATIONS = Counter(
    "tiebreak_safety_violations_total", "Completions that the output filter stopped", ["variant", "version"]
)
REJECTED = Counter("tiebreak_requests_rejected_total", "Requests refused at admission", ["reason"])
EVENTS_LOST = Counter("tiebreak_events_lost_total", "Unacknowledged events that neither log nor outbox took", ["topic"])

# serving (per replica, and the fleet's control loop)
TOKENS = Counter("tiebreak_generated_tokens_total", "Tokens generated", ["base", "version"])
ENGINE_BATCH = Gauge("tiebreak_engine_batch_requests", "Sequences in the running batch", ["base"])
ENGINE_QUEUE = Gauge("tiebreak_engine_queue_requests", "Sequences that wait for a place", ["base"])
FREE_SLOTS = Gauge("tiebreak_adapter_free_slots", "Adapter slots that hold no version", ["base", "replica"])
REPLICAS_READY = Gauge("tiebreak_replicas_ready", "Replicas that answer", ["base"])
ADAPTER_LOADS = Counter("tiebreak_adapter_loads_total", "Versions loaded into a slot", ["base", "result"])

# recorder
EVENTS_RECORDED = Counter("tiebreak_events_recorded_total", "Events in the store", ["topic"])
PAIRS_STORED = Counter("tiebreak_pairs_stored_total", "Pairs in the store")
DEAD_LETTERS = Counter("tiebreak_dead_letters_total", "Entries that no consumer could interpret", ["topic"])
RECORDER_LAG = Gauge("tiebreak_recorder_lag_entries", "Log entries not yet stored")
LAST_STORED = Gauge("tiebreak_last_pair_stored_timestamp_seconds", "When the last pair was stored")
STORE_SECONDS = Histogram("tiebreak_event_stored_seconds", "Event occurred to stored", buckets=LOOP_BUCKETS)

# trainer
STEPS = Counter("tiebreak_train_steps_total", "Optimizer steps", ["variant"])
PAIRS_TRAINED = Counter("tiebreak_pairs_trained_total", "Preferences trained on", ["variant"])
PAIRS_DROPPED = Counter("tiebreak_pairs_dropped_total", "Preferences not trained on", ["variant", "reason"])
WENT_ASTRAY = Counter("tiebreak_went_astray_total", "Times that a guard sent the weights back unpublished", ["variant"])
TRAIN_VALUE = Gauge("tiebreak_train_value", "Latest value of a training metric (TRL's names)", ["variant", "name"])
HELDOUT_WIN_RATE = Gauge(
    "tiebreak_heldout_win_rate_ratio", "Reward accuracy on held-out preferences", ["variant", "version"]
)
LABEL_AGE = Gauge("tiebreak_label_age_median_seconds", "Median age of labels in the last batch", ["variant"])
TRAINER_LAG = Gauge("tiebreak_trainer_lag_entries", "Log entries not yet seen by the trainer")

# release
CHANNEL_INFO = Gauge(
    "tiebreak_channel_info", "1 for the version a channel points at", ["variant", "channel", "version"]
)
RELEASES = Counter("tiebreak_release_changes_total", "Changes of a version's state", ["variant", "state"])
RETRAIN_SECONDS = Histogram(
    "tiebreak_retrain_latency_seconds", "Oldest new verdict of a version to that version live", ["variant"],
    buckets=LOOP_BUCKETS,
)  # fmt: skip
DUELS = Counter(
    "tiebreak_duels_total",
    "Verdicts that set a version against a yardstick: stable or base of its variant, or another variant",
    ["variant", "version", "opponent", "outcome"],
)
LAST_RELEASE = Gauge("tiebreak_last_stable_timestamp_seconds", "When stable last changed", ["variant"])
LAST_VERSION = Gauge("tiebreak_last_version_timestamp_seconds", "When a version was last published", ["variant"])


def page() -> bytes:
    """The text of ``/metrics``: this process's, or of all that share the folder in PROMETHEUS_MULTIPROC_DIR."""
    if SHARED_FOLDER not in os.environ:
        return generate_latest()
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def forget_dead_processes() -> None:
    """Leave out what processes that are no more last had under way; what they counted stays counted."""
    for path in Path(os.environ[SHARED_FOLDER]).glob("gauge_live*_*.db"):
        with suppress(FileNotFoundError):  # another worker is at it, too
            written_s, owner = path.stat().st_mtime, int(path.stem.rpartition("_")[2])
            if not _has_lived_since(owner, written_s):
                path.unlink()


def _has_lived_since(pid: int, at_s: float) -> bool:
    """Whether the process that had this id then is still there, and not another one with its id."""
    try:
        return bool(psutil.Process(pid).create_time() <= at_s + 1.0)
    except psutil.NoSuchProcess:
        return False


def expose(port: int) -> int:
    """Serve ``/metrics`` on 127.0.0.1; port 0 picks a free one. Returns the port."""
    server, _ = start_http_server(port, addr="127.0.0.1")
    return int(server.server_port)
