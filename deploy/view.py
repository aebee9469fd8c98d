"""What the command line shows, as tables. Values in, rich tables out."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from deploy.status import Overview

NEWEST = 15
PIPE_WIDTH = 240  # columns where nobody looks but a program


def console() -> Console:
    """Standard output: as wide as the terminal, and wide enough for one entry a line elsewhere."""
    return Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)


def _columns(*names: str) -> tuple[Column, ...]:
    """Columns whose cells stay whole, so that names can be copied; only reasons wrap."""
    return tuple(Column(name, no_wrap=name != "reason") for name in names)


def show_status(found: Overview, console: Console) -> None:
    """Processes, channels, numbers."""
    stack = found.stack
    console.print(f"[bold]{stack.state}[/]  {stack.url}  state {stack.state_folder}  config {stack.config}")
    processes = Table(*_columns("process", "state", "pid", "restarts", "ready after", "metrics"), box=None)
    for process in stack.processes:
        processes.add_row(
            process.name,
            process.state,
            str(process.pid or ""),
            str(process.restarts),
            f"{process.ready_after_s:.1f} s",
            process.metrics_url,
        )
    console.print(processes)
    if found.variants:
        console.print(channels(found.variants))
    for title, numbers in (("events stored", found.stored), ("counted since the start", found.numbers)):
        console.print(f"{title}: " + ", ".join(f"{name} {value:g}" for name, value in numbers.items()))
    if found.unreachable:
        console.print(f"[yellow]no answer from: {', '.join(found.unreachable)}[/]")


def show_releases(releases: dict[str, Any], console: Console) -> None:
    """Channels of every variant, then the latest changes."""
    policies = releases["routing"]["policies"]
    console.print(channels(tuple({"policy": name, **route} for name, routes in policies.items() for route in routes)))
    changes = Table(*_columns("when", "variant", "version", "became", "by", "reason"), box=None)
    for entry in releases["history"][:NEWEST]:
        changes.add_row(
            entry["at"][11:19], entry["variant"], entry["version"], entry["state"], entry["actor"], entry["reason"]
        )
    console.print(changes)


def channels(variants: tuple[dict[str, Any], ...]) -> Table:
    """One line a variant: which version each channel points at."""
    table = Table(*_columns("policy", "variant", "stable", "previous", "canary", "shadow"), box=None)
    for variant in variants:
        canary = f"{variant['canary']} ({variant['canary_ratio']:.0%})" if variant.get("canary") else ""
        table.add_row(
            variant["policy"],
            variant["variant"],
            variant["stable"],
            variant["previous"],
            canary,
            variant.get("shadow", ""),
        )
    return table
