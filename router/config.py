"""``[router]``: the front door's settings. The address is the launcher's: ``[stack]`` host and port.

Durations are seconds, ratios 0–1. Secrets are never here: keys lie in a file, as hashes.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from telemetry.redaction import KINDS, Kind

Ratio = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0.0)]


class StackAddress(msgspec.Struct, frozen=True):
    """What the router reads of ``[stack]``; the launcher's other keys are not its business."""

    host: str = "127.0.0.1"
    port: int = 8000


class RouterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[router]``."""

    # TOML file of key hashes (router/admission.py). Empty: open mode, which serves on loopback only.
    key_file: str = ""
    # Processes that answer on the one port; more than cores gains nothing. They count chat requests together, so that
    # max_in_flight and max_in_flight_per_key hold for all; the other numbers are each worker's.
    workers: Positive = 1
    # Share of an opted-in user's `auto` requests that become pairs, and how many a minute at most.
    pair_ratio: Ratio = 0.2
    pairs_per_minute: Positive = 30
    # While there is a canary: share of pairs that set it against stable. The rest compares stable with itself.
    canary_pair_ratio: Ratio = 0.8
    # Share of pairs that set the first variant's stable against another variant's.
    cross_variant_ratio: Ratio = 0.1
    # How long a verdict on a pair, and a thumb on a single answer, is accepted.
    pair_ttl_s: Seconds = 3600.0
    completion_ttl_s: Seconds = 3600.0
    # How long the same verdict sent again finds its receipt.
    verdict_ttl_s: Seconds = 30 * 86400.0
    # One verdict's append is one worker's business for this long; after a crash the next try takes over.
    claim_lease_s: Seconds = 2.0
    # Tokens of an answer when the client names no limit, and the most it may ask for.
    default_max_tokens: Positive = 256
    max_tokens: Positive = 4096
    # The largest `n`, and the largest body: a pair's event, prompt included, must fit into one log entry.
    max_choices: Positive = 8
    max_body_bytes: Positive = 1 << 19
    # A request's body must be here within this long.
    body_s: Seconds = 30.0
    # Taken out of texts before they are written (telemetry/redaction.py). What users read stays as it is.
    redact: tuple[Kind, ...] = KINDS
    # "module:factory" of a function from a text to the redacted one, for what needs a model (Presidio, say); it runs in
    # the request's own time.
    redactor: str = ""
    # Chat requests at once: above the first 503, one key above the second 429.
    max_in_flight: Positive = 256
    # One base's replicas are given as many generations (a pair can be two) as they answer without queues, at least this
    # many: about what two of their batches hold.
    min_in_flight: Positive = 32
    # A first token this much later than without a queue is waited for; later still, and further requests are refused.
    patience_s: Seconds = 0.5
    max_in_flight_per_key: Positive = 128
    # Connections to Redis; a burst beyond them waits in line.
    redis_connections: Positive = 32
    # A request is given up after this long; `ready_wait_s` of it may pass waiting for a replica.
    deadline_s: Seconds = 120.0
    ready_wait_s: Seconds = 5.0
    # How often the routing and replica tables are read.
    table_poll_s: Seconds = 0.3


def worker_name(worker: int) -> str:
    """What a worker's files are called: ``router``, ``router-2`` …"""
    return "router" if worker == 1 else f"router-{worker}"
