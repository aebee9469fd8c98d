"""What runs, what answers, how far the data has come: the launcher tells its part, ``status`` gathers the rest.

The launcher's part is ``STATE/run/status.json``. Channels come from the router's admin API, counts and lag from
every process's ``/metrics``. What cannot be reached is left out and said.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 3.0
# what is shown of the processes' metrics: name in the status → (process, sample)
SHOWN = {
    "requests": ("router", "tiebreak_requests_total"),
    "pairs_shown": ("router", "tiebreak_pairs_shown_total"),
    "pairs_stored": ("recorder", "tiebreak_pairs_stored_total"),
    "recorder_lag": ("recorder", "tiebreak_recorder_lag_entries"),
    "dead_letters": ("recorder", "tiebreak_dead_letters_total"),
    "train_steps": ("trainer", "tiebreak_train_steps_total"),
    "pairs_trained": ("trainer", "tiebreak_pairs_trained_total"),
    "pairs_dropped": ("trainer", "tiebreak_pairs_dropped_total"),
    "trainer_lag": ("trainer", "tiebreak_trainer_lag_entries"),
    "release_changes": ("release", "tiebreak_release_changes_total"),
}


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process as its launcher sees it."""

    name: str
    state: str  # waiting | starting | ready | backing_off | stopped
    pid: int | None
    restarts: int
    ready_after_s: float
    last_exit: int | None
    metrics_url: str = ""


class StackStatus(msgspec.Struct, frozen=True, kw_only=True):
    """``STATE/run/status.json``."""

    state: str  # starting | ready | degraded | stopping | stopped | dead
    url: str
    pid: int
    config: str
    state_folder: str
    updated_at: str
    processes: tuple[ProcessStatus, ...]


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """``tiebreak status --json``."""

    stack: StackStatus
    variants: tuple[dict[str, Any], ...]  # policy, variant and its channels
    numbers: dict[str, float]  # since each process started; see SHOWN
    stored: dict[str, int]  # rows in the preference store's tables
    unreachable: tuple[str, ...]


def write_status(run_folder: Path, status: StackStatus) -> None:
    """Replace ``status.json`` in one step."""
    path = run_folder / "status.json"
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_bytes(msgspec.json.format(msgspec.json.encode(status)) + b"\n")
    staging.rename(path)


def read_status(state: Path) -> StackStatus | None:
    """What the launcher of ``state`` last wrote, ``dead`` where it has gone since; None where none ever ran."""
    try:
        status = msgspec.json.decode((state / "run" / "status.json").read_bytes(), type=StackStatus)
    except FileNotFoundError:
        return None
    if status.state != "stopped" and not psutil.pid_exists(status.pid):
        return msgspec.structs.replace(status, state="dead")
    return status


def read_ready(path: Path) -> dict[str, Any] | None:
    """What a process announced in its ``.ready`` file, or None."""
    try:
        document: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return document


def fetch(url: str, *, key: str = "", timeout_s: float = TIMEOUT_S) -> bytes | None:
    """The body of a 200 answer, or None when it cannot be had."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            body: bytes = response.read()
            return body if response.status == 200 else None
    except (OSError, urllib.error.URLError):
        return None


def overview(status: StackStatus, store: str, *, key: str = "") -> Overview:
    """``status`` with what router, metrics and the preference store at ``store`` say now."""
    # imported here: Arrow takes a second, and nothing else in this module needs it
    from telemetry.store import counts

    pages = {process.name: _page(process) for process in status.processes if process.metrics_url}
    releases = fetch(f"{status.url}/admin/releases", key=key)
    missing = [name for name, page in pages.items() if page is None]
    missing += ["/admin/releases"] if releases is None else []
    return Overview(
        stack=status,
        variants=tuple(_variants(msgspec.json.decode(releases))) if releases else (),
        numbers=numbers({name: page for name, page in pages.items() if page is not None}),
        stored=counts(store),
        unreachable=tuple(missing),
    )


def _page(process: ProcessStatus) -> str | None:
    body = fetch(process.metrics_url)
    return body.decode() if body is not None else None


def numbers(pages: Mapping[str, str]) -> dict[str, float]:
    """The samples of SHOWN, summed over their labels, from each process's ``/metrics`` text."""
    sums = {process: _sums(page) for process, page in pages.items()}
    return {name: sums[process][sample] for name, (process, sample) in SHOWN.items() if sample in sums.get(process, {})}


def _sums(page: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def _variants(releases: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for policy, routes in releases["routing"]["policies"].items():
        for route in routes:
            yield {"policy": policy, **route}
